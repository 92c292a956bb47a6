"""Text to token ids with character offsets, and back."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from grit_jax import files
from grit_jax.config import InputError
from grit_jax.sentencepiece_bpe import convert

_TOKENIZER, _MODEL = "tokenizer.json", "tokenizer.model"
_SETTINGS, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"

# BOS and EOS of tokenizer files that come without settings, tried in this order.
_WELL_KNOWN = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("", "<|endoftext|>"),
)


class Encoding(NamedTuple):
    """Tokens of one text.

    Attributes:
      ids: int32 [tokens].
      starts: int32 [tokens]; index of the character where each token starts.
    """

    ids: np.ndarray
    starts: np.ndarray


class Tokenizer:
    """A `tokenizers` tokenizer and its special strings.

    `encode` adds no special token: prompts hold the BOS and EOS strings, which are tokens of their own.
    Other tools that read `files` add BOS and nothing else.

    Attributes:
      bos: Text of the first token of every sequence; empty when the model has none.
      eos: Text of the token that ends an answer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str, eos: str):
        backend.no_truncation()
        backend.no_padding()
        if bos and backend.encode("").ids != [backend.token_to_id(bos)]:
            # Other users of the files get the BOS that our prompts spell out.
            special = [(bos, backend.token_to_id(bos))]
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=special
            )
        self._backend, self.bos, self.eos = backend, bos, eos

    @staticmethod
    def load(source: str | os.PathLike[str]) -> Tokenizer:
        """Loads a folder, a `tokenizer.json` or `tokenizer.model`, or the built-in byte tokenizer, called `bytes`.

        A folder's tokenizer.json comes before its tokenizer.model, which is converted.

        Raises:
          InputError: Nothing usable is there.
        """
        if str(source) == "bytes":
            return _byte_tokenizer()
        path = file = epath.Path(source)
        folder = path.parent
        if files.is_folder(path):
            there = files.names(path)
            folder, file = path, path / next((name for name in (_TOKENIZER, _MODEL) if name in there), _TOKENIZER)
        content = files.read_bytes(file)
        if content is None:
            raise InputError(
                f"tokenizer {source}: no {file} there; name a folder that has one, the file itself, or `bytes`"
            )
        names = (_SETTINGS, _SPECIAL)
        more = {name: text for name in names if (text := files.read_text(folder / name)) is not None}
        if file.suffix == ".model":
            backend, special = convert(content, source=str(file))
            own = {_TOKENIZER: backend.to_str(), _SPECIAL: json.dumps(special)}
            return Tokenizer.from_files(own | more, source=str(file))
        return Tokenizer.from_files({_TOKENIZER: content.decode(), **more}, source=str(file))

    @staticmethod
    def from_files(files: dict[str, str], *, source: str = _TOKENIZER) -> Tokenizer:
        """The tokenizer that these file contents, by file name, describe; see `files`."""
        try:
            backend = tokenizers.Tokenizer.from_str(files[_TOKENIZER])
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{source} is not a tokenizer file of the tokenizers library: {error}") from error
        settings: dict[str, Any] = {}
        for name in (_SPECIAL, _SETTINGS):
            settings |= json.loads(files.get(name, "{}"))
        bos, eos = (_text(settings.get(key)) for key in ("bos_token", "eos_token"))
        if not eos:
            known = [
                pair for pair in _WELL_KNOWN if all(backend.token_to_id(token) is not None for token in pair if token)
            ]
            if not known:
                raise InputError(
                    f"{source}: no end-of-sequence token found; put a {_SETTINGS} with eos_token beside it"
                )
            bos, eos = known[0]
        for token in filter(None, (bos, eos)):
            if backend.token_to_id(token) is None:
                raise InputError(f"{source}: special token {token!r} is not in the vocabulary; correct {_SETTINGS}")
        return Tokenizer(backend, bos=bos, eos=eos)

    def files(self) -> dict[str, str]:
        """File names and contents that `from_files` and transformers read."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos or None,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        return {_TOKENIZER: self._backend.to_str(), _SETTINGS: json.dumps(settings, indent=2)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the tokenizer: equal for equal behaviour."""
        return hashlib.sha256(json.dumps(self.files()).encode()).hexdigest()[:16]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def longest_token(self) -> int:
        """Most characters that one token stands for."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @property
    def bos_id(self) -> int | None:
        """Id of `bos`, None when there is none."""
        return self._backend.token_to_id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int | None:
        """Id of `eos`."""
        return self._backend.token_to_id(self.eos)

    def encode(self, text: str) -> Encoding:
        """Tokens of a text; special strings in it become their tokens.

        Raises:
          InputError: It holds half of a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` of many texts, on all cores."""
        try:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            for place, text in enumerate(texts):
                _refuse_half_characters(text, place)
            raise
        return [_encoding(encoded) for encoded in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character; nothing where there is no such token."""
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._added:
            return (piece or "").encode()
        if self._is_byte_level:
            return bytes(map(_byte_level_alphabet().__getitem__, piece))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel(" in repr(self._backend.decoder)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary: its own if printable, those left in their order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _encoding(encoded: tokenizers.Encoding) -> Encoding:
    starts = np.array([start for start, _ in encoded.offsets], np.int32)
    return Encoding(np.array(encoded.ids, np.int32), starts)


def _refuse_half_characters(text: str, place: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"text {place}: \\u{code:04x} is half of a surrogate pair and no character; remove it"
        ) from error


def _text(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _byte_level(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos="<s>", eos="</s>")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of `vocab_size` tokens, `<s>` and `</s>` among them."""
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, bos="<s>", eos="</s>")
