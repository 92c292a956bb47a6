"""The mesh, its processes and its chips, and how code runs on them."""
