"""Weight files, indexes and small JSON files with impossible values, and files that lie beside the weights.

The oracle for each damaged file: within a second one line that names it, of less than 700 characters; or it is read as
it says. Of a header that is what the safetensors library reads there, of the embedding's settings every key, and of the
tokenizer's settings the token that ends answers.
"""

import dataclasses
import json
import random
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath

from grit_jax.errors import InputError
from grit_jax.hf.model_folder import open_folder, save_folder
from grit_jax.hf.tensors import INDEX_FILE, indexed_files, stored_tensors
from tests import damage
from tests.hf.test_model_folder import edit_config, random_model, same, whole

SECONDS = 1.0
VALUES = {
    "model.one": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.two": np.ones((4,), np.float16),
    "model.three": np.zeros((0, 3), np.float64),
}


def check_headers(folder, number):
    """Every damaged file is refused by name, or holds what the safetensors library finds in it."""
    rng = random.Random(0)
    whole_file = safetensors.numpy.save(VALUES, metadata={"format": "pt"})
    length = int.from_bytes(whole_file[:8], "little")
    header, body = json.loads(whole_file[8 : 8 + length]), whole_file[8 + length :]
    file = folder / "model.safetensors"
    refused = 0
    for trial in range(number):
        content = damage.text(damage.mutate(rng, header, ["model.two", "__metadata__", "model.more"])).encode()
        content = len(content).to_bytes(8, "little") + content + body
        if trial % 4 == 0:
            content = damage.damage_bytes(rng, rng.choice([content, whole_file]))
        file.write_bytes(content)
        begun = time.process_time()
        try:
            found = stored_tensors(epath.Path(folder))
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{file}: not a complete safetensors file"), content
            assert "\n" not in str(error)
            assert len(str(error)) < 700
            continue
        finally:
            assert time.process_time() - begun < SECONDS, content
        expected = safetensors.numpy.load(content)
        assert {name.removeprefix("model.") for name in found} == {name.removeprefix("model.") for name in expected}
        for name, tensor in found.items():
            value = expected[name if name in expected else name.removeprefix("model.")]
            assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
            read = tensor.read(0, value.size).reshape(value.shape)
            assert np.array_equal(read, value.astype(read.dtype), equal_nan=True)
    assert number / 3 < refused < number


def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(tmp_path):
    check_headers(tmp_path, 400)


@pytest.mark.long
def test_ten_thousand_damaged_headers_are_refused_or_read_as_the_library_reads_them(tmp_path):
    check_headers(tmp_path, 10_000)


def is_told(token, value):
    """Whether a special token is what the settings say: a string, an object with one, or nothing."""
    return token == (value["content"] if isinstance(value, dict) else value) if value else True


def check_small_files(folder, number):
    """Folders with damage in one of the small files: refused by the name of the file, or opened."""
    rng = random.Random(0)
    names = ["grit_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]
    (folder / names[2]).write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    whole_files = {name: (folder / name).read_bytes() for name in names}
    refused = 0
    for trial in range(number):
        name = rng.choice(names)
        content = damage.text(damage.mutate(rng, json.loads(whole_files[name]), ["bos_token", "more"])).encode()
        if trial % 3 == 0:
            content = damage.damage_bytes(rng, whole_files[name])
        (folder / name).write_bytes(content)
        begun = time.process_time()
        try:
            opened = open_folder(folder)
            if name == "grit_config.json":
                assert dataclasses.asdict(opened.embedding) == json.loads(content.decode("utf-8-sig")), content
            if name == "tokenizer_config.json":
                assert is_told(opened.tokenizer.eos, json.loads(content).get("eos_token")), content
        except InputError as error:
            refused += 1
            assert str(folder) in str(error), content
            assert "\n" not in str(error)
            assert len(str(error)) < 700
        finally:
            assert time.process_time() - begun < SECONDS, content
        (folder / name).write_bytes(whole_files[name])
    assert number / 5 < refused < number


@pytest.fixture
def exported(tmp_path):
    pretrained, params = random_model()
    save_folder(tmp_path / "hf", pretrained, params)
    return tmp_path / "hf", params


def test_damage_in_a_small_file_is_refused_by_its_name(exported):
    check_small_files(exported[0], 100)


@pytest.mark.long
def test_ten_thousand_damages_of_small_files_are_refused_by_their_names(exported):
    check_small_files(exported[0], 10_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is empty"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"[" * 100_000, "cannot be read: it is nested too deeply"),
        (b"[]", r"holds \[\], not an object"),
        (b"{}", "has no weight_map of tensors and their files"),
        (b'{"weight_map": []}', "has no weight_map of tensors and their files"),
        (b'{"weight_map": {}}', "has no weight_map of tensors and their files"),
        (b'{"weight_map": {"a": 1}}', "weight_map.a=1 is not the name of a safetensors file"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "weight_map.a='../b.safetensors' is not the name of"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "weight_map.a='/etc/passwd' is not the name of"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(InputError, match=message):
        indexed_files(epath.Path(tmp_path / INDEX_FILE))


def test_other_files_beside_the_weights_are_not_read(exported):
    folder, params = exported
    other = {"model.embed_tokens.weight": np.zeros((258, 32), np.float32)}
    for name in ("consolidated", "adapter_model", "model.fp16", "model-backup", "aaa", "projection", "model (1)"):
        safetensors.numpy.save_file(other, folder / f"{name}.safetensors")
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7 from another system")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "aaa.safetensors"}}))
    pretrained = open_folder(folder)
    assert same(pretrained.load(whole(pretrained.architecture)), params)


def test_a_folder_without_the_file_that_transformers_reads_is_refused(exported):
    folder, _ = exported
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(InputError, match=r"no model.safetensors and no .*; model.fp16.safetensors would not be read"):
        open_folder(folder)


def test_a_tensor_in_two_files_is_refused(exported):
    folder, _ = exported
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    safetensors.numpy.save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "b.safetensors")
    names = {"model.norm.weight": "a.safetensors", "more": "b.safetensors"}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    pretrained = open_folder(folder)
    with pytest.raises(InputError, match=r"a.safetensors and .*b.safetensors both hold model.norm.weight"):
        pretrained.load(whole(pretrained.architecture))


def test_a_tied_model_saved_without_its_head_loads(exported):
    folder, params = exported
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    headless = {name.removeprefix("model."): value for name, value in tensors.items()}
    safetensors.numpy.save_file(headless, folder / "model.safetensors")
    pretrained = open_folder(folder)
    assert same(pretrained.load(whole(pretrained.architecture)), params)


@pytest.mark.parametrize("layers", [10_000, 10**12])
def test_a_config_of_more_layers_than_there_are_is_refused_at_once(exported, layers):
    folder, _ = exported
    edit_config(folder, num_hidden_layers=layers)
    begun = time.process_time()
    with pytest.raises(InputError, match=r"num_hidden_layers=10+ must be|config.json describes \d+ tensors"):
        pretrained = open_folder(folder)
        pretrained.load(whole(pretrained.architecture))
    assert time.process_time() - begun < SECONDS * 3
