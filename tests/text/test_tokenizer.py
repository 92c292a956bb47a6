import json

import numpy as np
import pytest

from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer, train_bpe

TEXTS = ["Plain words.", "  two  spaces\n\ttabs", "héllo wörld", "你好，世界 😀 done", "<s>special</s>\n"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS * 3, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_decode_to_the_text(text):
    tokenizer = Tokenizer.load("bytes")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_bytes_are_256_tokens_and_two_special_ones():
    tokenizer = Tokenizer.load("bytes")
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("<s>").ids.tolist() == [tokenizer.bos_id]
    assert len(tokenizer.encode("😀").ids) == 4


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_starts_are_the_characters_where_tokens_begin(kind, text, bpe):
    tokenizer = bpe if kind == "bpe" else Tokenizer.load("bytes")
    encoding = tokenizer.encode(text)
    assert encoding.starts[0] == 0
    assert np.all(np.diff(encoding.starts) >= 0)
    for token in np.flatnonzero(np.diff(encoding.starts, prepend=-1)):
        head = tokenizer.decode(encoding.ids[:token], skip_special_tokens=False)
        assert text.startswith(head.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_batch_encoding_equals_single_encoding(bpe):
    for single, batched in zip(map(bpe.encode, TEXTS), bpe.encode_batch(TEXTS), strict=True):
        assert np.array_equal(single.ids, batched.ids)
        assert np.array_equal(single.starts, batched.starts)


def joined_bytes(tokenizer, text):
    return b"".join(map(tokenizer.token_bytes, tokenizer.encode(text).ids.tolist()))


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(text, bpe):
    for tokenizer in (bpe, Tokenizer.load("bytes")):
        assert joined_bytes(tokenizer, text) == text.encode()
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text])
def test_a_word_of_sentencepiece_begins_with_a_space(text, shared):
    assert joined_bytes(Tokenizer.load(shared / "golden/tokenizer"), text) == f" {text}".encode()


def test_files_round_trip(bpe, tmp_path):
    for name, text in bpe.files().items():
        (tmp_path / name).write_text(text)
    for again in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert again.fingerprint == bpe.fingerprint
        assert (again.bos, again.eos, again.vocab_size) == ("<s>", "</s>", 300)


def test_a_bare_tokenizer_json_takes_well_known_special_tokens(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.files()["tokenizer.json"])
    assert Tokenizer.load(tmp_path).eos == "</s>"


def test_missing_and_broken_tokenizers_are_refused(bpe, tmp_path):
    with pytest.raises(InputError, match=r"no .*tokenizer.json there; name a folder that has one"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(bpe.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "</s>"}))
    with pytest.raises(InputError, match="special token '<bos>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_ids_equal_the_recorded_ones_of_the_reference(shared):
    recorded = json.loads((shared / "golden/collator/tokenizer_ids.json").read_text())
    tokenizer = Tokenizer.load(shared / "golden/tokenizer")
    for text, expected in zip(recorded["texts"], recorded["tokenizers"]["tiny"]["fast_ids"], strict=True):
        assert tokenizer.encode(text).ids.tolist() == expected
