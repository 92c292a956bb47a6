"""What a run leaves in its folder for people, and how it is read: without JAX, anywhere, while the run goes on."""
