"""What a stream is on the host: which texts it takes from a record, and how samples become rows of a batch."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from grit_jax.data.packing import FilledRows
from grit_jax.data.records import Record
from grit_jax.text.prompts import Prompt
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grit_jax.data.usable import StreamFiles


class Samples(NamedTuple):
    """Records in an order: file and record numbers, int [samples] each."""

    file: np.ndarray
    record: np.ndarray


class RowPlan(NamedTuple):
    """Where each text of a stream goes.

    Attributes:
      num_rows: Rows of the batch, rounded up to a bucket.
      file: int32 [texts]; number of the file.
      record: int32 [texts]; number of the record in the file.
      text: int32 [texts]; number of the text in the record.
      length: int32 [texts]; tokens that are kept.
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


class Plan(Protocol):
    """A stream's part of a step: a named tuple of where its texts are and of what else its batch is made from."""

    @property
    def rows(self) -> RowPlan:
        """Where its texts are."""
        ...

    def _replace(self, *, rows: RowPlan) -> Plan: ...


class Role(NamedTuple):
    """What texts are in their records, for people.

    Attributes:
      name: Of the role, such as query.
      mine: bool [texts]; which texts have it.
      limit: Most tokens of one.
    """

    name: str
    mine: np.ndarray
    limit: int


class PlannedRows(NamedTuple):
    """A host's rows of a stream, and the texts in them.

    Attributes:
      rows: With the texts in place.
      texts: int64 [texts]; their numbers in the plan.
      lengths: int64 [texts]; tokens of each.
      spans: int32 [spans, 2]; of the texts, one after the other, as they are without a cut.
      num_spans: int64 [texts].
    """

    rows: FilledRows
    texts: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    num_spans: np.ndarray


# For each text of some records a number; of a record's usable positives the one with the smallest is taken, and of its
# negatives those with the smallest ones.
Ranks = Callable[[int], np.ndarray]


class Stream(abc.ABC):
    """The host's side of one stream of a step.

    Attributes:
      name: Its name in batches, plans and metrics.
      record: Kind of the records that it is trained on.
      no_room: Why a record is dropped of which the limits leave nothing.
      one_file: Whether a batch is taken from one file where that is possible; else all files are mixed.
      first_target: Place of the first token of a text that can be pooled or scored.
      batch_size: Samples of a batch.
      row_length: Tokens of a row.
      num_chunks: Pieces in which rows go through the model: the rows of a device are a multiple of it.
      packing: Whether a row may hold several texts.
      limits_by_key: Most tokens of its texts, by the config keys that say so.
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
        """What its random numbers are drawn by: of its name, so that no stream changes the batches of another."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=6).digest())

    @abc.abstractmethod
    def prompts(self, record: Any, tokenizer: Tokenizer) -> list[Prompt]:
        """The texts of a record as the model reads them."""

    def num_positives(self, record: Any) -> int:
        """How many texts after the first are positives."""
        return 0

    @abc.abstractmethod
    def limits(self, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: most tokens of texts with these numbers in their records."""

    @abc.abstractmethod
    def roles(self, text: np.ndarray, positives: np.ndarray) -> list[Role]:
        """The roles of texts with these numbers in records with so many positives, int [texts] each."""

    def usable(self, ok: np.ndarray, first: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """Which records can be trained on: bool [records].

        Args:
          ok: bool [texts]; which texts have a token that is pooled or scored.
          first: int [records]; number of each record's first text.
          positives: int [records]; positives of each record.
        """
        return ok[first]

    @abc.abstractmethod
    def plan(self, files: StreamFiles, samples: Samples, ranks: Ranks, *, summed: bool) -> Any:
        """The `Plan` of a batch of these samples.

        Args:
          files: The stream's files.
          samples: At most `batch_size`.
          ranks: What is taken of records that offer a choice.
          summed: Whether every loss weighs 1, as in evaluation, where callers divide sums by sums of weights; else the
            weights are those of training.
        """

    @abc.abstractmethod
    def fill(self, plan: Any, planned: PlannedRows) -> Any:
        """The batch of a plan, given its rows, or those of one host: a named tuple as in `grit_jax.data.batch`."""

    @abc.abstractmethod
    def full_step(self) -> np.ndarray:
        """Tokens of each text of a step whose texts all reach their limits: int [texts]."""

    @abc.abstractmethod
    def empty(self, num_rows: int) -> Any:
        """A batch of zeros that takes no memory, for its shapes and types."""
