"""Tools for data before training: validate, measure, convert, sample, mine negatives, fetch."""
