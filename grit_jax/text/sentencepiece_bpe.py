"""Converts a sentencepiece model, `tokenizer.model`, to the tokenizers library."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from grit_jax.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_REMEDY = "open the model once with transformers' AutoTokenizer and save_pretrained, which writes a tokenizer.json"


def convert(model: bytes, *, source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a BPE model like those of Llama, Mistral and Gemma, and its `bos_token` and `eos_token`.

    Token ids are those of transformers' conversion: control pieces are special tokens, and after each the text starts
    again, with the model's prefix space if it has one.

    Raises:
      InputError: The bytes are not a sentencepiece BPE model.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # ty: ignore[missing-attribute]  # made at run time
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError; each implementation has its own
        raise InputError(f"{source}: not a sentencepiece model ({error}); copy it again") from error
    model_type = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    normalizer = proto.normalizer_spec
    if model_type != "BPE":
        raise InputError(f"{source}: sentencepiece models of type {model_type} are not converted, only BPE; {_REMEDY}")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise InputError(f"{source}: sentencepiece normalisation {normalizer.name!r} is not converted; {_REMEDY}")
    pieces = [piece.piece for piece in proto.pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unknown = next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None)
    byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    bpe = models.BPE(vocab, _merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    backend = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(" ", "▁")
    prefix = [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
    ids = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}
    return backend, {name: pieces[number] for name, number in ids.items() if 0 <= number < len(pieces)}


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that merge into a piece, best score first."""
    found = []
    for piece, score in scores.items():
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in scores and right in scores]
        found += [
            (score, left, right) for left, right in sorted(pairs, key=lambda pair: [vocab[part] for part in pair])
        ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]
