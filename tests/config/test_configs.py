"""The files in configs/: all load, and the paper's models have the paper's settings."""

import math
import re

import pytest
import yaml

from grit_jax.config import LossConfig, OptimizerConfig, load_config
from grit_jax.model.transformer import abstract_model, abstract_params
from tests.commands import ROOT

CLAIM = [ROOT / f"configs/claim/{name}.yaml" for name in ("unified", "large")]
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), *CLAIM, ROOT / "configs/claim/pretrained.yaml"]
# Of each config of the claim: its file of ablations, and the steps of the baseline that they are written for.
ABLATED = {"unified": ("ablations", 100), "pretrained": ("pretrained_ablations", 120)}
ABLATIONS = [
    (config, steps, name, changes)
    for config, (file, steps) in ABLATED.items()
    for name, changes in yaml.safe_load((ROOT / f"configs/claim/{file}.yaml").read_text()).items()
    if "merge" not in changes  # is not trained
]
PAPER = [path for path in FILES if path.name.startswith("gritlm_")]
PLANNED = [*PAPER, ROOT / "configs/first_pod.yaml"]
STEP_SECONDS = re.compile(r"takes a predicted ([\d.]+) s")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads(path):
    load_config(path)


@pytest.mark.parametrize(("config", "steps", "name", "changes"), ABLATIONS)
def test_every_ablation_changes_the_config_of_the_claim_and_sees_as_many_samples(config, steps, name, changes):
    path = ROOT / f"configs/claim/{config}.yaml"
    base = load_config(path, [f"--train.steps={steps}"])
    changed = load_config(path, [f"--train.steps={steps}", *(f"--{key}={value}" for key, value in changes.items())])
    assert (changed == base) == (not changes)
    for batch in ("embedding_batch", "generative_batch"):
        samples = changed.train.steps * getattr(changed.data, batch)
        assert math.isclose(samples, steps * getattr(base.data, batch), rel_tol=0.05)


def test_the_larger_model_of_the_claim_sees_the_same_samples_in_each_step():
    small, large = map(load_config, CLAIM)
    assert (small.data, small.loss) == (large.data, large.loss)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_models_have_its_hyperparameters(path):
    config = load_config(path)
    experts = "8x7b" in path.name
    assert config.optimizer == OptimizerConfig(
        name="adamw", learning_rate=2e-5, schedule="linear", warmup_ratio=0.03, b1=0.9, b2=0.999, weight_decay=0.0,
        clip_norm=1.0,
    )  # fmt: skip
    assert config.train.steps == 1253
    assert math.ceil(config.optimizer.warmup_ratio * config.train.steps) == 38
    assert (config.data.embedding_batch, config.data.generative_batch) == ((256 if experts else 2048), 256)
    assert (config.data.query_max_length, config.data.passage_max_length) == (256, 2048)
    assert (config.data.generative_max_length, config.data.group_size) == (2048, 2)
    if experts:
        loss = LossConfig(type="token", generative_weight=0.003, router_weight=0.02, embedding_weight=1 / 256)
    else:
        loss = LossConfig(type="mixed", sub_batch_samples=32, embedding_weight=1 / 8)
    assert config.loss == loss
    assert config.loss.temperature == 0.02
    assert config.model.embedding.attention == "bidirectional"
    assert config.model.embedding.pooling == "mean"
    assert config.model.embedding.projection_dim is None


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_models_name_their_base_and_have_its_size(path):
    config = load_config(path)
    architecture = config.model.architecture.resolve(32000)
    shapes = abstract_params(abstract_model(architecture))
    count = sum(math.prod(leaf.shape) for leaf in _leaves(shapes))
    base, size = ("models/mistralai/Mixtral-8x7B-v0.1", 46_702_792_704) if "8x7b" in path.name else (
        "models/mistralai/Mistral-7B-v0.1", 7_241_732_096
    )  # fmt: skip
    assert (config.model.init, count) == (base, size)
    assert config.data.train == ["data/medi2", "data/tulu2"]


def comment_of(path):
    """What the first lines of a config say."""
    return " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_configs_for_pods_say_what_their_plan_found_and_how(path):
    comment = comment_of(path)
    assert f"grit-jax plan configs/{path.name} --topology" in comment
    assert re.search(r"peak [\d.]+ of [\d.]+ GiB", comment)
    assert STEP_SECONDS.search(comment)


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_configs_for_pods_lose_about_five_minutes_at_most_when_a_pod_is_lost(path):
    config, seconds = load_config(path), float(STEP_SECONDS.search(comment_of(path))[1])
    between = config.checkpoint.every * seconds
    assert between <= 330
    assert between >= 270 or path not in PAPER  # a checkpoint of the paper's models takes its time, too
    assert config.checkpoint.keep >= 2  # where the newest is damaged, the one before it is there


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_models_are_watched_on_records_that_they_never_train_on(path):
    config = load_config(path)
    assert config.data.held_out or config.data.validation
    assert 0 < config.data.held_out <= 0.001  # the training data stay the paper's stand-ins, but for a trace
    assert config.train.eval_every and config.train.steps >= 5 * config.train.eval_every
    # Between two looks lies an hour at most.
    assert config.train.eval_every * float(STEP_SECONDS.search(comment_of(path))[1]) <= 3600


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]
