import json

import pytest

from grit_jax.checkpoint import CheckpointMetadata, save_params
from grit_jax.config import EmbeddingConfig
from grit_jax.tokenizer import Tokenizer
from tests.evaluation.tasks import write_all
from tests.models import make, shape, weights


def save_checkpoint(folder, seed=0):
    """A model of random weights as a checkpoint."""
    config = shape(max_length=1024)
    metadata = CheckpointMetadata(config, EmbeddingConfig(), Tokenizer.load("bytes").files())
    save_params(folder, weights(config, seed=seed), metadata)
    return folder


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
def report(model, suite, tmp_path_factory):
    """The report on it, and its text."""
    from grit_jax.evaluation.run import evaluate
    from grit_jax.evaluation.suite import load_suite

    path = tmp_path_factory.mktemp("report") / "report.json"
    evaluate(model, load_suite(suite), output=path)
    return path, json.loads(path.read_text())
