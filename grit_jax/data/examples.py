"""Records as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from grit_jax.data.records import Record
from grit_jax.text.prompts import Prompt, TokenizedPrompt, tokenize
from grit_jax.text.tokenizer import Tokenizer

HASH_BITS = 56  # of a text's hash


def text_hash(prompt: Prompt) -> int:
    """A number from 0 of `HASH_BITS` bits, equal for equal formatted texts."""
    return int.from_bytes(hashlib.blake2b(prompt.text.encode(), digest_size=HASH_BITS // 8).digest())


def tokenize_records(
    records: Sequence[Record], prompts: Callable[[Any, Tokenizer], list[Prompt]], tokenizer: Tokenizer
) -> list[list[TokenizedPrompt]]:
    """The tokenized texts of each record, untruncated; `prompts` are a stream's."""
    texts = [prompts(record, tokenizer) for record in records]
    tokenized = iter(tokenize([prompt for record in texts for prompt in record], tokenizer))
    return [[next(tokenized) for _ in record] for record in texts]
