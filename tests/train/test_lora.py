"""The laws of training adapters."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, Checkpoints, save_params
from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.config import EmbeddingConfig, LoRAConfig, MeshConfig, load_config
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import abstract_model, init_params
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.dry_run import dry_run
from grit_jax.train.loop import Trainer
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.setup import set_up
from grit_jax.train.state import merged, shardings_of
from grit_jax.train.step import JointObjective
from tests.commands import TINY, losses, write_data
from tests.models import shape
from tests.packing import relative_error
from tests.train.test_step import ARCHITECTURE, BASE, make_batch, with_model, with_train

TOLERANCE = 1e-5
LORA = LoRAConfig(r=4, alpha=8.0)


def with_lora(lora, config=BASE):
    return dataclasses.replace(with_model(config, init="base"), lora=lora)


def parameters(lora):
    """Parameters whose adapters matter, as two nested dicts: the adapters, and the others."""
    params = flatten_dict(init_params(ARCHITECTURE, jax.random.key(0), 16, lora))
    for number, path in enumerate(sorted(params)):
        if path[-2:] == ("lora", "b"):
            params[path] = 0.3 * jax.random.normal(jax.random.key(number), params[path].shape)
    parts = ({path: leaf for path, leaf in params.items() if ("lora" in path) is own} for own in (True, False))
    return tuple(unflatten_dict(part) for part in parts)


def gradients(config, batch, *, mesh=MeshConfig(1, 1, 1), num_devices=1, steps=(3,)):
    """Loss of each of some steps, and its gradient by the adapters, on the host."""
    mesh = sharding.make_mesh(mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        setup = set_up(config, mesh)
        placed = shardings_of(setup.abstract)
        trainable, frozen = jax.device_put(parameters(config.lora), (placed.trainable, placed.frozen))

        @jax.jit
        @jax.value_and_grad
        def loss(trainable, frozen, batch, step):
            return setup.objective(merged(trainable, frozen), batch, step)[0]

        batch = sharding.place_batch(mesh, batch)
        return [jax.device_get(loss(trainable, frozen, batch, jnp.int32(step))) for step in steps]


def assert_same(found, expected):
    assert relative_error(found[0], expected[0]) < TOLERANCE
    errors = jax.tree.map(relative_error, found[1], expected[1])
    assert max(jax.tree.leaves(errors)) < TOLERANCE, errors


def test_gradients_are_those_of_matrices_with_the_products_added():
    trainable, frozen = parameters(LORA)
    dense = JointObjective(abstract_model(ARCHITECTURE, 16), trained_objectives(BASE), PLAIN)

    @jax.jit
    @jax.value_and_grad
    def reference(trainable, batch):
        params, adapters = flatten_dict(frozen), flatten_dict(trainable)
        for path in params:
            if (*path[:-1], "lora", "a") in adapters:
                a, b = (adapters[*path[:-1], "lora", name] for name in "ab")
                params[path] += 8 / 4 * jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(a, b)
        return dense(unflatten_dict(params), batch)[0]

    (found,) = gradients(with_lora(LORA), make_batch())
    assert_same(found, jax.device_get(reference(trainable, make_batch())))


def test_dropout_depends_on_the_step_and_not_on_mesh_chunks_or_packing():
    config = with_lora(dataclasses.replace(LORA, dropout=0.3))
    plain, later = gradients(config, make_batch(), steps=(3, 4))
    assert relative_error(later[0], plain[0]) > 10 * TOLERANCE
    config = with_train(with_model(config, remat="full", layer_rows=1), embedding_chunks=2, generative_chunks=2)
    batch = make_batch(16, 16, order=list(np.random.default_rng(2).permutation(24)), length=48)
    (found,) = gradients(config, batch, mesh=MeshConfig(2, 2, 2), num_devices=8)
    assert_same(found, plain)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


SHAPE = {"embed_dim": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def save_base(folder, seed=0):
    architecture = shape(**SHAPE)
    params = init_params(architecture, jax.random.key(seed))
    about = CheckpointMetadata(architecture, EmbeddingConfig(), Tokenizer.load("bytes").files())
    save_params(folder, params, about)
    return params


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return folder, save_base(folder)


def config(data, base, output, *more):
    lengths = [option for option in TINY if not option.startswith("--model")]
    options = [
        *lengths, f"--model.init={base}", "--model.tokenizer=null", f"--data.train={data}", f"--train.output={output}",
        "--train.steps=4", "--optimizer.learning_rate=0.01", "--optimizer.warmup_ratio=0", "--lora.r=4",
        "--lora.dropout=0.1", *more,
    ]  # fmt: skip
    return load_config(_plain(output), options)


def _plain(output):
    """A config file without an architecture, which `model.init` brings."""
    path = output.parent / "config.yaml"
    path.write_text("data: {group_size: 2}\nloss: {temperature: 0.05}\n")
    return path


@pytest.fixture(scope="module")
def run(data, base, tmp_path_factory):
    """A finished run of four steps, and its trainer."""
    output = tmp_path_factory.mktemp("runs") / "run"
    trainer = Trainer(config(data, base[0], output, '--train.trainable=["final_norm.*"]'))
    assert trainer.fit()
    return output, trainer


def test_a_run_trains_adapters_and_what_is_named_and_no_bit_of_the_rest(run, base):
    trained = flatten_dict(jax.device_get(run[1].state.params), sep=".")
    before = flatten_dict(jax.device_get(base[1]), sep=".")
    moved = {path for path in before if not np.array_equal(before[path], trained[path])}
    assert moved == {"final_norm.scale"}
    assert all(np.any(trained[path]) for path in trained if path.endswith("lora.b"))


def test_a_checkpoint_holds_what_was_trained_and_the_base_by_name_and_fingerprint(run, base):
    output, trainer = run
    checkpoints = Checkpoints(output / "checkpoints", read_only=True)
    names = checkpoints.parameter_names(4)
    assert names == {"final_norm.scale", *(path for path in names if ".lora." in path)}
    assert len(names) == 1 + 2 * 7
    adapter = checkpoints.metadata(4).adapter
    assert adapter.base == str(base[0]) and adapter.lora == trainer.config.lora
    assert adapter.fingerprint == GritModel.load(base[0]).fingerprint(rounded=True)


def test_a_run_opens_as_a_model_beside_its_base_and_merged_into_it(run, tmp_path):
    output, trainer = run
    here = trainer.model()
    texts = ["red", "a longer text"]
    expected = here.encode(texts)
    opened = GritModel.load(output)
    np.testing.assert_allclose(opened.encode(texts), expected, rtol=0, atol=1e-6)
    pretrained, params = load_for_conversion(output)
    assert pretrained.lora.r is None
    assert not [path for path in flatten_dict(params) if "lora" in path]
    whole = tmp_path / "merged"
    about = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(whole, params, about)
    again = GritModel.load(whole)
    np.testing.assert_allclose(again.encode(texts), expected, rtol=0, atol=1e-5)
    assert relative_error(again.logits(["red"])[0], opened.logits(["red"])[0]) < 1e-5


def test_a_run_resumes_exactly_and_on_another_mesh(run, base, data, tmp_path):
    output, _ = run
    halves = tmp_path / "halves"
    shutil.copytree(output, halves)
    shutil.rmtree(halves / "checkpoints/4")
    trained = '--train.trainable=["final_norm.*"]'
    again = Trainer(config(data, base[0], halves, trained, "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"))
    assert again.step == 2
    assert again.fit()
    assert np.allclose(losses(halves), losses(output), rtol=1e-5, atol=0)


def test_a_changed_base_is_refused(run, base, data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run[0], output)
    moved = tmp_path / "base"
    shutil.move(base[0], moved)
    try:
        with pytest.raises(InputError, match=r"run: its adapters need their base .*base: .*nothing there"):
            GritModel.load(output)
        save_base(base[0], seed=1)
        message = (
            r"its adapters were trained on .* when that had the fingerprint [0-9a-f]{16}; now it has [0-9a-f]{16}: put"
        )
        with pytest.raises(InputError, match=message):
            GritModel.load(output)
        with pytest.raises(InputError, match=message):
            Trainer(config(data, base[0], output, '--train.trainable=["final_norm.*"]'))
    finally:
        shutil.rmtree(base[0])
        shutil.move(moved, base[0])


def test_a_new_projection_head_is_trained_and_stored(base, data, tmp_path):
    settings = config(data, base[0], tmp_path / "run", "--model.embedding.projection_dim=8", "--train.steps=1")
    trainer = Trainer(settings)
    assert trainer.config.train.trainable == ["projection.*"]
    assert trainer.fit()
    np.testing.assert_allclose(
        GritModel.load(tmp_path / "run").encode(["red"]), trainer.model().encode(["red"]), rtol=0, atol=1e-6
    )


def test_a_dry_run_counts_adapters_and_names_a_module_that_is_not_there(base, data, tmp_path):
    checks = {check.target: check for check in dry_run(config(data, base[0], tmp_path / "run", "--mesh.data=8"))}
    assert all(check.passed for check in checks.values()), checks
    wrong = config(data, base[0], tmp_path / "run", "--lora.target_modules=[q_prj]", "--mesh.data=8")
    shapes = next(check for check in dry_run(wrong) if check.target == "shapes")
    assert not shapes.passed and "did you mean 'q_proj'" in shapes.text
