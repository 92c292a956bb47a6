import json
import subprocess
import sys

import pytest

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.config import EmbeddingConfig
from grit_jax.text.tokenizer import Tokenizer
from tests.evaluation.tasks import write_all
from tests.models import make, shape, weights


def save_checkpoint(folder, seed=0):
    """A model of random weights as a checkpoint."""
    config = shape(max_length=1024)
    metadata = CheckpointMetadata(config, EmbeddingConfig(), Tokenizer.load("bytes").files())
    save_params(folder, weights(config, seed=seed), metadata)
    return folder


# Succeeds where a process may have namespaces, and mount in them; it does not need bubblewrap.
NAMESPACES = """
import ctypes
system = ctypes.CDLL(None, use_errno=True)
mounts, others, recursive, private = 1 << 17, sum(1 << bit for bit in range(26, 31)), 1 << 14, 1 << 18
raise SystemExit(bool(system.unshare(mounts | others) or system.mount(None, b"/", None, recursive | private, None)))
"""


@pytest.fixture(scope="session")
def confined():
    """Skips a test where the kernel lets nobody confine programs."""
    if subprocess.run([sys.executable, "-c", NAMESPACES]).returncode:
        pytest.skip("this kernel, or the container around it, forbids user namespaces")


@pytest.fixture(scope="session")
def model():
    return make(max_length=1024)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The same model as a checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("evaluation") / "checkpoint")


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """A suite file with a task of every type."""
    return write_all(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def report(confined, model, suite, tmp_path_factory):
    """The report on it, and its text."""
    from grit_jax.evaluation.evaluate import evaluate
    from grit_jax.evaluation.suite import load_suite

    path = tmp_path_factory.mktemp("report") / "report.json"
    evaluate(model, load_suite(suite), output=path)
    return path, json.loads(path.read_text())
