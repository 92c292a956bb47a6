"""The laws of runs that train a part of the parameters."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from grit_jax.checkpoints.checkpoint import Checkpoints
from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.config import MeshConfig, OptimizerConfig, TrainConfig, load_config
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import abstract_model, abstract_params, init_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.train.dry_run import dry_run
from grit_jax.train.loop import Trainer
from grit_jax.train.memory import state_and_gradient_bytes
from grit_jax.train.optimizer import make_optimizer
from grit_jax.train.setup import set_up
from grit_jax.train.state import EVERYTHING, Partition, merged, new_state, shardings_of
from tests.commands import ROOT, TINY, losses, write_data
from tests.packing import relative_error
from tests.train.test_step import BASE, MIXED, make_batch, with_train

MLPS = ["layers.mlp.*", "head", "projection.*"]
STEPS = 20


def with_optimizer(config):
    # Adam's epsilon keeps it from making steps of what rounding leaves of gradients that are 0.
    settings = OptimizerConfig(learning_rate=0.002, epsilon=1e-3, warmup_steps=0, weight_decay=0.1, clip_norm=0.5)
    return dataclasses.replace(with_train(config, steps=STEPS), optimizer=settings)


def steps(config, trainable, *, num_steps=STEPS, devices=1, mask=None, **changes):
    """Parameters before and after some steps on one batch, by path."""
    config = with_train(with_optimizer(config), trainable=trainable, **changes)
    mesh = sharding.make_mesh(MeshConfig(1, devices // 2 or 1, min(devices, 2)), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        setup = set_up(config, mesh)
        placed = shardings_of(setup.abstract)
        architecture, width = config.model.architecture, config.model.embedding.projection_dim
        params = jax.jit(init_params, static_argnums=(0, 2))(architecture, jax.random.key(0), width)
        step, make_state = setup.train_step, jax.jit(new_state, static_argnums=(1, 2), out_shardings=placed)
        state = make_state(params, setup.optimizer, setup.partition)
        if mask is not None:
            optimizer, step = masked(setup, config, mask)
            state = state._replace(opt_state=jax.jit(optimizer.init)(state.params))
        before = jax.device_get(state)
        batch = sharding.place_batch(mesh, make_batch())
        for _ in range(num_steps):
            state, metrics = step(state, batch)
        after = jax.device_get(state)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    return flatten_dict(before.params, sep="."), flatten_dict(after.params, sep="."), jax.device_get(metrics)


def masked(setup, config, trainable):
    """A step that differentiates by everything, and makes the gradients of frozen parameters 0 before it clips them."""
    frozen = {*flatten_dict(Partition(tuple(trainable)).split(setup.abstract.params)[1], sep=".")}

    def zero(path, gradient):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.zeros_like(gradient) if name in frozen else gradient

    # Weight decay is a term of the update too, and no gradient: what is frozen has none.
    axes = param_axes(abstract_model(config.model.architecture, config.model.embedding.projection_dim))
    axes = jax.tree_util.tree_map_with_path(
        lambda path, names: ("norm",) if jax.tree_util.keystr(path, simple=True, separator=".") in frozen else names,
        axes,
        is_leaf=lambda names: isinstance(names, tuple),
    )
    masks = optax.stateless(lambda gradient, _: jax.tree_util.tree_map_with_path(zero, gradient))
    optimizer = optax.chain(masks, make_optimizer(config.optimizer, STEPS, axes))

    @jax.jit
    def step(state, batch):
        (loss, _), gradient = jax.value_and_grad(setup.objective, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(trainable=params, opt_state=opt_state), {"loss": loss, "skipped": jnp.zeros(())}

    return optimizer, step


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 8])
def test_frozen_parameters_stay_bit_by_bit_and_the_others_are_those_of_masked_gradients(devices):
    before, after, _ = steps(BASE, MLPS, devices=devices)
    _, expected, _ = steps(BASE, ["*"], mask=MLPS, devices=devices)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path == "head" or path.startswith(("layers.mlp.", "projection."))}
    errors = {path: relative_error(after[path], expected[path]) for path in moved}
    assert max(errors.values()) < 1e-6, errors
    assert all(np.array_equal(expected[path], before[path]) for path in before if path not in moved)


def test_experts_can_be_frozen():
    router_and_attention = ["layers.attention.*", "layers.mlp.router.*"]
    before, after, _ = steps(MIXED, router_and_attention, num_steps=5)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith(("layers.attention.", "layers.mlp.router."))}


def test_the_frozen_part_may_be_bfloat16():
    _, narrow, few = steps(BASE, MLPS, num_steps=3, frozen_dtype="bfloat16")
    _, wide, many = steps(BASE, MLPS, num_steps=3)
    trained, frozen = Partition(tuple(MLPS)).split(abstract_params(abstract_model(BASE.model.architecture, 16)))
    assert {str(narrow[path].dtype) for path in flatten_dict(frozen, sep=".")} == {"bfloat16"}
    assert {str(narrow[path].dtype) for path in flatten_dict(trained, sep=".")} == {"float32"}
    rounded = {path: wide[path].astype(narrow[path].dtype) for path in flatten_dict(frozen, sep=".")}
    assert all(np.array_equal(narrow[path], value) for path, value in rounded.items())
    assert 0 < relative_error(few["loss"], many["loss"]) < 0.01


def test_state_and_gradients_shrink_by_what_the_frozen_part_no_longer_has():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])

    def state_bytes(**train):
        return state_and_gradient_bytes(set_up(with_train(with_optimizer(BASE), **train), mesh).abstract)

    model = abstract_params(abstract_model(BASE.model.architecture, 16))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(Partition(tuple(MLPS)).split(model)[1]))
    whole = state_bytes()
    assert whole - state_bytes(trainable=MLPS) == 3 * 4 * frozen, "two moments and a gradient, float32"
    assert whole - state_bytes(trainable=MLPS, frozen_dtype="bfloat16") == (3 * 4 + 2) * frozen


def test_a_tree_is_split_and_merged_by_one_rule():
    axes = param_axes(abstract_model(MIXED.model.architecture))
    trainable, frozen = Partition(("layers.attention.*", "*norm*")).split(axes)
    paths = {path for path in flatten_dict(axes, sep=".") if path.startswith("layers.attention.") or "norm" in path}
    assert set(flatten_dict(trainable, sep=".")) == paths
    assert merged(trainable, frozen) == axes
    assert EVERYTHING.split(axes) == (axes, {})


def test_patterns_that_name_nothing_are_refused():
    with pytest.raises(InputError, match=r"train.trainable=\[\] freezes every parameter"):
        TrainConfig(trainable=[])
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    message = (
        r"train.trainable: no parameter is called 'layers.mpl.down.kernel'; did you mean 'layers.mlp.down.kernel'\? "
        r"There are embedding, final_norm.scale, head, layers.attention.key.kernel, "
    )
    with pytest.raises(InputError, match=message):
        set_up(with_train(BASE, trainable=["head", "layers.mpl.down.kernel"]), mesh)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def config(data, output, *more):
    options = [*TINY, f"--data.train={data}", f"--train.output={output}", "--train.steps=4", *more]
    return load_config(ROOT / "configs/tiny.yaml", options)


PART = ['--train.trainable=["layers.mlp.*"]', "--train.frozen_dtype=bfloat16", "--logging.gradient_ratio_every=1"]


@pytest.mark.long
def test_a_run_that_trains_a_part_resumes_exactly_and_is_a_model_like_any_other(data, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    trainer = Trainer(config(data, whole, *PART))
    assert trainer.fit()
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints/4")
    again = Trainer(config(data, halves, *PART, "--mesh.fsdp=2", "--mesh.tensor=2", "--mesh.data=2"))
    assert again.step == 2
    assert again.fit()
    assert np.allclose(losses(halves), losses(whole), rtol=1e-5, atol=0)
    assert again.state.frozen["embedding"].dtype == jnp.bfloat16

    _, params = load_for_conversion(whole)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert np.array_equal(params["embedding"], jax.device_get(trainer.state.frozen["embedding"]).astype(np.float32))
    vectors = [model.encode(["red"]) for model in (trainer.model(), GritModel.load(whole))]
    np.testing.assert_allclose(*vectors, rtol=0, atol=1e-6)
    stored = Checkpoints(whole / "checkpoints", read_only=True).restore(4, trainer.state.params, None)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, trainer.state.params))


def test_a_run_that_was_begun_with_another_part_is_refused(data, tmp_path):
    assert Trainer(config(data, tmp_path / "run", *PART)).fit()
    changed = config(data, tmp_path / "run")
    with pytest.raises(InputError, match=r"train.trainable: \['layers.mlp.\*'\] -> \['\*'\].*put these values back"):
        Trainer(changed)
    assert "train.trainable" in next(check.text for check in dry_run(changed) if check.target == "resume")


def test_a_dry_run_says_what_a_part_needs(data, tmp_path):
    def memory(*more):
        """MiB of state and of gradients."""
        settings = config(data, tmp_path / "run", "--model.architecture.embed_dim=256", "--mesh.data=8", *more)
        text = next(check.text for check in dry_run(settings) if check.target == "memory")
        return [float(number) for number in re.findall(r"([\d.]+) MiB", text)[:2]]

    (state, gradients), (part, less) = memory(), memory(*PART)
    assert state == pytest.approx(3 * gradients, abs=0.2)
    assert 0 < less < gradients / 5
    assert part < state / 2
