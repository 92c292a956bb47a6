"""The transformer: attention, layers, pooling and decoding."""
