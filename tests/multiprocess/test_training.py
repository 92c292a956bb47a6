"""Runs of several processes against the same run of one."""

import jax
import numpy as np
import pytest

from tests.multiprocess import launch
from tests.multiprocess.faults import weights
from tests.packing import relative_error
from tests.runs import ROOT, TINY, losses, write_data

TRAIN = """
    import sys
    from grit_jax.config import load_config
    from grit_jax.train.loop import Trainer

    assert jax.device_count() == 8
    assert Trainer(load_config(sys.argv[1], sys.argv[2:])).fit()
"""
MIXTRAL = [
    "--model.architecture.family=mixtral", "--model.architecture.num_experts=4",
    "--model.architecture.experts_per_token=2", "--loss.router_weight=0.02", "--loss.embedding_router_weight=0.01",
]  # fmt: skip
FEATURES = {
    "chunks, ring": [
        "--mesh.fsdp=8", "--train.embedding_chunks=2", "--train.generative_chunks=2", "--loss.negatives=ring",
    ],
    "tensor, layer rows, gathered": [
        "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--model.layer_rows=1", "--loss.negatives=gathered",
        "--data.exclude_duplicates=true",
    ],
    "experts, no packing": [*MIXTRAL, "--mesh.fsdp=4", "--mesh.expert=2", "--data.packing=false", "--model.remat=dots"],
    "data alone, dense": ["--mesh.data=8", "--loss.negatives=dense", "--loss.type=token"],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(feature, tmp_path):
    data = write_data(tmp_path / "data")
    options = [*TINY, *FEATURES[feature], f"--data.train={data}", "--train.steps=3"]
    runs = {}
    for processes in (1, 2, 4):
        runs[processes] = tmp_path / str(processes)
        arguments = [ROOT / "configs/tiny.yaml", *options, f"--train.output={runs[processes]}"]
        launch.run(TRAIN, *arguments, num_processes=processes, devices_each=8 // processes, timeout=600)
    expected, expected_weights = losses(runs[1]), weights(runs[1])
    assert len(expected) == 3
    for processes in (2, 4):
        assert np.allclose(losses(runs[processes]), expected, rtol=1e-5, atol=0)
        errors = jax.tree.map(relative_error, weights(runs[processes]), expected_weights)
        assert max(jax.tree.leaves(errors)) < 1e-4
