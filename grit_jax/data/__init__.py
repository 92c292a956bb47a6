"""From JSONL files to packed batches."""
