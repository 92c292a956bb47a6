"""Keys and values that a store keeps beside its vectors."""

import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig
from grit_jax.errors import InputError
from grit_jax.retrieval.quantization import DTYPES
from grit_jax.retrieval.store import Store
from grit_jax.retrieval.store_files import data_file
from tests.models import make
from tests.retrieval.stores import content, index, save_model, write_corpus


@pytest.fixture(scope="module")
def model():
    return make(embedding=EmbeddingConfig(projection_dim=8))


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A store with keys and values of every type, one of the second form, and one without any."""
    folder = tmp_path_factory.mktemp("caches")
    corpus = write_corpus(folder / "corpus.jsonl")
    options = {"instruction": "store", "max_length": 60}
    for dtype in DTYPES:
        index(folder / dtype, model, corpus, caches=dtype, **options)
    index(folder / "second", model, corpus, caches="float32", cache_form="second", **options)
    index(folder / "none", model, corpus, **options)
    return folder


@pytest.mark.parametrize("form", ["first", "second"])
def test_a_row_has_the_keys_and_values_of_its_document(made, model, form):
    store = Store(made / ("second" if form == "second" else "float32"))
    store.check_caches()
    texts = [document.embedded for document in store.documents()]
    expected = model.encode_with_caches(texts, instruction="store", max_length=60, form=form)
    assert len({cached.cache.keys.shape for cached in expected}) > 2
    for row, cached in enumerate(expected):
        found = store.cache(row)
        assert found.keys.shape == found.values.shape == cached.cache.keys.shape
        for kept, computed in zip(found, cached.cache, strict=True):  # in a batch of another shape
            assert np.abs(kept - computed).max() <= 2e-5 * np.abs(computed).max()
        assert np.allclose(store.vectors[row : row + 1], cached.vector, atol=1e-5)


def test_keeping_them_does_not_change_the_vectors(made):
    assert np.allclose(Store(made / "float32").vectors[:], Store(made / "none").vectors[:], atol=1e-5)


def test_values_are_off_by_no_more_than_their_type_says(made):
    exact, rounded, whole = (Store(made / dtype) for dtype in DTYPES)
    for row in range(len(exact)):
        for of_exact, of_rounded, of_whole in zip(exact.cache(row), rounded.cache(row), whole.cache(row), strict=True):
            assert np.array_equal(of_rounded, of_exact.astype("bfloat16").astype(np.float32))
            largest = np.abs(of_exact).max(axis=-1, keepdims=True)  # of each token, layer and head
            assert np.all(np.abs(of_whole - of_exact) <= largest / 254 * (1 + 1e-5))


def test_any_reader_of_safetensors_opens_the_file(made):
    store = Store(made / "int8")
    tensors = safetensors.numpy.load_file(data_file(store.folder, "caches", 1))
    assert set(tensors) == {"ends", "keys", "values", "key_scales", "value_scales"}
    begin, end = tensors["ends"][:2]  # of the shard's second row
    keys = tensors["keys"][begin:end] * tensors["key_scales"][begin:end, ..., None]
    assert np.array_equal(keys.swapaxes(0, 1), store.cache(5).keys)


def test_settings_that_do_not_fit_are_refused(made, model, tmp_path):
    corpus = made / "corpus.jsonl"
    store = shutil.copytree(made / "second", tmp_path / "store")
    before = content(store)
    index(store, model, corpus)
    for wanted, message in (
        ({"caches": "int8"}, "made with --caches 'float32', not 'int8'; leave --caches out, or name another folder"),
        ({"cache_form": "first"}, "made with --cache-form 'second', not 'first'; leave --cache-form out"),
    ):
        with pytest.raises(InputError, match=message):
            index(store, model, corpus, **wanted)
    assert content(store) == before
    without = shutil.copytree(made / "none", tmp_path / "none")
    with pytest.raises(InputError, match="made without --caches, not 'int8'; leave --caches out"):
        index(without, model, corpus, caches="int8")
    with pytest.raises(InputError, match="--cache-form=second needs keys and values, which are not kept; add --cac"):
        index(tmp_path / "new", model, corpus, cache_form="second")
    with pytest.raises(InputError, match="none: made without keys and values; index the corpus into another folder wi"):
        Store(without).check_caches()


def test_damage_is_found_when_they_are_asked_for(made, tmp_path):
    folder = shutil.copytree(made / "int8", tmp_path / "store")
    path = data_file(folder, "caches", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"caches-00002.safetensors: differs from its checksum"):
        Store(folder).check_caches()
    path.unlink()
    with pytest.raises(InputError, match=r"caches-00002.safetensors: cannot be read"):
        Store(folder).check_caches()


def test_the_command_says_what_they_take(made, tmp_path, capsys):
    model, store = str(save_model(tmp_path / "model")), tmp_path / "store"
    assert main(["index", model, str(made / "corpus.jsonl"), str(store), "--caches", "int8"]) == 0
    size = data_file(store, "caches", 0).stat().st_size / 1e6
    said = re.search(r"(\S+) MB of these keys and values in int8, (\S+) MB each", capsys.readouterr().out)
    assert (float(said[1]), float(said[2])) == (round(size, 1), round(size / 21, 3))
