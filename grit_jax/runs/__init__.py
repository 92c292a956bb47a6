"""What a run writes for people, and how to read it: without JAX, anywhere, during the run."""
