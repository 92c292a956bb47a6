"""A corpus as vectors in files: made once, grown, searched and exported."""
