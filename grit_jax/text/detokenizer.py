"""Turns tokens into text piece by piece, as the model writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grit_jax.text.tokenizer import Tokenizer

_CONTEXT = 8  # tokens of the prompt
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the decoder's text for part of a character


class Detokenizer:
    """The text of one completion; a piece is released once later tokens cannot change it.

    Args:
      tokenizer: The model's tokenizer.
      prompt_ids: int32 [tokens]; the prompt that it continues.
      stop: The completion ends before this string, or the first of several.

    Attributes:
      done: Whether a stop string has ended the completion.
      num_tokens: Number of its tokens, up to the one that completes a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: np.ndarray, stop: str | Sequence[str]):
        self._tokenizer, self._stop = tokenizer, [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        self._ids = _end_of(prompt_ids.tolist(), tokenizer)
        self._skip = len(tokenizer.decode(self._ids))
        self._text, self._released, self.done, self.num_tokens = "", 0, False, 0

    def extend(self, tokens: np.ndarray, *, last: bool) -> str:
        """Adds tokens, int32 [tokens], and returns the text now certain; after the `last`, all of it."""
        if self.done:
            return ""
        # Token by token if there is a stop string, to find the one that completes it.
        whole = self._decoded(tokens)
        stops = any(text in whole for text in self._stop)
        for some in np.split(tokens, len(tokens)) if stops and len(tokens) else [tokens]:
            self._text = self._decoded(some)
            self._ids += some.tolist()
            self.num_tokens += len(some)
            ends = [index for index in map(self._text.find, self._stop) if index >= 0]
            if ends:
                self._text, self.done = self._text[: min(ends)], True
                break
        piece = self._text[self._released : len(self._text) if self.done or last else self._certain()]
        self._released += len(piece)
        return piece

    def _decoded(self, more: np.ndarray) -> str:
        """The text of all tokens and `more`."""
        return self._tokenizer.decode([*self._ids, *more.tolist()])[self._skip :]

    def _certain(self) -> int:
        """Length of the text before an unfinished character or the beginning of a stop string."""
        end = len(self._text.rstrip(_UNFINISHED))
        for stop in self._stop:
            for length in range(min(len(stop) - 1, end), 0, -1):
                if self._text.endswith(stop[:length], 0, end):
                    end -= length
                    break
        return end


def _end_of(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The last few tokens, which decide whether a space follows; more if they begin within a character."""
    length = _CONTEXT
    while length < len(ids) and tokenizer.decode(ids[-length:]).startswith(_UNFINISHED):
        length *= 2
    return ids[-length:]
