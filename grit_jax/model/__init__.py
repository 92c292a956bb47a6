"""The transformer: attention, layers and pooling."""
