"""Adapters in PEFT's layout."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.checkpoints.opening import load_adapters, open_model
from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig, LoRAConfig
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.model.pretrained import AdapterMetadata
from grit_jax.model.transformer import init_params
from grit_jax.text.tokenizer import Tokenizer
from tests.models import shape, weights

LORA = LoRAConfig(r=4, alpha=6, dropout=0.1, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True)


def save_adapters(folder, base, *extra):
    """A base, and a checkpoint of adapters and of some of the base's parameters; the adapters."""
    architecture = shape()
    tokenizer = Tokenizer.load("bytes")
    about = architecture, EmbeddingConfig(), tokenizer.files()
    save_params(base, weights(architecture), CheckpointMetadata(*about))
    drawn = flatten_dict(init_params(architecture, jax.random.key(1), None, LORA), sep=".")
    own = {path: leaf for path, leaf in drawn.items() if ".lora." in path or path in extra}
    own = {path: jax.random.normal(jax.random.key(i), own[path].shape) for i, path in enumerate(sorted(own))}
    fingerprint = GritModel.load(base).fingerprint(rounded=True)
    adapter = AdapterMetadata(str(base), fingerprint, LORA)
    save_params(folder, unflatten_dict(own, sep="."), CheckpointMetadata(*about, adapter=adapter))
    return own


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A base, adapters, and their export, of which the last two are the adapters' parameters."""
    folder = tmp_path_factory.mktemp("adapters")
    own = save_adapters(folder / "own", folder / "base")
    assert main(["export-hf", str(folder / "own"), str(folder / "peft"), "--adapter"]) == 0
    return folder, own


def test_tensors_and_settings_are_those_of_peft(exported):
    folder, own = exported
    config = json.loads((folder / "peft/adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": True, "bias": "none",
        "target_modules": ["q_proj", "o_proj", "down_proj"], "base_model_name_or_path": str(folder / "base"),
    }  # fmt: skip
    assert expected.items() <= config.items()
    stored = safetensors.numpy.load_file(folder / "peft/adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 3
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = (np.asarray(own[f"layers.attention.query.lora.{part}"][1]) for part in "ab")
    assert np.array_equal(stored[name.format("A")], a.T)
    assert np.array_equal(stored[name.format("B")], b.reshape(4, -1).T)
    a = np.asarray(own["layers.attention.out.lora.a"][0])
    assert np.array_equal(stored["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"], a.reshape(-1, 4).T)


def test_an_export_is_the_same_model_and_imports_bit_for_bit(exported, tmp_path):
    folder, own = exported
    assert main(["import-hf", str(folder / "peft"), str(tmp_path / "again")]) == 0
    pretrained, again = load_adapters(tmp_path / "again")
    again = flatten_dict(again, sep=".")
    assert again.keys() == own.keys() and all(np.array_equal(again[path], own[path]) for path in own)
    first = open_model(folder / "own").adapter
    assert pretrained.adapter.fingerprint == first.fingerprint and pretrained.lora.scale == LORA.scale
    vectors = [GritModel.load(path).encode(["red"]) for path in (folder / "own", folder / "peft", tmp_path / "again")]
    assert np.array_equal(vectors[0], vectors[1]) and np.array_equal(vectors[0], vectors[2])


def test_adapters_of_peft_get_the_fingerprint_of_the_base_that_is_there(exported, tmp_path):
    folder, _ = exported
    copied = tmp_path / "peft"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / name).write_bytes((folder / "peft" / name).read_bytes())
    assert open_model(copied).adapter.fingerprint is None
    assert load_adapters(copied)[0].adapter == open_model(folder / "peft").adapter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type='IA3' is not supported; supported are LORA"),
        ({"use_dora": True}, "adapter_config.json: use_dora=True is not supported; merge these adapters with PEFT"),
        ({"bias": "all"}, "bias='all' is not supported; supported are none"),
        ({"target_modules": ["q_proj", "v_proj"]}, "weights do not match adapter_config.json: .*v_proj.lora_A.weight"),
        ({"base_model_name_or_path": "not/at-all/here"}, "peft: its adapters need their base not/at-all/here: "),
        ({"target_modules": ["q_prj"]}, "lora.target_modules: llama has no module 'q_prj'; did you mean 'q_proj'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(exported, tmp_path, changes, message):
    copied = tmp_path / "peft"
    copied.mkdir()
    for file in (exported[0] / "peft").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=message):
        load_adapters(copied)


def test_what_peft_has_no_place_for_is_refused(tmp_path, capsys):
    save_adapters(tmp_path / "own", tmp_path / "base", "final_norm.scale")
    assert main(["export-hf", str(tmp_path / "own"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "final_norm.scale was trained too, for which PEFT's layout has no place" in capsys.readouterr().err
    assert main(["export-hf", str(tmp_path / "base"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "base: has no adapters; leave --adapter out" in capsys.readouterr().err


@pytest.mark.parametrize("adapters", ["own", "peft"])
def test_adapters_are_not_merged_with_models(exported, tmp_path, adapters, capsys):
    folder, _ = exported
    assert main(["merge", str(folder / "base"), str(folder / adapters), "--output", str(tmp_path / "out")]) == 2
    assert f"{folder / adapters}" in (told := capsys.readouterr().err)
    assert "is adapters; merge the folder of the whole model that `grit-jax export-hf` writes" in told
    assert not (tmp_path / "out").exists()
