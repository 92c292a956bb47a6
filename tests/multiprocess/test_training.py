"""Runs of several processes against the same run of one."""

import jax
import numpy as np
import pytest

from tests.commands import ROOT, TINY, losses, write_data
from tests.multiprocess import launch
from tests.multiprocess.faults import weights
from tests.packing import relative_error

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
    "a part, the rest in bfloat16": [
        "--mesh.data=2", "--mesh.fsdp=4", '--train.trainable=["layers.mlp.*", "final_norm.*"]',
        "--train.frozen_dtype=bfloat16", "--logging.gradient_ratio_every=2",
    ],
    "data alone, dense": ["--mesh.data=8", "--loss.negatives=dense", "--loss.type=token"],
}  # fmt: skip


ORDERS = [(2, None), (2, "interleaved"), (4, "interleaved"), (4, 0)]  # processes, and how their devices are mixed


def compare(tmp_path, features, orders):
    """Trains in one process, then in several whose devices come in some orders, and compares losses and weights."""
    data = write_data(tmp_path / "data")
    options = [ROOT / "configs/tiny.yaml", *TINY, *features, f"--data.train={data}", "--train.steps=3"]

    def train(processes, order):
        output = tmp_path / f"{processes}-{order}"
        launch.run(
            TRAIN, *options, f"--train.output={output}",
            num_processes=processes, devices_each=8 // processes, device_order=order, timeout=600,
        )  # fmt: skip
        return losses(output), weights(output)

    expected, expected_weights = train(1, None)
    assert len(expected) == 3
    for processes, order in orders:
        found, found_weights = train(processes, order)
        assert np.allclose(found, expected, rtol=1e-5, atol=0), (processes, order)
        errors = jax.tree.map(relative_error, found_weights, expected_weights)
        assert max(jax.tree.leaves(errors)) < 1e-4, (processes, order)


def test_losses_and_weights_are_those_of_one_process_where_devices_of_hosts_alternate(tmp_path):
    compare(tmp_path, ["--mesh.data=2", "--mesh.fsdp=4"], [(2, "interleaved")])


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
def test_losses_and_weights_do_not_depend_on_the_processes_and_the_order_of_their_devices(feature, tmp_path):
    compare(tmp_path, FEATURES[feature], ORDERS)
