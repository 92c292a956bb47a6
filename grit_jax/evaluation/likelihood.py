"""Tasks on the likelihood that the model assigns to texts: multiple choice and perplexity."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.data.records import GenerativeRecord
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams.generative import GenerativeStream
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.evaluation.prompted import PromptedTask, fill
from grit_jax.evaluation.reading import EvaluationRecord, existing, split_by
from grit_jax.evaluation.task import Outcome, Session, Task
from grit_jax.text.prompts import TokenizedPrompt
from grit_jax.text.tokenizer import Tokenizer

_LETTERS = string.ascii_uppercase
_LETTER_TOKENS = 2  # of a letter and the space before it, if a tokenizer splits them


@dataclasses.dataclass(frozen=True)
class MultipleChoice(PromptedTask):
    """Accuracy of the choice whose letter is likeliest.

    `path` is a .jsonl file with `question`, `choices` and `answer`, a letter or a number from 0; `shots_path` is
    another. In the template, `{choices}` stands for the lettered choices. Too long contexts lose their beginning.
    """

    template: str = "{question}\n{choices}\nAnswer:"
    prefix: str = "The answer is"

    def questions(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """Questions with their choices as lines `A. first`, `B. second` and so on."""
        return [fill(self.template, record, {"choices": _lettered(record.strings("choices"))}) for record in records]

    def examples(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """Questions with the right letter."""
        return [
            f"{question} {_target(record)}" for question, record in zip(self.questions(records), records, strict=True)
        ]

    def evaluate(self, session: Session) -> Outcome:
        """Scores every letter after every question."""
        records = self.selected(session)
        letters, prompts = [_letters(record) for record in records], self.prompts(records, session, room=_LETTER_TOKENS)
        contexts = [message for message, each in zip(prompts.messages, letters, strict=True) for _ in each]
        continuations = [f" {letter}" for each in letters for letter in each]
        scored = session.log_likelihoods(contexts, continuations, prefix=self.prefix)
        by_record = zip(letters, split_by(letters, scored.values), strict=True)
        chosen = [each[int(np.argmax(values))] for each, values in by_record]
        hits = np.array([letter == _target(record) for letter, record in zip(chosen, records, strict=True)], float)
        scores = {
            "chance": float(np.mean([1 / len(each) for each in letters])),
            "num_truncated": float(scored.num_truncated),
        }
        return Outcome("accuracy", hits, scores=scores | self.common_scores(records, prompts, hits))


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))


def _letters(record: EvaluationRecord) -> str:
    """The letters of a record's choices."""
    number = len(record.strings("choices"))
    if not 2 <= number <= len(_LETTERS):
        raise InputError(f"{record.where}: 'choices' has {number} entries; there must be 2 to {len(_LETTERS)}")
    return _LETTERS[:number]


def _target(record: EvaluationRecord) -> str:
    """The letter of the right choice."""
    answer, letters = record.get("answer", str, int), _letters(record)
    if isinstance(answer, int) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise InputError(
        f"{record.where}: 'answer' is {answer!r:.60}; it must be one of {', '.join(letters)}, or its number"
    )


@dataclasses.dataclass(frozen=True)
class Perplexity(Task):
    """Loss per scored token of GRIT generative records, in nats: of the assistant's turns, or all of a plain text.

    `path` is a file or folder in GRIT's format. Records are cut on the right, as in training.

    Attributes:
      max_length: Most tokens to keep of a record; null for the model's limit.
    """

    max_length: int | None = None

    def __post_init__(self):
        require_positive("max_length", self.max_length)

    def files(self) -> list[Path]:
        """The data files at `path`."""
        path = Path(self.path)
        return [Path(str(file)) for file in find_files(self.path)] if path.is_dir() else [existing(path)]

    def evaluate(self, session: Session) -> Outcome:
        """Scores every record."""
        limit = min(self.max_length or session.model.architecture.max_length, session.model.architecture.max_length)
        texts = [text.cut(limit) for text in read_generative(map(str, self.files()), session.model.tokenizer)]
        scorable = [text for text in texts if np.any(text.spans[:, 1] > 1)]
        if not scorable:
            raise InputError(f"{self.path}: no record has a token to score within {limit} tokens")
        session.progress.start("scoring", len(scorable))
        scored = session.model.score(scorable, progress=session.progress.advance)
        examples = np.stack([-scored.values, scored.num_tokens], axis=1)
        loss = loss_per_token(examples)
        scores = {
            "perplexity": float(np.exp(loss)),
            "num_tokens": float(scored.num_tokens.sum()),
            "num_left_out": float(len(texts) - len(scorable)),
        }
        return Outcome("loss_per_token", examples, loss_per_token, scores, bounds=(0.0, math.inf))


def read_generative(paths: Iterable[Any], tokenizer: Tokenizer) -> Iterator[TokenizedPrompt]:
    """The tokenized texts of data files with GRIT generative records.

    Raises:
      InputError: A file is missing or malformed, or holds other records.
    """
    for source in map(open_source, paths):
        if source.record_type is not GenerativeRecord:
            raise InputError(
                f"{source.path}: holds {source.record_type.name} records; perplexity needs generative ones"
            )
        for (text,) in tokenize_records(list(source), GenerativeStream.prompts, tokenizer):
            yield text


def loss_per_token(examples: np.ndarray) -> float:
    """Loss per token of records, from the loss and the tokens of each: [records, 2]."""
    losses, tokens = examples.sum(axis=0)
    return float(losses / tokens)
