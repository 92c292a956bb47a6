"""The GRIT text format, and which of its characters are pooled or scored.

The markers are plain text. BOS and EOS are the model's own strings; they become single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.config import InputError
from grit_jax.tokenizer import Tokenizer

_USER, _ASSISTANT, _EMBED = "<|user|>\n", "<|assistant|>\n", "<|embed|>\n"


class Prompt(NamedTuple):
    """Formatted text.

    Attributes:
      text: What is tokenized, BOS included.
      spans: Character ranges [start, end) that are pooled (embedding) or scored (generation).
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class TokenizedPrompt(NamedTuple):
    """Tokens of a prompt.

    Attributes:
      tokens: int32 [tokens].
      spans: int32 [spans, 2]; token ranges [start, end). A token belongs to the span where it starts.
    """

    tokens: np.ndarray
    spans: np.ndarray


def embedding(text: str, instruction: str = "", *, bos: str) -> Prompt:
    r"""`<s><|user|>\n{instruction}\n<|embed|>\n{text}`, or `<s><|embed|>\n{text}`; the text is pooled."""
    head = f"{bos}{_USER}{instruction}\n{_EMBED}" if instruction else f"{bos}{_EMBED}"
    return Prompt(head + text, ((len(head), len(head) + len(text)),))


def conversation(turns: Sequence[str], *, bos: str, eos: str) -> Prompt:
    """A training conversation of user and assistant turns; assistant texts and their EOS are scored."""
    text, spans = bos, []
    for number, turn in enumerate(turns):
        separator = "\n" if number else ""
        if number % 2 == 0:
            text += f"{separator}{_USER}{turn}"
        else:
            text += f"\n{_ASSISTANT}"
            start = len(text)
            text += turn.strip() + eos
            spans.append((start, len(text)))
    return Prompt(text, tuple(spans))


def plain(text: str, *, bos: str) -> Prompt:
    """Text without roles; all of it is scored."""
    return Prompt(bos + text, ((len(bos), len(bos) + len(text)),))


def generation(messages: str | Sequence[Mapping[str, str]], *, bos: str, eos: str, prefix: str = "") -> str:
    """The prompt that the assistant continues.

    Args:
      messages: One user message, or `{"role": "user" | "assistant", "content": str}` in turn, a user's first and last.
      bos: The model's BOS.
      eos: The model's EOS.
      prefix: What the answer begins with.

    Raises:
      InputError: Roles are not user and assistant in turn.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(f"messages have the roles {roles}; they must be user and assistant in turn, ending with user")
    history = conversation([message["content"] for message in messages], bos=bos, eos=eos)
    return f"{history.text}\n{_ASSISTANT}{prefix}"


def tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[TokenizedPrompt]:
    """Tokenizes each prompt whole, then finds the tokens of its spans by character offset."""
    encodings = tokenizer.encode_batch([prompt.text for prompt in prompts])
    return [
        TokenizedPrompt(encoding.ids, _token_spans(encoding.starts, prompt.spans))
        for prompt, encoding in zip(prompts, encodings, strict=True)
    ]


def _token_spans(starts: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    ranges = np.searchsorted(starts, np.array(spans, np.int64).reshape(-1, 2)).astype(np.int32)
    return ranges[ranges[:, 0] < ranges[:, 1]]
