"""Checkpoints on a disk or in a bucket, opening any model, and merging models."""
