"""A converted tokenizer.model against sentencepiece itself and recorded ids."""

import json
import random
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.errors import InputError
from grit_jax.hf.model_folder import save_folder
from grit_jax.text.detokenizer import Detokenizer
from grit_jax.text.tokenizer import Tokenizer
from tests.hf.test_model_folder import random_model


@pytest.fixture(scope="module", params=[True, False], ids=["prefix space", "no prefix"])
def trained(request, tmp_path_factory):
    """A small BPE model trained here, and sentencepiece's own processor of it."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeéñ你好", k=rng.randint(1, 7))) for _ in range(150)]
    (folder / "text").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(800)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param, character_coverage=1.0, user_defined_symbols=["[MASK]"], minloglevel=9,
    )  # fmt: skip
    return folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_any_text_gets_sentencepieces_ids_and_comes_back(trained):
    folder, theirs = trained
    ours = Tokenizer.load(folder)

    # The pieces of control symbols are special tokens here and plain text for sentencepiece; ▁ is its own space.
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_characters="▁<\0", exclude_categories=["Cs"])) | st.text("abcdé你 \n"))
    def check(text):
        ids = ours.encode(text).ids.tolist()
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    check()


def test_an_answer_goes_on_from_characters_that_are_written_in_bytes(trained):
    ours = Tokenizer.load(trained[0])
    ids, prompt = ours.encode("日本語日本語の日本語").ids, ours.encode("日本語日本語の").ids
    assert ids[: len(prompt)].tolist() == prompt.tolist() and len(prompt) > 20
    answer = Detokenizer(ours, prompt, ())
    pieces = [answer.extend(ids[place : place + 1], last=False) for place in range(len(prompt), len(ids))]
    assert [piece for piece in pieces if piece] == ["日", "本", "語"]


def test_special_and_user_defined_pieces_keep_their_ids(trained):
    folder, theirs = trained
    ours = Tokenizer.load(folder)
    assert (ours.bos, ours.eos, ours.vocab_size) == ("<s>", "</s>", theirs.vocab_size())
    text = "<s>abc [MASK]</s>"
    special = [theirs.piece_to_id(piece) for piece in ("<s>", "[MASK]", "</s>")]
    assert [token for token in ours.encode(text).ids.tolist() if token in special] == special
    again = Tokenizer.from_files(ours.files())
    assert again.fingerprint == ours.fingerprint
    assert again.encode(text).ids.tolist() == ours.encode(text).ids.tolist()


def test_published_models_give_their_recorded_ids(shared):
    recorded = json.loads((shared / "golden/collator/tokenizer_ids.json").read_text())
    ours = Tokenizer.load(shared / "data/tokenizers/mistral-v1.tokenizer.model")
    for text, ids in zip(recorded["texts"], recorded["tokenizers"]["mistral_v1"]["fast_ids"], strict=True):
        assert ours.encode(text).ids.tolist() == ids
    assert Tokenizer.load(shared / "data/tokenizers/mistral-v3.tokenizer.model").vocab_size == 32768


def test_other_models_are_refused_by_name(shared, tmp_path):
    with pytest.raises(InputError, match="of type UNIGRAM are not converted, only BPE; open the model once"):
        Tokenizer.load(shared / "data/tokenizers/t5_cc_all.32000.100extra.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(InputError, match=r"tokenizer.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path)


def test_a_folder_with_tokenizer_model_alone_is_read_and_exported_with_tokenizer_json(trained, tmp_path):
    folder, _ = trained
    converted = Tokenizer.load(folder)
    save_folder(tmp_path / "hf", *random_model(vocab_size=converted.vocab_size))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    shutil.copy(folder / "tokenizer.model", tmp_path / "hf")
    pretrained, params = load_for_conversion(tmp_path / "hf")
    save_folder(tmp_path / "again", pretrained, params)
    again = Tokenizer.load(tmp_path / "again/tokenizer.json")
    assert again.fingerprint == pretrained.tokenizer.fingerprint == converted.fingerprint
