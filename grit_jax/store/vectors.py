"""How vectors are kept: float32, bfloat16, or int8 with a scale for each."""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_LARGEST = 127


def pack(vectors: np.ndarray, dtype: Dtype) -> dict[str, np.ndarray]:
    """What is kept of vectors: `vectors` [rows, embed], and `scales`, float32 [rows], beside int8.

    A value of int8 is off by up to half a scale, which is 1/254 of the largest value of its vector.

    Args:
      vectors: float32 [rows, embed].
      dtype: The type that they are rounded to.
    """
    if dtype == "int8":
        scales = np.abs(vectors).max(axis=1) / np.float32(_LARGEST)
        values = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
        return {"vectors": values.astype(np.int8), "scales": scales}
    return {"vectors": vectors.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}


def unpack(vectors: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """The values that are kept, float32 [rows, embed]."""
    values = vectors.astype(np.float32)
    return values if scales is None else values * scales[:, None]
