"""How a store keeps numbers: float32, bfloat16, or int8 with a scale for each vector of them."""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_LARGEST = 127


def quantize(values: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Rounds values to a dtype; int8 has one scale for each vector of the last dim.

    An int8 value is off by up to half a scale, which is 1/254 of the largest value of its vector.

    Args:
      values: float32 [..., numbers].
      dtype: The dtype.

    Returns:
      The values in that dtype, and the scales, float32 [...], for int8, else None.
    """
    if dtype == "int8":
        scales = np.abs(values).max(axis=-1) / np.float32(_LARGEST)
        rounded = np.rint(values / np.where(scales > 0, scales, 1)[..., None])
        return rounded.astype(np.int8), scales
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), None


def pack(vectors: np.ndarray, dtype: Dtype) -> dict[str, np.ndarray]:
    """The tensors to store: `vectors` [rows, embed] and, for int8, `scales`, float32 [rows]; see `quantize`.

    Args:
      vectors: float32 [rows, embed].
      dtype: The dtype to round them to.
    """
    values, scales = quantize(vectors, dtype)
    return {"vectors": values} if scales is None else {"vectors": values, "scales": scales}


def unpack(vectors: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """The stored values, float32 [..., numbers]."""
    values = vectors.astype(np.float32)
    return values if scales is None else values * scales[..., None]
