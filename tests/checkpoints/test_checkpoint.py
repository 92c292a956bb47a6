import gc
import os
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import optax
import pytest

from grit_jax.checkpoints import checkpoint
from grit_jax.checkpoints.checkpoint import (
    CheckpointMetadata,
    Checkpoints,
    DamagedCheckpointError,
    is_checkpoint,
    open_checkpoint,
    save_params,
)
from grit_jax.config import CheckpointConfig, EmbeddingConfig, MeshConfig, TransformerConfig
from grit_jax.errors import InputError
from grit_jax.model.transformer import abstract_model, init_params
from grit_jax.parallel import sharding
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.state import abstract_state, new_state

ARCHITECTURE = TransformerConfig(embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2).resolve(258)
METADATA = CheckpointMetadata(
    ARCHITECTURE, EmbeddingConfig(pooling="cls"), Tokenizer.load("bytes").files(), "config", {"step": 3}
)
OPTIMIZER = optax.adamw(0.1)


def state_on(mesh_config, architecture=ARCHITECTURE):
    """A new state's shapes and shardings on 8 devices, and the state."""
    mesh = sharding.make_mesh(mesh_config, jax.devices())
    abstract = abstract_state(abstract_model(architecture), OPTIMIZER, mesh)
    state = new_state(init_params(architecture, jax.random.key(0)), OPTIMIZER)
    return abstract, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def test_a_state_restores_bit_by_bit_onto_another_mesh(tmp_path):
    _, state = state_on(MeshConfig(1, 8, 1))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state.params, state.opt_state, METADATA)
    checkpoints.close()
    abstract, _ = state_on(MeshConfig(2, 2, 2))
    again = Checkpoints(tmp_path / "c")
    params, opt_state = again.restore(3, abstract.params, abstract.opt_state)
    assert same(params, state.params)
    assert same(opt_state, state.opt_state)
    assert jax.tree.all(jax.tree.map(lambda x, like: x.sharding == like.sharding, params, abstract.params))
    assert again.metadata(3) == METADATA


def test_the_saved_arrays_are_those_of_the_call_even_when_their_memory_is_reused(tmp_path):
    _, state = state_on(MeshConfig(1, 4, 2))
    expected = jax.device_get(state.params)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state.params, None, METADATA)
    overwrite = jax.jit(lambda params: jax.tree.map(lambda x: x * 0 + 7, params), donate_argnums=0)
    jax.block_until_ready(overwrite(state.params))
    checkpoints.close()
    assert same(jax.device_get(load_whole(open_checkpoint(tmp_path / "c"))), expected)


def load_whole(pretrained):
    mesh = sharding.make_mesh(MeshConfig(8, 1, 1))
    return pretrained.load(
        jax.tree.map(lambda _: sharding.replicated(mesh), init_params(ARCHITECTURE, jax.random.key(0)))
    )


def test_the_newest_checkpoints_are_kept(tmp_path):
    _, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "c", keep=CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, state.params, None, METADATA)
    checkpoints.close()
    assert Checkpoints(tmp_path / "c").steps() == [2, 3]


def test_the_best_and_every_few_are_kept_beside_the_newest(tmp_path):
    _, state = state_on(MeshConfig(8, 1, 1))
    keep = CheckpointConfig(keep=1, keep_every=4, keep_best=2, best_metric="score", best_is="largest")
    checkpoints = Checkpoints(tmp_path / "c", keep=keep)
    for step, score in enumerate([None, 0.9, 0.1, 0.3, 0.8, None, 0.2]):
        checkpoints.save(step + 1, state.params, None, METADATA, score and {"score": score})
    checkpoints.close()
    assert Checkpoints(tmp_path / "c").steps() == [2, 4, 5, 7]  # 0.9, the fourth, 0.8, the newest


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in files(folder)}


def test_a_step_below_the_newest_is_saved_and_one_that_is_there_stays_as_it_is(tmp_path):
    _, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(5, state.params, None, METADATA)
    checkpoints.close()
    before = contents(tmp_path / "c/5")
    again = Checkpoints(tmp_path / "c")
    for step in (3, 5, 4):
        again.save(step, jax.tree.map(lambda x: x + 1, state.params), None, METADATA)
    again.close()
    assert again.steps() == [3, 4, 5]
    assert contents(tmp_path / "c/5") == before


def saved_with(folder, keep, scores):
    """Steps that are kept when each is saved with its score by a process of its own."""
    _, state = state_on(MeshConfig(8, 1, 1))
    for step, score in scores.items():
        checkpoints = Checkpoints(folder, keep=keep)
        checkpoints.save(step, state.params, None, METADATA, score)
        checkpoints.close()
    return Checkpoints(folder, read_only=True).steps()


def test_the_best_are_kept_by_processes_that_have_not_saved_them(tmp_path):
    keep = CheckpointConfig(keep=1, keep_best=2, best_metric="score", best_is="smallest")
    scores = {step: {"score": score} for step, score in [(1, 0.9), (2, 0.1), (3, 0.3), (4, 0.8), (5, 0.7)]}
    assert saved_with(tmp_path / "c", keep, scores) == [2, 3, 5]


def test_another_metric_no_number_and_damaged_metrics_are_not_among_the_best(tmp_path):
    keep = CheckpointConfig(keep=1, keep_best=2, best_metric="score", best_is="largest")
    assert saved_with(tmp_path / "c", keep, {1: {"score": 0.9}, 2: {"score": 0.8}}) == [1, 2]
    overwrite(tmp_path / "c/1/metrics/metrics")
    scores = {3: {"other": 7.0}, 4: {"score": float("nan")}, 5: {"score": 0.1}, 6: None}
    assert saved_with(tmp_path / "c", keep, scores) == [2, 5, 6]


DAMAGE = {
    "truncated": lambda folder: [os.truncate(file, file.stat().st_size // 2) for file in files(folder)],
    "overwritten": lambda folder: overwrite(max(files(folder), key=lambda file: file.stat().st_size)),
    "without its parameters": lambda folder: shutil.rmtree(folder / "params"),
    "without metadata": lambda folder: [file.unlink() for file in folder.rglob("*METADATA*")],
    "empty": lambda folder: [os.truncate(file, 0) for file in files(folder)],
}


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def overwrite(file):
    file.write_bytes(bytes(file.stat().st_size))


# When a read fails, Orbax closes its event loop while others are still at work, which then complain to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_others_stay_readable(tmp_path, damage):
    abstract, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, state.params, state.opt_state, METADATA, {"score": 1.0})
    checkpoints.close()
    DAMAGE[damage](tmp_path / "c/2")
    again = Checkpoints(tmp_path / "c")
    if 2 in again.steps():
        with pytest.raises(DamagedCheckpointError, match=r"c/2: the checkpoint is damaged \(.*\); other steps: 1"):
            again.metadata(2)
            again.restore(2, abstract.params, abstract.opt_state)
    assert again.metadata(1) == METADATA
    assert same(again.restore(1, abstract.params, abstract.opt_state)[0], state.params)
    gc.collect()  # here, not in the next test


def test_a_checkpoint_for_which_there_is_no_memory_is_not_damaged(tmp_path, monkeypatch):
    abstract, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state.params, state.opt_state, METADATA)
    checkpoints.close()

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 1.00G. That was not possible.")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Attempting to allocate"):
        Checkpoints(tmp_path / "c").restore(1, abstract.params, abstract.opt_state)


def test_runs_folders_and_single_checkpoints_open(tmp_path):
    params = init_params(ARCHITECTURE, jax.random.key(1))
    save_params(tmp_path / "run/checkpoints", params, METADATA)
    for path in ("run", "run/checkpoints", "run/checkpoints/0"):
        assert is_checkpoint(tmp_path / path)
        pretrained = open_checkpoint(tmp_path / path)
        assert pretrained.embedding.pooling == "cls"
        assert same(load_whole(pretrained), params)
    assert not is_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 5; there are steps 0"):
        open_checkpoint(tmp_path / "run", 5)


def test_reading_a_model_leaves_a_save_in_progress_alone(tmp_path):
    save_params(tmp_path / "run/checkpoints", init_params(ARCHITECTURE, jax.random.key(1)), METADATA)
    half_written = tmp_path / "run/checkpoints/7.orbax-checkpoint-tmp"
    half_written.mkdir()
    load_whole(open_checkpoint(tmp_path / "run"))
    assert not gone_within(half_written, seconds=3)
    writer = Checkpoints(tmp_path / "run/checkpoints")
    assert gone_within(half_written, seconds=60)  # a writer removes it beside its own work
    writer.close()


def gone_within(path, seconds):
    deadline = time.monotonic() + seconds
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not path.exists()


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path):
    _, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state.params, state.opt_state, METADATA)
    checkpoints.wait()
    other = TransformerConfig(
        embed_dim=24, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, tie_embeddings=False
    ).resolve(258)
    abstract, _ = state_on(MeshConfig(8, 1, 1), other)
    with pytest.raises(
        InputError, match=r"not a checkpoint of this model \(head is missing; embedding is \(258, 16\), not"
    ):
        checkpoints.restore(1, abstract.params, abstract.opt_state)


SAVER = """
    import resource, sys
    import jax
    from tests.checkpoints.test_checkpoint import METADATA, state_on
    from grit_jax.checkpoints.checkpoint import Checkpoints
    from grit_jax.config import MeshConfig

    _, state = state_on(MeshConfig(8, 1, 1))
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, state.params, state.opt_state, METADATA)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # every larger write fails, as on a full disk
    try:
        checkpoints.save(2, state.params, state.opt_state, METADATA)
        checkpoints.wait()
    except OSError as error:
        print("FAILED", error)
"""


def test_a_disk_that_is_full_while_saving_leaves_the_last_good_checkpoint(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path / "c")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "FAILED" in result.stdout, result.stderr
    assert "saving step 2 failed" in result.stdout
    assert "the last good checkpoint is step 1" in result.stdout
    abstract, state = state_on(MeshConfig(8, 1, 1))
    again = Checkpoints(tmp_path / "c")
    assert again.steps() == [1]
    assert same(again.restore(1, abstract.params, abstract.opt_state)[0], state.params)
