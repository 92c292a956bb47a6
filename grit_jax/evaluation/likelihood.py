"""Tasks that ask how likely the model finds a text: multiple choice and perplexity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.data.records import GenerativeRecord
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams.generative import GenerativeStream
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.evaluation.data import Row, by_row, existing
from grit_jax.evaluation.prompted import PromptedTask, fill, letter_of, lettered, letters_of
from grit_jax.evaluation.task import Outcome, Session, Task
from grit_jax.text.prompts import TokenizedPrompt

_LETTER_TOKENS = 2  # of a letter with the space before it, where a tokenizer has both apart


@dataclasses.dataclass(frozen=True)
class MultipleChoice(PromptedTask):
    """The choice whose letter is likeliest: accuracy.

    `path` is a .jsonl file with `question`, `choices` and `answer`, a letter or a number from 0; `shots_path` another.
    In the template `{choices}` are the lettered choices. Contexts that are too long lose their beginning.
    """

    template: str = "{question}\n{choices}\nAnswer:"
    prefix: str = "The answer is"

    def questions(self, rows: Sequence[Row]) -> list[str]:
        """Questions with their choices."""
        return [fill(self.template, row, {"choices": lettered(row.strings("choices"))}) for row in rows]

    def examples(self, rows: Sequence[Row]) -> list[str]:
        """Questions with the right letter."""
        return [f"{question} {letter_of(row)}" for question, row in zip(self.questions(rows), rows, strict=True)]

    def evaluate(self, session: Session) -> Outcome:
        """Scores every letter after every question."""
        rows = self.asked(session)
        letters, prompts = [letters_of(row) for row in rows], self.prompts(rows, session, room=_LETTER_TOKENS)
        pairs = [(message, f" {letter}") for message, some in zip(prompts.messages, letters, strict=True)
                 for letter in some]  # fmt: skip
        scored = session.log_likelihoods(*map(list, zip(*pairs, strict=True)), prefix=self.prefix)
        values_of_rows = by_row(scored.values, letters)
        chosen = [some[int(np.argmax(values))] for some, values in zip(letters, values_of_rows, strict=True)]
        hits = np.array([letter == letter_of(row) for letter, row in zip(chosen, rows, strict=True)], float)
        figures = {
            "chance": float(np.mean([1 / len(some) for some in letters])),
            "num_truncated": float(scored.num_truncated),
        }
        return Outcome("accuracy", hits, figures=figures | self.figures(rows, prompts, hits))


@dataclasses.dataclass(frozen=True)
class Perplexity(Task):
    """Loss per scored token of GRIT generative records, in nats: what the assistant says, or all of a plain text.

    `path` is a file or folder in GRIT's format. Records are cut on the right, as in training.

    Attributes:
      max_length: Tokens kept of a record; null for the model's limit.
    """

    max_length: int | None = None

    def __post_init__(self):
        require_positive("max_length", self.max_length)

    def files(self) -> list[Path]:
        """The data files there."""
        path = Path(self.path)
        return [Path(str(file)) for file in find_files(self.path)] if path.is_dir() else [existing(path)]

    def evaluate(self, session: Session) -> Outcome:
        """Scores every record."""
        limit = min(self.max_length or session.model.architecture.max_length, session.model.architecture.max_length)
        texts: list[TokenizedPrompt] = []
        total = 0
        for source in map(open_source, map(str, self.files())):
            if source.record_type is not GenerativeRecord:
                raise InputError(
                    f"{source.path}: holds {source.record_type.name} records; perplexity needs generative ones"
                )
            total += len(source)
            texts += [
                text.cut(limit)
                for (text,) in tokenize_records(list(source), GenerativeStream.prompts, session.model.tokenizer)
            ]
        scorable = [text for text in texts if np.any(text.spans[:, 1] > 1)]
        if not scorable:
            raise InputError(f"{self.path}: no record has a token to score within {limit} tokens")
        session.progress.start("scoring", len(scorable))
        scored = session.model.score(scorable, progress=session.progress.advance)
        examples = np.stack([-scored.values, scored.num_tokens], axis=1)
        loss = loss_per_token(examples)
        figures = {
            "perplexity": float(np.exp(loss)),
            "num_tokens": float(scored.num_tokens.sum()),
            "num_left_out": float(total - len(scorable)),
        }
        return Outcome("loss_per_token", examples, loss_per_token, figures, bounds=(0.0, math.inf))


def loss_per_token(examples: np.ndarray) -> float:
    """Loss per token of records, [records, 2]: the loss of each, and its tokens."""
    losses, tokens = examples.sum(axis=0)
    return float(losses / tokens)
