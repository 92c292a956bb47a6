"""Merged models against NumPy, and what cannot be merged."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from grit_jax.checkpoints import merging
from grit_jax.checkpoints.checkpoint import CheckpointMetadata, Checkpoints, read_metadata
from grit_jax.checkpoints.merging import merge
from grit_jax.checkpoints.opening import load_for_conversion, open_model
from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig
from grit_jax.errors import InputError
from grit_jax.hf.model_folder import save_folder
from grit_jax.inference.model import GritModel
from grit_jax.text.tokenizer import Tokenizer
from tests import models

EMBEDDING = EmbeddingConfig(pooling="last_token", projection_dim=16)


def write(folder, seed=0, embedding=EMBEDDING, tokenizer=Tokenizer.load("bytes"), steps=(0,), **changes):
    """A folder of checkpoints, each step with other weights."""
    config = models.shape(**changes)
    metadata = CheckpointMetadata(config, embedding, tokenizer.files())
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, models.weights(config, embedding.projection_dim, seed + step), None, metadata)
    checkpoints.close()
    return folder


def params_of(model):
    return jax.device_get(load_for_conversion(model)[1])


def export(checkpoint, folder):
    """The same model as a Hugging Face folder."""
    pretrained, params = load_for_conversion(checkpoint)
    save_folder(folder, pretrained, params)
    return folder


def tensors_of(folder):
    """Every tensor of a Hugging Face folder by name."""
    files = ("model", "projection")
    return {
        name: x for file in files for name, x in safetensors.numpy.load_file(folder / f"{file}.safetensors").items()
    }


@pytest.fixture
def two(tmp_path):
    """Two checkpoints."""
    return [write(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_model_merged_with_itself_is_that_model_bit_for_bit(two, tmp_path, method):
    a, _ = two
    merge([a, export(a, tmp_path / "hf")], tmp_path / "out", weights=[0.5, 0.5], method=method)
    assert same(params_of(tmp_path / "out"), params_of(a))
    if method == "linear":
        merge([a] * 3, tmp_path / "thirds")
        assert same(params_of(tmp_path / "thirds"), params_of(a))


def test_a_linear_merge_is_the_weighted_sum_of_runs_checkpoints_and_folders(two, tmp_path):
    run = write(tmp_path / "run/checkpoints", seed=5, steps=(3, 7)).parent
    merge([run, export(two[0], tmp_path / "hf"), two[1]], tmp_path / "out", weights=[0.7, 0.5, -0.2])
    parts = [params_of(path) for path in (run / "checkpoints/7", *two)]
    expected = jax.tree.map(lambda *x: sum(w * v for w, v in zip((0.7, 0.5, -0.2), x, strict=True)), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params_of(tmp_path / "out"), expected
    )
    model = GritModel.load(tmp_path / "out")
    assert model.embedding == EMBEDDING and model.encode("a text").shape == (16,)


def reference(first, second, t):
    """Spherical interpolation as mergekit computes it."""
    x, y = (tensor.astype(np.float64).ravel() for tensor in (first, second))
    norms = np.linalg.norm(x), np.linalg.norm(y)
    cosine = float(x / norms[0] @ (y / norms[1])) if all(norms) else 1.0
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).reshape(first.shape)
    whole = np.arccos(cosine)
    return (np.sin(whole * (1 - t)) / np.sin(whole) * x + np.sin(whole * t) / np.sin(whole) * y).reshape(first.shape)


def test_slerp_is_the_reference_of_every_stored_tensor(two, tmp_path):
    merge(two, tmp_path / "out", weights=[0.7, 0.3], method="slerp")
    a, b, found = (tensors_of(export(path, tmp_path / f"hf {path.name}")) for path in (*two, tmp_path / "out"))
    assert sum("layers.1." in name for name in found) > 5
    curved = 0
    for name, values in found.items():
        np.testing.assert_array_equal(values, reference(a[name], b[name], 0.3).astype(np.float32), err_msg=name)
        curved += not np.allclose(values, 0.7 * a[name] + 0.3 * b[name], rtol=1e-3)
    assert curved > 10


def test_slerp_of_nearly_parallel_tensors_or_of_nothing_is_linear():
    x, off = np.ones(50, np.float32), np.zeros(50, np.float32)
    off[0] = 0.1
    for y in (x + off, 2 * x, -x, 0 * x):
        assert np.array_equal(merging.slerp([x, y], [0.25, 0.75]), merging.linear([x, y], [0.25, 0.75]))
    y = np.concatenate([x[:25], -x[25:]])  # at a right angle, where the length is kept
    assert np.linalg.norm(merging.slerp([x, y], [0.5, 0.5])) == pytest.approx(np.linalg.norm(x))


def test_one_parameter_of_an_input_is_read_at_a_time(two, tmp_path, monkeypatch):
    read = []

    def opened(source):
        pretrained = open_model(source)

        def load(*arguments):
            found = pretrained.load(*arguments)
            read.append((source, *flatten_dict(found)))
            return found

        return dataclasses.replace(pretrained, load=load)

    monkeypatch.setattr(merging, "open_model", opened)
    inputs = [two[0], export(two[1], tmp_path / "hf")]
    merge(inputs, tmp_path / "out")
    parameters = list(flatten_dict(params_of(two[0])))
    assert all(len(each) == 2 for each in read) and len(read) == 2 * len(parameters)
    assert {each[1] for each in read} == set(parameters)


def test_the_last_checkpoints_of_a_run_make_a_soup_and_the_result_says_what_is_in_it(tmp_path):
    run = write(tmp_path / "run/checkpoints", steps=(2, 4, 10)).parent
    write(run / "params", steps=(5, 6), seed=9)
    assert main(["merge", str(run), "--last", "2", "--output", str(tmp_path / "soup")]) == 0
    sources = [f"{run}/checkpoints/{step}" for step in (4, 10)]
    assert read_metadata(tmp_path / "soup").merged == {"models": sources, "weights": [0.5, 0.5], "method": "linear"}
    merge(sources, tmp_path / "named")
    assert same(params_of(tmp_path / "soup"), params_of(tmp_path / "named"))
    assert main(["merge", str(run / "params"), "--last", "2", "--output", str(tmp_path / "other")]) == 0
    assert read_metadata(tmp_path / "other").merged["models"] == [f"{run}/params/{step}" for step in (5, 6)]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"mlp_dim": 64, "rope_theta": 5e5}, r"another architecture than \S+a/0 \(mlp_dim=64, there 48; rope_theta=50"),
        ({"tokenizer": models.bytes_with_ending()}, r"b/0 has another tokenizer than \S+a/0; only models of one"),
        ({"embedding": EmbeddingConfig(projection_dim=16)}, r"to make vectors than \S+ \(pooling='mean', there 'last_"),
    ],
)
def test_models_that_differ_in_a_setting_are_refused(other, told, tmp_path):
    inputs = [write(tmp_path / "a"), write(tmp_path / "b", **other)]
    with pytest.raises(InputError, match=told):
        merge(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("a", "merging takes two models or more, not 1; name another, or --last K of a run"),
        ("a --last 3", "a: holds 2 checkpoints (of steps 2, 4), not 3; ask for fewer"),
        ("a --last 1", "merging takes two models or more, not 1"),
        ("a/2 --last 2", "a/2 is one checkpoint; name its run folder"),
        ("a a --last 2", "--last 2 takes the checkpoints of one run, not 2 models"),
        ("a a --weights 0.5", "1 weights for 2 models; give one for each"),
        ("a a --weights 0.5 0.6", "weights 0.5 0.6 sum to 1.1, so the result would be scaled; make them sum to 1"),
        ("a a --weights nan 1", "weights nan 1 sum to nan"),
        ("a a a --method slerp", "slerp merges two models, not 3"),
        ("a nowhere", "nowhere: nothing there"),
        ("a a --output a", "a exists and is not empty; choose another folder"),
        ("a a --output file", "file exists and is not empty; choose another folder"),
    ],
)
def test_what_cannot_be_merged_is_one_clear_line_and_leaves_nothing(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", steps=(2, 4))
    (tmp_path / "file").write_text("x")
    there = sorted(tmp_path.rglob("*"))
    assert main(["merge", *arguments.split(), *([] if "--output" in arguments else ["--output", "out"])]) == 2
    errors = capsys.readouterr().err
    assert told in errors and len(errors.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_a_damaged_input_leaves_nothing(two, tmp_path):
    folder = export(two[1], tmp_path / "hf")
    values = safetensors.numpy.load_file(folder / "model.safetensors")
    values["model.norm.weight"][0] = np.nan
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinite values in model.norm.weight"):
        merge([two[0], folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
