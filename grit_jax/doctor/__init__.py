"""JAX on this machine: versions and devices, likely problems, and whether its numbers are right."""
