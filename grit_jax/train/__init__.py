"""State, optimizer, step and loop of a training run."""
