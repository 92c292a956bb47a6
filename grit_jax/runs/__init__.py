"""The logs that a run writes, and how to read them: without JAX, anywhere, even during the run."""
