"""GRIT in JAX: one transformer that embeds and generates."""
