"""From records to prompts: templates, and the few-shot examples before a question."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation.reading import EvaluationRecord, read_records
from grit_jax.evaluation.task import Session, Task, undersample

_FIELD = re.compile(r"\{(\w+)\}")


def fill(template: str, record: EvaluationRecord, more: Mapping[str, str] | None = None) -> str:
    """The template with each `{key}` replaced by its value in `more` or the record; other braces stay as they are.

    Raises:
      InputError: The record lacks the key, or its value is neither text nor number.
    """
    more = more or {}

    def value(match: re.Match[str]) -> str:
        return more[match[1]] if match[1] in more else str(record.get(match[1], str, int, float))

    return _FIELD.sub(value, template)


class Prompts(NamedTuple):
    """The prompts of some records: users' messages.

    Attributes:
      messages: One for each record.
      shots: int [records]; few-shot examples in each.
    """

    messages: list[str]
    shots: np.ndarray


@dataclasses.dataclass(frozen=True)
class PromptedTask(Task):
    """A task whose records become prompts.

    Attributes:
      instruction: First paragraph of every prompt; `{key}` is the record's value.
      template: The question; `{key}` is the record's value.
      prefix: How the model's answer begins.
      limit: Records to draw from each group, by the suite's seed; null for all.
      group: Key that names a record's group; null for a single group.
      shots: Number of examples before each question: the first ones in `shots_path`, of the record's group if there are
        groups; null for all. A prompt that is too long for the model loses its last examples.
      shots_path: File with examples for every group. A record used as an example is not a question.
    """

    instruction: str = ""
    template: str = "{question}"
    prefix: str = ""
    limit: int | None = None
    group: str | None = None
    shots: int | None = None
    shots_path: str | None = None

    def __post_init__(self):
        for key in ("limit", "shots"):
            require_positive(key, getattr(self, key), "leave it out for all records")
        if self.shots and not self.shots_path:
            raise InputError(f"shots={self.shots} needs shots_path, a file with examples")

    @abc.abstractmethod
    def questions(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """The records as questions."""

    @abc.abstractmethod
    def examples(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """Records of `shots_path` as few-shot examples: question and answer."""

    def files(self) -> list[Path]:
        """The records and the few-shot examples."""
        return [Path(path) for path in (self.path, self.shots_path) if path]

    def group_of(self, record: EvaluationRecord) -> str:
        """The record's group; empty where there is one group."""
        return record.get(self.group) if self.group else ""

    def selected(self, session: Session) -> list[EvaluationRecord]:
        """The records to evaluate, in the order of the file.

        Raises:
          InputError: All records are few-shot examples.
        """
        records = read_records(Path(self.path))
        if self.shots_path == self.path:
            examples = {record.where for group in self._example_records().values() for record in group}
            records = [record for record in records if record.where not in examples]
            if not records:
                raise InputError(f"{self.path}: every record is an example; lower shots")
        if self.limit is None:
            return records
        groups = [self.group_of(record) for record in records]
        return [records[i] for i in sorted(undersample(groups, self.limit, session.generator()))]

    def prompts(self, records: Sequence[EvaluationRecord], session: Session, *, room: int) -> Prompts:
        """The prompt of each record, with as many few-shot examples as leave `room` tokens for the answer.

        Raises:
          InputError: `shots_path` has no examples of some group.
        """
        by_group = self.examples_by_group()
        if self.shots_path and (bare := {self.group_of(record) for record in records} - by_group.keys()):
            raise InputError(
                f"{self.shots_path}: has no examples of {self.group} {', '.join(sorted(bare))[:200]}; add them, or "
                "leave shots_path out"
            )
        heads = [[fill(self.instruction, record)] if self.instruction else [] for record in records]
        parts = [
            [*head, *by_group.get(self.group_of(record), []), question]
            for head, record, question in zip(heads, records, self.questions(records), strict=True)
        ]
        limit = session.model.architecture.max_length - room
        messages = ["\n\n".join(part) for part in parts]
        shots = np.array([len(part) - len(head) - 1 for part, head in zip(parts, heads, strict=True)])
        lengths = session.model.prompt_lengths(messages, prefix=self.prefix)
        while over := np.flatnonzero((lengths > limit) & (shots > 0)).tolist():
            for i in over:
                shots[i] -= 1
                del parts[i][-2]
                messages[i] = "\n\n".join(parts[i])
            lengths[over] = session.model.prompt_lengths([messages[i] for i in over], prefix=self.prefix)
        return Prompts(messages, shots)

    def common_scores(
        self, records: Sequence[EvaluationRecord], prompts: Prompts, hits: np.ndarray
    ) -> dict[str, float]:
        """Scores that all these tasks report: mean number of few-shot examples, and the mean of the groups' means."""
        scores = {"mean_shots": float(np.mean(prompts.shots))} if self.shots_path else {}
        if self.group:
            group = np.unique([self.group_of(record) for record in records], return_inverse=True)[1]
            scores["mean_over_groups"] = float(np.mean(np.bincount(group, hits) / np.bincount(group)))
        return scores

    def examples_by_group(self) -> dict[str, list[str]]:
        """The few-shot examples of each group."""
        return {group: self.examples(records) for group, records in self._example_records().items()}

    def _example_records(self) -> dict[str, list[EvaluationRecord]]:
        by_group: dict[str, list[EvaluationRecord]] = {}
        for record in read_records(Path(self.shots_path)) if self.shots_path else ():
            group = by_group.setdefault(self.group_of(record), [])
            if self.shots is None or len(group) < self.shots:
                group.append(record)
        return by_group
