"""A pod of two hosts that really trains, in two processes of this machine, is preempted and trains on.

The devices of the two hosts take turns in the mesh, as those of a pod do.
"""

import sys
import threading

import jax
import numpy as np
import pytest

from tests.commands import TINY, environment, grit_jax, losses, train_arguments, write_data
from tests.launch.cloud import Cloud, make_repository
from tests.launch.test_run import wait_for
from tests.multiprocess.faults import checkpoint_steps, weights
from tests.multiprocess.launch import free_address

STEPS = 12
OPTIONS = [f"--train.steps={STEPS}", "--checkpoint.every=2", "--logging.every=1"]
VARIABLES = environment(devices=2, device_order="interleaved")
EXPORTS = " ".join(["export", *(f'{name}="{VARIABLES[name]}"' for name in ("XLA_FLAGS", "PYTHONPATH", "DEVICE_ORDER"))])

# The grit-jax of a host. What is otherwise on a TPU is told here: who the peers are, and that the bucket is a folder.
PROGRAM = f"""#!/bin/bash
[[ $1 == train ]] || exit 0
bucket="$FAKE_GCLOUD/bucket"
gcloud storage cat "$2" | sed "s#gs://#$bucket/#" > "$HOME/config.yaml"
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$bucket/b/compiled"
{EXPORTS}
exec {sys.executable} -c 'import sys; from grit_jax.cli.main import main; sys.exit(main())' train "$HOME/config.yaml" \\
  --distributed.coordinator="$(cat "$FAKE_GCLOUD/address")" --distributed.num_processes=2 \\
  --distributed.process_id="$FAKE_WORKER" --distributed.timeout_seconds=10
"""


def train(cloud):
    """A run over two hosts; its exit code and what it printed."""
    cloud.plan(workers=2)
    (cloud.home / "address").write_text(free_address())
    write_data(cloud.home / "bucket/b/data")
    overrides = [*TINY, "--data.train=gs://b/data", *OPTIONS]
    return cloud.run("--spot", "--poll=1", "--", *overrides, timeout=300)


@pytest.mark.long
def test_a_preempted_pod_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    repository = make_repository(tmp_path)
    disturbed, undisturbed = (Cloud(tmp_path / name, repository, PROGRAM) for name in ("disturbed", "undisturbed"))
    output = disturbed.home / "bucket/b/runs/run"

    def disturb():
        wait_for(lambda: 4 in checkpoint_steps(output), seconds=200)
        (disturbed.home / "address").write_text(free_address())
        disturbed.gcloud("fake", "preempt", "run")

    fault = threading.Thread(target=disturb)
    fault.start()
    code, printed = train(disturbed)
    fault.join()
    assert code == 0, printed
    assert len(disturbed.calls("compute", "tpus", "queued-resources", "create")) == 2
    assert "resumed from step" in printed

    code, printed = train(undisturbed)
    assert code == 0, printed
    other = undisturbed.home / "bucket/b/runs/run"
    assert losses(output)[-1] == losses(other)[-1]
    for ours, theirs in zip(jax.tree.leaves(weights(output)), jax.tree.leaves(weights(other)), strict=True):
        assert np.array_equal(ours, theirs)

    # Both hosts have filled the rows that their devices hold: one process with all of them finds the same losses.
    data = undisturbed.home / "bucket/b/data"
    alone = grit_jax(*train_arguments(data, tmp_path / "alone", *OPTIONS), devices=4)
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_allclose(losses(output), losses(tmp_path / "alone"), rtol=1e-5)
