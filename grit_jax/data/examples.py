"""Records as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from grit_jax import prompts
from grit_jax.data.records import EmbeddingRecord, Record
from grit_jax.prompts import Prompt, TokenizedPrompt
from grit_jax.tokenizer import Tokenizer

HASH_BITS = 56  # of a text's hash


def record_prompts(record: Record, tokenizer: Tokenizer) -> list[Prompt]:
    """The texts of a record: query, positives, negatives; or the one conversation."""
    if isinstance(record, EmbeddingRecord):
        texts = (record.query, *record.positives, *record.negatives)
        bos, ending = tokenizer.bos, tokenizer.ending
        return [prompts.embedding(text, instruction, bos=bos, ending=ending) for instruction, text in texts]
    if isinstance(record.turns, str):
        return [prompts.plain(record.turns, bos=tokenizer.bos)]
    return [prompts.conversation(record.turns, bos=tokenizer.bos, eos=tokenizer.eos)]


def text_hash(prompt: Prompt) -> int:
    """A number from 0 of `HASH_BITS` bits, equal for equal formatted texts."""
    return int.from_bytes(hashlib.blake2b(prompt.text.encode(), digest_size=HASH_BITS // 8).digest())


def tokenize_records(records: Sequence[Record], tokenizer: Tokenizer) -> list[list[TokenizedPrompt]]:
    """The tokenized texts of each record, untruncated."""
    texts = [record_prompts(record, tokenizer) for record in records]
    tokenized = iter(prompts.tokenize([prompt for record in texts for prompt in record], tokenizer))
    return [[next(tokenized) for _ in record] for record in texts]
