"""What a machine has for JAX, what is probably wrong with it, and whether its numbers are right."""
