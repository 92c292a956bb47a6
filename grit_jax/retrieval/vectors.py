"""How vectors, keys and values are kept: float32, bfloat16, or int8 with a scale for each run of numbers."""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_LARGEST = 127


def quantize(values: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Values as they are kept, and the scales of int8: one for each run of the last dim.

    A value of int8 is off by up to half a scale, which is 1/254 of the largest value of its run.

    Args:
      values: float32 [..., numbers].
      dtype: The type that they are rounded to.

    Returns:
      The values in that type, and float32 [...] beside int8, else None.
    """
    if dtype == "int8":
        scales = np.abs(values).max(axis=-1) / np.float32(_LARGEST)
        rounded = np.rint(values / np.where(scales > 0, scales, 1)[..., None])
        return rounded.astype(np.int8), scales
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), None


def pack(vectors: np.ndarray, dtype: Dtype) -> dict[str, np.ndarray]:
    """What is kept of vectors: `vectors` [rows, embed], and `scales`, float32 [rows], beside int8; see `quantize`.

    Args:
      vectors: float32 [rows, embed].
      dtype: The type that they are rounded to.
    """
    values, scales = quantize(vectors, dtype)
    return {"vectors": values} if scales is None else {"vectors": values, "scales": scales}


def unpack(vectors: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """The values that are kept, float32 [..., numbers]."""
    values = vectors.astype(np.float32)
    return values if scales is None else values * scales[..., None]
