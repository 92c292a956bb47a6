"""From data files to packed batches."""
