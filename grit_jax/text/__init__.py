"""Text to tokens: the tokenizer, and the GRIT format."""
