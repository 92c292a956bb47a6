"""Shuffles computed index by index: nothing is stored, so any index of any epoch costs the same."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 5


def shuffled(indices: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """The numbers at some indices of a random order of `range(size)`.

    A Feistel network permutes the numbers with the smallest even number of bits that holds `size`; a result of `size`
    or more goes through it again until it is below (Black and Rogaway, 2002, "cycle walking").

    Args:
      indices: int [indices], each in `range(size)`.
      size: Length of the order.
      key: Numbers that identify the order. An array, int [indices], gives each index an order of its own.

    Returns:
      int64 [indices].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    seed = _hashed(*key)
    round_keys = np.broadcast_to(_mixed(seed + np.arange(_ROUNDS, dtype=np.uint64)[:, None]), (_ROUNDS, len(indices)))
    result = indices.astype(np.uint64)
    walking = np.arange(len(indices))
    while len(walking):
        numbers = result[walking]
        left, right = numbers >> half, numbers & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key[walking]) & mask)
        numbers = (left << half) | right
        result[walking] = numbers
        walking = walking[numbers >= size]
    return result.astype(np.int64)


def _hashed(*key: int | np.ndarray) -> np.ndarray:
    """uint64 [1] or [indices]."""
    numbers = [int(part) for part in key if not isinstance(part, np.ndarray)]
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    result = np.frombuffer(digest, np.uint64)
    for part in key:
        if isinstance(part, np.ndarray):
            result = _mixed(result + part.astype(np.uint64))
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby, 2011): every bit depends on all others."""
    values = (values ^ (values >> np.uint64(33)) ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
