"""The losses of the streams."""
