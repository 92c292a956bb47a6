"""Which records a step takes, for people: files, record numbers and line numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.index import FileIndex
from grit_jax.data.sources import SUFFIXES
from grit_jax.data.streams.base import RowPlan, Samples


class FileSamples(NamedTuple):
    """The records of one file that a step takes.

    Attributes:
      stream: Which stream they belong to.
      dataset: Short name of the file; see `dataset_names`.
      file: Its path.
      records: Their numbers in the file, from 0, blank lines and malformed records not counted.
      lines: Their line numbers, or those of their entries, from 1.
    """

    stream: str
    dataset: str
    file: str
    records: list[int]
    lines: list[int]


def file_samples(
    stream: str, samples: Samples, indexes: Mapping[int, FileIndex], names: Sequence[str]
) -> list[FileSamples]:
    """The samples of a stream by file, in the files' order."""
    found = []
    for number in np.unique(samples.file).tolist():
        index, records = indexes[number], samples.record[samples.file == number]
        lines = index.line_numbers(records)
        found.append(FileSamples(stream, names[number], str(index.path), records.tolist(), lines.tolist()))
    return found


def file_losses(rows: RowPlan, token_losses: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean loss of the scored tokens of each file of a generative batch, in nats, by the file's name.

    A token counts as much as it does in the batch's loss.

    Args:
      rows: Where the texts of the batch are.
      token_losses: float32 [2, rows, length]; weighted losses and weights of all tokens.
      names: Name of each file.
    """
    sums = np.zeros((len(names), 2))
    for file, row, offset, length in zip(rows.file, rows.row, rows.offset, rows.length, strict=True):
        sums[file] += token_losses[:, row, offset : offset + length].sum(axis=1, dtype=np.float64)
    return {names[file]: float(loss / weight) for file, (loss, weight) in enumerate(sums) if weight}


def dataset_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Short names of files that tell them apart: without the folders that all share, and without their endings."""
    parts = [_without_ending(os.fspath(path)).split("/") for path in paths]
    folders = list(zip(*(part[:-1] for part in parts)))  # as deep as the shallowest file
    shared = next((depth for depth, names in enumerate(folders) if len(set(names)) > 1), len(folders))
    return ["/".join(part[shared:]) for part in parts]


def _without_ending(path: str) -> str:
    return path.removesuffix(max(filter(path.endswith, SUFFIXES), key=len, default=""))
