"""What a program costs on a TPU pod, from compiling it for one ahead of time."""
