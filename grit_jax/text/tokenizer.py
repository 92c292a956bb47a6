"""Text to token ids with character offsets, and back."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from grit_jax import files
from grit_jax.config import jsonfile
from grit_jax.errors import InputError
from grit_jax.text.sentencepiece_bpe import convert

_TOKENIZER, _MODEL = "tokenizer.json", "tokenizer.model"
_SETTINGS, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_ROWS = "embedding_rows"  # our own key in the settings, set if the embedding table is smaller than the vocabulary

_LONGEST_REASON = 300  # characters of the library's message

# BOS and EOS of tokenizer files without settings, tried in this order.
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

    `encode` adds no special token: prompts hold the BOS and EOS strings, which become tokens of their own. Other tools
    that read `files` add BOS and `ending`.

    Attributes:
      bos: Text of the first token of every sequence; empty if the model has none.
      eos: Text of the token that ends a completion.
      ending: Text of the tokens that the model's own tokenizer appends to every text, as this package does to texts it
        embeds; mostly empty.
      num_ending: Number of its tokens.
      padding: Text of the special token that other tools pad with.
      rows: Rows of the model's embedding table if the tokenizer has more entries, else None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str, eos: str, rows: int | None = None):
        backend.no_truncation()
        backend.no_padding()
        added = _ending(backend)
        first, last = [bos] if bos else [], [backend.id_to_token(token) or "" for token in added]
        if backend.encode("").ids != [*map(backend.token_to_id, first), *added]:
            # Other readers of the files get the BOS that our prompts contain.
            special: Any = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
            backend.post_processor = processors.TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *first, "$B", *last],
                special_tokens=special,
            )
        self.ending, self.num_ending = "".join(last), len(last)
        self.padding = last[-1] if last else eos
        self._backend, self.bos, self.eos, self.rows = backend, bos, eos, rows

    def with_rows(self, rows: int) -> Tokenizer:
        """The same tokenizer for a model with a smaller embedding table, refusing texts with later ids.

        Raises:
          InputError: BOS, EOS or `ending` come later.
        """
        if rows >= self.vocab_size:
            return self
        for token in filter(None, (self.bos, self.eos, self.ending)):
            if max(self._backend.encode(token, add_special_tokens=False).ids, default=0) >= rows:
                raise InputError(
                    f"vocab_size={rows} leaves out the special token {jsonfile.shown(token)}, as the tokenizer has "
                    f"{self.vocab_size} entries; use the model's own tokenizer"
                )
        return Tokenizer(self._backend, bos=self.bos, eos=self.eos, rows=rows)

    @staticmethod
    def load(source: str | os.PathLike[str]) -> Tokenizer:
        """Loads a folder, a `tokenizer.json` or `tokenizer.model`, or the built-in byte tokenizer, called `bytes`.

        A folder's tokenizer.json has precedence over its tokenizer.model, which is converted.

        Raises:
          InputError: There is no usable tokenizer.
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
        found = {name: (folder / name, files.read_bytes(folder / name)) for name in (_SETTINGS, _SPECIAL)}
        more = {name: _decoded(text, place) for name, (place, text) in found.items() if text is not None}
        if file.suffix == ".model":
            backend, special = convert(content, source=str(file))
            own = {_TOKENIZER: backend.to_str(), _SPECIAL: json.dumps(special)}
            return Tokenizer.from_files(own | more, source=str(file))
        return Tokenizer.from_files({_TOKENIZER: _decoded(content, file), **more}, source=str(file))

    @staticmethod
    def from_files(files: dict[str, str], *, source: str = _TOKENIZER) -> Tokenizer:
        """The tokenizer of these file contents, by file name; see `files`."""
        settings = [
            jsonfile.parse(files[name].encode(), source=os.path.join(os.path.dirname(source), name))
            for name in (_SETTINGS, _SPECIAL)
            if name in files
        ]
        bos, eos = (_special(settings, key) for key in ("bos_token", "eos_token"))
        rows = settings[0].integer(_ROWS, default=None) if settings else None
        try:
            backend = tokenizers.Tokenizer.from_str(files[_TOKENIZER])
            backend.encode("")
        except BaseException as error:  # the library raises plain Exception, or not even that if its Rust code panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
            raise InputError(f"{source} is not a tokenizer file of the tokenizers library: {reason}") from error
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
                raise InputError(
                    f"{source}: special token {jsonfile.shown(token)} is not in the vocabulary; correct {_SETTINGS}"
                )
        return Tokenizer(backend, bos=bos, eos=eos, rows=rows)

    def files(self) -> dict[str, str]:
        """File contents, by file name, for `from_files` and transformers."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos or None,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.rows is not None:
            settings[_ROWS] = self.rows
        return {_TOKENIZER: self._backend.to_str(), _SETTINGS: json.dumps(settings, indent=2)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the tokenizer: equal for equal behaviour."""
        whole = self if self.rows is None else Tokenizer(self._backend, bos=self.bos, eos=self.eos)
        return hashlib.sha256(json.dumps(whole.files()).encode()).hexdigest()[:16]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id that a text may contain, plus one."""
        entries = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        return entries if self.rows is None else min(entries, self.rows)

    @functools.cached_property
    def longest_token(self) -> int:
        """Most characters of one token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @property
    def bos_id(self) -> int | None:
        """Id of `bos`; None if there is none."""
        return self._backend.token_to_id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int | None:
        """Id of `eos`."""
        return self._backend.token_to_id(self.eos)

    @property
    def padding_id(self) -> int | None:
        """Id of `padding`."""
        return self._backend.token_to_id(self.padding)

    def encode(self, text: str) -> Encoding:
        """Tokens of a text; special strings in it become their tokens.

        Raises:
          InputError: It holds half of a surrogate pair, or a token without an embedding in the model.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` of many texts, on all cores."""
        try:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            for i, text in enumerate(texts):
                _refuse_half_characters(text, i)
            raise
        found = [_encoding(encoded) for encoded in encodings]
        if self.rows is not None:
            for i, encoding in enumerate(found):
                self._refuse_late(encoding, i)
        return found

    def _refuse_late(self, encoding: Encoding, i: int) -> None:
        late = encoding.ids[encoding.ids >= self.rows]
        if len(late):
            token = self._backend.id_to_token(int(late[0]))
            raise InputError(
                f"text {i}: {token!r} is token {late[0]}, and the model's embedding table has {self.rows} rows; "
                "remove it from the text"
            )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which may be part of a character; empty if there is no such token."""
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
    """The byte of each character of a byte-level vocabulary: its own if printable, the others in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _encoding(encoded: tokenizers.Encoding) -> Encoding:
    starts = np.array([start for start, _ in encoded.offsets], np.int32)
    return Encoding(np.array(encoded.ids, np.int32), starts)


def _refuse_half_characters(text: str, i: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(f"text {i}: \\u{code:04x} is half of a surrogate pair, not a character; remove it") from error


def _decoded(content: bytes, path: os.PathLike[str]) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {error}; copy the file again") from error


def _special(settings: Sequence[jsonfile.Section], key: str) -> str:
    """A special token, a string or an object, from the first file that has it; empty if it is null or missing."""
    for section in settings:
        if isinstance(section.values.get(key), dict):
            return section.section(key).text("content")
        if key in section:
            return section.text(key, null=True) or ""
    return ""


def _ending(backend: tokenizers.Tokenizer) -> list[int]:
    """Tokens that other tools append to every text."""
    plain, whole = (backend.encode("x", add_special_tokens=added).ids for added in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    begin = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return whole[begin + len(plain) :]


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
