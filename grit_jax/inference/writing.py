"""Generates the completions of a batch of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grit_jax.errors import InputError
from grit_jax.inference.engine import Continuation, Engine
from grit_jax.text.detokenizer import Detokenizer
from grit_jax.text.tokenizer import Tokenizer


def write(
    engine: Engine, tokenizer: Tokenizer, texts: Sequence[Continuation], stop: str | Sequence[str]
) -> Iterator[list[str]]:
    """Yields the new text of every completion, after each block of tokens.

    Args:
      engine: An idle engine.
      tokenizer: The model's tokenizer.
      texts: The texts to continue.
      stop: A completion ends before this string, or the first of several.

    Raises:
      InputError: A text and its completion do not fit the engine, or its logits are not finite.
    """
    detokenizers = {text: Detokenizer(tokenizer, text.tokens, stop) for text in texts}
    for text in texts:
        engine.submit(text)
    while engine.is_busy:
        pieces = dict.fromkeys(texts, "")
        for block in engine.step():
            if block.finish == "failed":
                raise InputError("the model's logits are not finite; its weights are damaged, or too large for it")
            detokenizer = detokenizers[block.continuation]
            pieces[block.continuation] = detokenizer.extend(block.tokens, last=block.finish is not None)
            if detokenizer.done:
                engine.cancel(block.continuation)
        yield list(pieces.values())
