"""Tasks whose answers are written: compared with the right one, or kept for an outside judge."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation.data import Row, read_rows
from grit_jax.evaluation.prompted import Comparison, PromptedTask, f1, fill, is_right, written_examples
from grit_jax.evaluation.retrieval import read_corpus
from grit_jax.evaluation.task import Outcome, Session, Task


@dataclasses.dataclass(frozen=True)
class ExactMatch(PromptedTask):
    """Whether the written answer is right.

    `path` is a .jsonl file. `shots_path` is another, or a folder of text files named after the groups, with the
    examples written out. An answer that does not fit the model is wrong, and counted.

    Attributes:
      answer_key: Key of the right answer, a text or a list of texts.
      example_key: Key of what an example answers, such as a chain of thought; null for `answer_key`. Examples of the
        form `{"text": [user, assistant]}` are taken as they are.
      passages: Corpus in BEIR layout whose document `doc` of each row is `{passage}` in the template; null for none.
      compare: What is compared: the last `number`, the `text` after "answer is", or a `span` as SQuAD does.
      max_new_tokens: Most tokens of an answer.
      stop: An answer ends before the first of these.
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
                f"shots_path={self.shots_path} is a folder with the examples of each group: give group, the rows' "
                "key of it, and leave shots out, as all examples are shown"
            )

    @property
    def _shots_folder(self) -> Path | None:
        """The folder of written examples, if there is one."""
        return Path(self.shots_path) if self.shots_path and Path(self.shots_path).is_dir() else None

    def files(self) -> list[Path]:
        """Rows, examples and passages."""
        given = [*super().files(), *([Path(self.passages)] if self.passages else [])]
        return [file for path in given for file in (_text_files(path) if path.is_dir() else [path])]

    def questions(self, rows: Sequence[Row]) -> list[str]:
        """The filled template."""
        if not self.passages:
            return [fill(self.template, row) for row in rows]
        corpus = read_corpus(Path(self.passages))
        for row in rows:
            if row.get("doc") not in corpus:
                raise InputError(f"{row.where}: 'doc' {row.get('doc')!r} is not in {self.passages}; correct either")
        return [fill(self.template, row, {"passage": corpus[row.get("doc")]}) for row in rows]

    def examples(self, rows: Sequence[Row]) -> list[str]:
        """Questions with their answers."""
        if "text" in rows[0].values:
            return ["\n".join(row.strings("text")) for row in rows]
        shown = [self._texts(row, self.example_key or self.answer_key)[0] for row in rows]
        answers = [f"{self.prefix} {text}" if self.prefix else text for text in shown]
        return [f"{question}\n{answer}" for question, answer in zip(self.questions(rows), answers, strict=True)]

    def examples_by_group(self) -> dict[str, list[str]]:
        """The examples, also those written out in a folder."""
        if not self._shots_folder:
            return super().examples_by_group()
        return {file.stem: written_examples(file) for file in _text_files(self._shots_folder)}

    def evaluate(self, session: Session) -> Outcome:
        """Asks every row."""
        rows = self.asked(session)
        targets = [self._texts(row, self.answer_key) for row in rows]
        prompts = self.prompts(rows, session, room=self.max_new_tokens)
        prefixes = [self.prefix] * len(rows)
        written = session.answers(
            prompts.messages, prefixes=prefixes, max_new_tokens=self.max_new_tokens, stop=self.stop
        )
        right = [
            answer is not None and is_right(answer, target, self.compare)
            for answer, target in zip(written, targets, strict=True)
        ]
        hits = np.array(right, float)
        figures = {
            "num_too_long": float(sum(answer is None for answer in written)),
            "chance": self._chance(rows, targets),
        }
        if self.compare == "span":
            overlaps = [f1(answer or "", target) for answer, target in zip(written, targets, strict=True)]
            figures["f1"] = float(np.mean(overlaps))
        answers = [
            {"prompt": message, "answer": answer, "targets": target, "right": hit}
            for message, answer, target, hit in zip(prompts.messages, written, targets, right, strict=True)
        ]
        return Outcome("exact_match", hits, figures=figures | self.figures(rows, prompts, hits), answers=answers)

    def _chance(self, rows: Sequence[Row], targets: Sequence[list[str]]) -> float:
        """What who gives each group's most frequent first answer every time gets right."""
        frequencies: dict[str, Counter[str]] = {}
        for row, texts in zip(rows, targets, strict=True):
            frequencies.setdefault(self.group_of(row), Counter())[texts[0]] += 1
        return sum(max(counted.values()) for counted in frequencies.values()) / len(rows)

    def _texts(self, row: Row, key: str) -> list[str]:
        return row.strings(key) if isinstance(row.values.get(key), list) else [str(row.get(key, str, int, float))]


def _text_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.txt")) if not file.name.startswith(".")]


@dataclasses.dataclass(frozen=True)
class AlpacaEval(Task):
    """Answers in AlpacaEval's format, for its judge; there is no score.

    `path` is its .json file or a .jsonl file, with `instruction` and perhaps `dataset`.

    Attributes:
      generator: What the answers' file calls the model.
      max_new_tokens: Most tokens of an answer.
    """

    generator: str = "grit_jax"
    max_new_tokens: int = 512

    def __post_init__(self):
        require_positive("max_new_tokens", self.max_new_tokens)

    def evaluate(self, session: Session) -> Outcome:
        """Answers every instruction; one that does not fit the model is answered with nothing."""
        rows = read_rows(Path(self.path))
        instructions = [row.get("instruction") for row in rows]
        written = session.answers(instructions, max_new_tokens=self.max_new_tokens)
        answers = [
            {
                "dataset": row.values.get("dataset", "alpaca_eval"),
                "instruction": instruction,
                "output": answer or "",
                "generator": self.generator,
            }
            for row, instruction, answer in zip(rows, instructions, written, strict=True)
        ]
        num_too_long = float(sum(answer is None for answer in written))
        return Outcome(None, np.zeros(0), figures={"num_too_long": num_too_long}, answers=answers)
