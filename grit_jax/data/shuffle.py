"""Shuffles that are computed place by place: nothing is stored, so any place of any epoch costs the same."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 5


def shuffled(places: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """The numbers at some places of a random order of `range(size)`.

    A Feistel network over the smallest even number of bits that holds `size` permutes that range; numbers from `size`
    on are sent through it again until they are below (Black and Rogaway, 2002, "cycle walking").

    Args:
      places: int [places], each in `range(size)`.
      size: How many numbers the order has.
      key: Names the order: equal numbers give equal orders. An array, int [places], names one for each place.

    Returns:
      int64 [places].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    seed = _hashed(*key)
    round_keys = np.broadcast_to(_mixed(seed + np.arange(_ROUNDS, dtype=np.uint64)[:, None]), (_ROUNDS, len(places)))
    result = places.astype(np.uint64)
    walking = np.arange(len(places))
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
    """uint64 [1] or [places]."""
    numbers = [int(part) for part in key if not isinstance(part, np.ndarray)]
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    result = np.frombuffer(digest, np.uint64)
    for part in key:
        if isinstance(part, np.ndarray):
            result = _mixed(result + part.astype(np.uint64))
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby, 2011): every bit depends on all."""
    values = (values ^ (values >> np.uint64(33)) ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
