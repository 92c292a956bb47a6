"""Relative errors of arrays."""

import numpy as np


def relative_error(actual, expected):
    """||a - b|| / ||b|| of two arrays."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
