"""Checkpoints on a disk or in a bucket, and opening any model."""
