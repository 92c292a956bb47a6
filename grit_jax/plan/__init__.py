"""The memory and time of a step on a TPU pod, from compiling it ahead of time."""
