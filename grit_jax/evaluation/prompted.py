"""From rows to prompts: templates, the examples before a question, and answers that are compared."""

from __future__ import annotations

import abc
import dataclasses
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.data.text_files import read_text
from grit_jax.errors import InputError
from grit_jax.evaluation.data import Row, read_rows
from grit_jax.evaluation.task import Session, Task

_FIELD = re.compile(r"\{(\w+)\}")
_LETTERS = string.ascii_uppercase
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_RULE = "-----\n"  # below the head of a file of examples

Comparison = Literal["number", "text", "span"]


def fill(template: str, row: Row, more: Mapping[str, str] | None = None) -> str:
    """The template with each `{key}` replaced by the value in `more` or of the row; other braces stay as they are.

    Raises:
      InputError: The row has no such key, or no text or number there.
    """
    more = more or {}

    def value(match: re.Match[str]) -> str:
        return more[match[1]] if match[1] in more else str(row.get(match[1], str, int, float))

    return _FIELD.sub(value, template)


def lettered(choices: Sequence[str]) -> str:
    """Lines `A. first`, `B. second` and so on."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))


def letters_of(row: Row) -> str:
    """The letters of a row's `choices`.

    Raises:
      InputError: There are too few, or more than letters.
    """
    number = len(row.strings("choices"))
    if not 2 <= number <= len(_LETTERS):
        raise InputError(f"{row.where}: 'choices' has {number} entries; there must be 2 to {len(_LETTERS)}")
    return _LETTERS[:number]


def letter_of(row: Row) -> str:
    """The letter of the right choice, which a row has as `answer`: a letter, or a number from 0.

    Raises:
      InputError: It is no choice.
    """
    answer, letters = row.get("answer", str, int), letters_of(row)
    if isinstance(answer, int) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise InputError(f"{row.where}: 'answer' is {answer!r:.60}; it must be one of {', '.join(letters)}, or its number")


class Prompts(NamedTuple):
    """Users' messages.

    Attributes:
      messages: One for each row.
      shots: int [rows]; examples that each holds.
    """

    messages: list[str]
    shots: np.ndarray


@dataclasses.dataclass(frozen=True)
class PromptedTask(Task):
    """A task whose rows become prompts.

    Attributes:
      instruction: What every prompt begins with, as a paragraph of its own; `{key}` is the row's value.
      template: The question; `{key}` is the row's value.
      prefix: What the model's answer begins with.
      limit: Rows that are asked, drawn by the suite's seed, of each group; null for all.
      group: Key of the rows that names their group; null for one group.
      shots: Examples before each question, the first of `shots_path`, of the row's group where there are groups; null
        for all of them. Where a prompt is too long for the model, its last examples are left out.
      shots_path: File with examples, some for every group that is asked. A row that is an example is not asked.
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
            require_positive(key, getattr(self, key), "leave it out for all rows")
        if self.shots and not self.shots_path:
            raise InputError(f"shots={self.shots} needs shots_path, a file with examples")

    @abc.abstractmethod
    def questions(self, rows: Sequence[Row]) -> list[str]:
        """The rows as questions."""

    @abc.abstractmethod
    def examples(self, rows: Sequence[Row]) -> list[str]:
        """Rows of `shots_path` as examples: question and answer."""

    def files(self) -> list[Path]:
        """The rows and the examples."""
        return [Path(path) for path in (self.path, self.shots_path) if path]

    def group_of(self, row: Row) -> str:
        """The row's group; empty where there is one group."""
        return row.get(self.group) if self.group else ""

    def asked(self, session: Session) -> list[Row]:
        """The rows that are asked, in the order of the file.

        Raises:
          InputError: All rows are examples.
        """
        rows = read_rows(Path(self.path))
        if self.shots_path == self.path:
            examples = {row.where for some in self._example_rows().values() for row in some}
            rows = [row for row in rows if row.where not in examples]
            if not rows:
                raise InputError(f"{self.path}: every row is an example; lower shots")
        if self.limit is None:
            return rows
        drawn, taken = Counter[str](), []
        for place in session.generator().permutation(len(rows)).tolist():
            group = self.group_of(rows[place])
            drawn[group] += 1
            if drawn[group] <= self.limit:
                taken.append(place)
        return [rows[place] for place in sorted(taken)]

    def prompts(self, rows: Sequence[Row], session: Session, *, room: int) -> Prompts:
        """The prompt of each row, with as many examples as leave `room` tokens for the answer.

        Raises:
          InputError: A group has no examples where there are some.
        """
        by_group = self.examples_by_group()
        if self.shots_path and (bare := {self.group_of(row) for row in rows} - by_group.keys()):
            raise InputError(
                f"{self.shots_path}: has no examples of {self.group} {', '.join(sorted(bare))[:200]}; add them, or "
                "leave shots_path out"
            )
        heads = [[fill(self.instruction, row)] if self.instruction else [] for row in rows]
        parts = [
            [*head, *by_group.get(self.group_of(row), []), question]
            for head, row, question in zip(heads, rows, self.questions(rows), strict=True)
        ]
        limit = session.model.architecture.max_length - room
        messages = ["\n\n".join(part) for part in parts]
        shots = np.array([len(part) - len(head) - 1 for part, head in zip(parts, heads, strict=True)])
        lengths = session.model.prompt_lengths(messages, prefix=self.prefix)
        while over := np.flatnonzero((lengths > limit) & (shots > 0)).tolist():
            for place in over:
                shots[place] -= 1
                del parts[place][-2]
                messages[place] = "\n\n".join(parts[place])
            lengths[over] = session.model.prompt_lengths([messages[place] for place in over], prefix=self.prefix)
        return Prompts(messages, shots)

    def figures(self, rows: Sequence[Row], prompts: Prompts, hits: np.ndarray) -> dict[str, float]:
        """What such tasks report beside their score: examples shown, and the mean of the groups' means."""
        figures = {"mean_shots": float(np.mean(prompts.shots))} if self.shots_path else {}
        if self.group:
            numbers = np.unique([self.group_of(row) for row in rows], return_inverse=True)[1]
            figures["mean_over_groups"] = float(np.mean(np.bincount(numbers, hits) / np.bincount(numbers)))
        return figures

    def examples_by_group(self) -> dict[str, list[str]]:
        """The examples that questions of each group begin with."""
        return {group: self.examples(rows) for group, rows in self._example_rows().items()}

    def _example_rows(self) -> dict[str, list[Row]]:
        chosen: dict[str, list[Row]] = {}
        for row in read_rows(Path(self.shots_path)) if self.shots_path else ():
            of_group = chosen.setdefault(self.group_of(row), [])
            if self.shots is None or len(of_group) < self.shots:
                of_group.append(row)
        return chosen


def written_examples(path: Path) -> list[str]:
    """Paragraphs of examples that are written out in a text file; a head above a line `-----` is left out.

    Raises:
      InputError: The file cannot be read, or is not UTF-8.
    """
    text = read_text(path)
    return text.partition(_RULE)[2].strip().split("\n\n") if _RULE in text else text.strip().split("\n\n")


def is_right(answer: str, targets: Sequence[str], comparison: Comparison) -> bool:
    """Whether an answer agrees with one of the targets.

    `number` compares the last number of the answer, `text` what follows its last "answer is" up to the end of the line
    (the first line without that), and `span` the first line, without case, punctuation and articles. An answer without
    any of it is wrong.
    """
    given = extracted(answer, comparison)
    return given not in (None, "") and any(given == extracted(target, comparison) for target in targets)


def contains(answer: str, targets: Sequence[str]) -> bool:
    """Whether one of the targets is in an answer, word by word and compared as a `span`: the `match` of RAG.

    All lines of the answer count.
    """
    given, *wanted = (" ".join(_words(" ".join(text.split()))) for text in (answer, *targets))
    return any(target and f" {target} " in f" {given} " for target in wanted)


def extracted(answer: str, comparison: Comparison) -> Any:
    """What is compared; see `is_right`."""
    match comparison:
        case "number":
            numbers = _NUMBER.findall(answer)
            return float(numbers[-1].replace(",", "")) if numbers else None
        case "text":
            return answer.rpartition("answer is")[2].strip().split("\n")[0].strip().removesuffix(".").strip()
        case "span":
            return " ".join(_words(answer))


def f1(answer: str, targets: Sequence[str]) -> float:
    """Overlap of words with the best target: SQuAD's F1 (Rajpurkar et al., arXiv 1606.05250)."""
    return max(_f1(_words(answer), _words(target)) for target in targets)


def _f1(given: list[str], target: list[str]) -> float:
    shared = sum((Counter(given) & Counter(target)).values())
    return 2 * shared / (len(given) + len(target)) if shared else 0.0


def _words(text: str) -> list[str]:
    first = text.strip().split("\n")[0].lower()
    kept = "".join(character for character in first if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()
