"""A stream on the host: which texts it takes from a record, and how samples become rows of a batch."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from grit_jax.data.batch import max_segments
from grit_jax.data.packing import FilledRows, Packing, pack
from grit_jax.data.records import Record
from grit_jax.text.prompts import Prompt
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grit_jax.data.usable import StreamFiles


class Samples(NamedTuple):
    """A sequence of records: file numbers, and indices of records in the files; int [samples] each."""

    file: np.ndarray
    record: np.ndarray


class RowPlan(NamedTuple):
    """The texts of a stream's batch and their rows.

    Attributes:
      num_rows: Rows of the batch, rounded up to a bucket.
      file: int32 [texts]; number of the file.
      record: int32 [texts]; index of the record in the file.
      text: int32 [texts]; index of the text in the record.
      length: int32 [texts]; tokens kept.
      row: int32 [texts].
      offset: int32 [texts].
      segment: int32 [texts], from 1.
    """

    num_rows: int
    file: np.ndarray
    record: np.ndarray
    text: np.ndarray
    length: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray


class Role(NamedTuple):
    """A role that texts have in their records, for display.

    Attributes:
      name: Its name, such as `query`.
      mine: bool [texts]; which texts have this role.
      limit: Most tokens of such a text.
    """

    name: str
    mine: np.ndarray
    limit: int


class PlannedRows(NamedTuple):
    """A host's rows of a stream, and the texts in them.

    Attributes:
      rows: The filled rows.
      texts: int64 [texts]; their indices in the plan.
      lengths: int64 [texts]; tokens of each.
      spans: int32 [spans, 2]; of the texts in order, before cutting.
      num_spans: int64 [texts].
    """

    rows: FilledRows
    texts: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    num_spans: np.ndarray


# Gives each of some texts a number; a record's positive and negatives are the usable ones with the smallest numbers.
Ranks = Callable[[int], np.ndarray]


class Stream(abc.ABC):
    """The host's side of one stream of a step.

    Attributes:
      name: Its name in batches, plans and metrics.
      record: The type of records that it trains on.
      no_room: The reason for dropping a record whose targets the limits cut off.
      one_file: Whether a batch comes from one file where that is possible; else all files are mixed.
      first_target: Position of the first token of a text that can be pooled or scored.
      batch_size: Samples of a batch.
      row_length: Tokens of a row.
      num_chunks: Chunks in which a device's rows go through the model; it divides their number.
      packing: Whether a row may hold several texts.
      limits_by_key: Most tokens of a text, by config key.
    """

    name: ClassVar[str]
    record: ClassVar[type[Record]]
    no_room: ClassVar[str]
    one_file: ClassVar[bool] = False
    first_target: ClassVar[int] = 0
    batch_size: int
    row_length: int
    num_chunks: int = 1
    packing: bool = True
    limits_by_key: Mapping[str, int]

    @property
    def code(self) -> int:
        """A seed for its random numbers, from its name, so that no stream changes another's batches."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=6).digest())

    def packed(self, lengths: np.ndarray) -> Packing:
        """The rows of texts of these lengths, int [texts]."""
        most = max_segments(self.row_length) if self.packing else 1
        return pack(lengths, row_length=self.row_length, max_segments=most)

    @abc.abstractmethod
    def prompts(self, record: Any, tokenizer: Tokenizer) -> list[Prompt]:
        """The texts of a record in the model's format."""

    def num_positives(self, record: Any) -> int:
        """Number of a record's positives, which follow its first text."""
        return 0

    @abc.abstractmethod
    def limits(self, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: most tokens of texts with these indices in their records."""

    @abc.abstractmethod
    def roles(self, text: np.ndarray, positives: np.ndarray) -> list[Role]:
        """The roles of texts, given their indices in their records and these records' positives, int [texts] each."""

    def usable(self, ok: np.ndarray, first: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """Which records can be trained on: bool [records].

        Args:
          ok: bool [texts]; which texts have a token that is pooled or scored.
          first: int [records]; index of each record's first text.
          positives: int [records]; positives of each record.
        """
        return ok[first]

    @abc.abstractmethod
    def plan(self, files: StreamFiles, samples: Samples, ranks: Ranks, *, summed: bool) -> Any:
        """The plan of a batch of these samples: a named tuple whose `rows` is a `RowPlan`.

        Args:
          files: The stream's files.
          samples: At most `batch_size`.
          ranks: Chooses among the texts of a record.
          summed: Whether every loss weighs 1, as in evaluation, where callers divide sums by sums of weights; otherwise
            training's weights apply.
        """

    @abc.abstractmethod
    def fill(self, plan: Any, planned: PlannedRows) -> Any:
        """The batch of a plan, given a host's rows: a named tuple as in `grit_jax.data.batch`."""

    @abc.abstractmethod
    def full_step(self) -> np.ndarray:
        """Int [texts]: tokens of a step's texts if all reach their limits."""

    @abc.abstractmethod
    def empty(self, num_rows: int) -> Any:
        """A batch of zeros that takes no memory, for its shapes and dtypes."""
