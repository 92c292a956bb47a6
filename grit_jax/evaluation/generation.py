"""Tasks of completions, which are compared with targets or kept for an outside judge."""

from __future__ import annotations

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.data.text_files import read_text
from grit_jax.errors import InputError
from grit_jax.evaluation.prompted import PromptedTask, fill
from grit_jax.evaluation.reading import EvaluationRecord, read_records
from grit_jax.evaluation.retrieval import texts_by_id
from grit_jax.evaluation.task import Outcome, Session, Task

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_RULE = "-----\n"  # ends the head of a file of few-shot examples

Comparison = Literal["number", "text", "span"]


@dataclasses.dataclass(frozen=True)
class ExactMatch(PromptedTask):
    """Share of completions that match their target.

    `path` is a .jsonl file. `shots_path` is another, or a folder of text files, named after the groups, with their
    examples written out. A completion that exceeds the model's length is wrong, and counted.

    Attributes:
      answer_key: Key of the target, a text or a list of texts.
      example_key: Key of the answer in a few-shot example, such as a chain of thought; null for `answer_key`. Examples
        of the form `{"text": [user, assistant]}` are taken as they are.
      passages: Corpus in BEIR layout whose document `doc` of each record is `{passage}` in the template; null for none.
      compare: What to compare: the last `number`, the `text` after "answer is", or a `span` as SQuAD does.
      max_new_tokens: Most tokens of a completion.
      stop: A completion ends before the first of these.
    """

    answer_key: str = "answer"
    example_key: str | None = None
    passages: str | None = None
    compare: Comparison = "text"
    max_new_tokens: int = 256
    stop: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        require_positive("max_new_tokens", self.max_new_tokens)
        if self._shots_folder and (self.shots or not self.group):
            raise InputError(
                f"shots_path={self.shots_path} is a folder with the examples of each group: give group, the records' "
                "key of it, and leave shots out, as all examples are shown"
            )

    @property
    def _shots_folder(self) -> Path | None:
        """The folder of written examples, if `shots_path` is one."""
        return Path(self.shots_path) if self.shots_path and Path(self.shots_path).is_dir() else None

    def files(self) -> list[Path]:
        """Records, few-shot examples and passages."""
        given = [*super().files(), *([Path(self.passages)] if self.passages else [])]
        return [file for path in given for file in (_text_files(path) if path.is_dir() else [path])]

    def questions(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """The filled template of each record."""
        if not self.passages:
            return [fill(self.template, record) for record in records]
        corpus = texts_by_id(Path(self.passages))
        for record in records:
            if record.get("doc") not in corpus:
                raise InputError(
                    f"{record.where}: 'doc' {record.get('doc')!r} is not in {self.passages}; correct either"
                )
        return [fill(self.template, record, {"passage": corpus[record.get("doc")]}) for record in records]

    def examples(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """Question and answer of each record, or its text in the format of GRIT."""
        if "text" in records[0].values:
            return ["\n".join(record.strings("text")) for record in records]
        shown = [self._texts(record, self.example_key or self.answer_key)[0] for record in records]
        answers = [f"{self.prefix} {text}" if self.prefix else text for text in shown]
        return [f"{question}\n{answer}" for question, answer in zip(self.questions(records), answers, strict=True)]

    def examples_by_group(self) -> dict[str, list[str]]:
        """The few-shot examples of each group, including those of a folder."""
        if not self._shots_folder:
            return super().examples_by_group()
        return {file.stem: written_examples(file) for file in _text_files(self._shots_folder)}

    def evaluate(self, session: Session) -> Outcome:
        """Completes every prompt."""
        records = self.selected(session)
        targets = [self._texts(record, self.answer_key) for record in records]
        prompts = self.prompts(records, session, room=self.max_new_tokens)
        written = session.completions(
            prompts.messages, prefixes=[self.prefix] * len(records), max_new_tokens=self.max_new_tokens, stop=self.stop
        )
        right = [
            completion is not None and is_right(completion, target, self.compare)
            for completion, target in zip(written, targets, strict=True)
        ]
        hits = np.array(right, float)
        scores = {"num_too_long": float(written.count(None)), "chance": self._chance(records, targets)}
        if self.compare == "span":
            overlaps = [f1(completion or "", target) for completion, target in zip(written, targets, strict=True)]
            scores["f1"] = float(np.mean(overlaps))
        completions = [
            {"prompt": message, "answer": completion, "targets": target, "right": hit}
            for message, completion, target, hit in zip(prompts.messages, written, targets, right, strict=True)
        ]
        scores |= self.common_scores(records, prompts, hits)
        return Outcome("exact_match", hits, scores=scores, completions=completions)

    def _chance(self, records: Sequence[EvaluationRecord], targets: Sequence[list[str]]) -> float:
        """The score of always giving each group's most frequent first target."""
        frequencies: dict[str, Counter[str]] = {}
        for record, texts in zip(records, targets, strict=True):
            frequencies.setdefault(self.group_of(record), Counter())[texts[0]] += 1
        return sum(max(counts.values()) for counts in frequencies.values()) / len(records)

    def _texts(self, record: EvaluationRecord, key: str) -> list[str]:
        return record.one_or_more(key, str, int, float)


def _text_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.txt")) if not file.name.startswith(".")]


def written_examples(path: Path) -> list[str]:
    """The few-shot examples of a text file, one per paragraph, without a head above a line `-----`.

    Raises:
      InputError: The file cannot be read, or is not UTF-8.
    """
    text = read_text(path)
    return (text.partition(_RULE)[2] if _RULE in text else text).strip().split("\n\n")


@dataclasses.dataclass(frozen=True)
class AlpacaEval(Task):
    """Completions in AlpacaEval's format, for its judge; gives no score.

    `path` is its .json file or a .jsonl file, with `instruction` and optionally `dataset`.

    Attributes:
      generator: Name of the model in the file of completions.
      max_new_tokens: Most tokens of a completion.
    """

    generator: str = "grit_jax"
    max_new_tokens: int = 512

    def __post_init__(self):
        require_positive("max_new_tokens", self.max_new_tokens)

    def evaluate(self, session: Session) -> Outcome:
        """Completes every instruction; a completion that exceeds the model's length is empty."""
        records = read_records(Path(self.path))
        instructions = [record.get("instruction") for record in records]
        written = session.completions(instructions, max_new_tokens=self.max_new_tokens)
        completions = [
            {
                "dataset": record.values.get("dataset", "alpaca_eval"),
                "instruction": instruction,
                "output": completion or "",
                "generator": self.generator,
            }
            for record, instruction, completion in zip(records, instructions, written, strict=True)
        ]
        num_too_long = float(written.count(None))
        return Outcome(None, np.zeros(0), scores={"num_too_long": num_too_long}, completions=completions)


def is_right(completion: str, targets: Sequence[str], comparison: Comparison) -> bool:
    """Whether a completion agrees with one of the targets.

    `number` compares the last number; `text` the rest of the line after the last "answer is", or the first line without
    it; `span` the first line, without case, punctuation and articles. A completion without that part is wrong.
    """
    given = extracted(completion, comparison)
    return given not in (None, "") and any(given == extracted(target, comparison) for target in targets)


def contains(completion: str, targets: Sequence[str]) -> bool:
    """Whether any line of a completion contains one of the targets, compared by words as a `span`: RAG's `match`."""
    given, *wanted = (" ".join(_words(" ".join(text.split()))) for text in (completion, *targets))
    return any(target and f" {target} " in f" {given} " for target in wanted)


def extracted(text: str, comparison: Comparison) -> Any:
    """The part of a text to compare; see `is_right`."""
    match comparison:
        case "number":
            numbers = _NUMBER.findall(text)
            return float(numbers[-1].replace(",", "")) if numbers else None
        case "text":
            return text.rpartition("answer is")[2].strip().split("\n")[0].strip().removesuffix(".").strip()
        case "span":
            return " ".join(_words(text))


def f1(completion: str, targets: Sequence[str]) -> float:
    """Overlap of words with the best target: SQuAD's F1 (Rajpurkar et al., arXiv 1606.05250)."""
    return max(_f1(_words(completion), _words(target)) for target in targets)


def _f1(given: list[str], target: list[str]) -> float:
    shared = sum((Counter(given) & Counter(target)).values())
    return 2 * shared / (len(given) + len(target)) if shared else 0.0


def _words(text: str) -> list[str]:
    first = text.strip().split("\n")[0].lower()
    kept = "".join(character for character in first if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()
