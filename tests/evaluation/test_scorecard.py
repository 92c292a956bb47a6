"""Both skills in a few numbers, alone and while a run goes on."""

import math

import numpy as np
import pytest

from grit_jax.config import ScorecardConfig, load_config
from grit_jax.errors import InputError
from grit_jax.evaluation.scorecard import Scorecard
from grit_jax.evaluation.suite import load_suite
from grit_jax.evaluation.task import Session
from grit_jax.inference.model import GritModel
from grit_jax.runs.logs import read_lines
from grit_jax.train.loop import Trainer
from tests.commands import ROOT, train_arguments, write_data
from tests.evaluation.tasks import write_all, write_suite
from tests.multiprocess import launch

SEARCH = {"name": "search", "type": "retrieval", "path": "retrieval", "instruction": "find"}
SIMILAR = {"name": "similar", "type": "sts", "path": "sts.tsv"}
CHOICE = {"name": "choice", "type": "multiple_choice", "path": "choices.jsonl"}
LOSS = {"name": "loss", "type": "perplexity", "path": "answers.jsonl"}
SUMS = {"name": "sums", "type": "exact_match", "path": "sums.jsonl", "compare": "number", "max_new_tokens": 4}

TRAIN = """
    import sys
    from grit_jax.config import load_config
    from grit_jax.evaluation.scorecard import Scorecard
    from grit_jax.train.loop import Trainer

    config = load_config(sys.argv[1], sys.argv[2:])
    assert Trainer(config, Scorecard(config.scorecard)).fit()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_all(folder)
    return folder


def card(folder, tasks, **settings):
    return Scorecard(ScorecardConfig(suite=str(write_suite(folder, tasks)), **settings))


def test_scores_are_those_of_the_tasks_and_their_means_those_of_the_skills(model, folder):
    found = card(folder, [SEARCH, SIMILAR, CHOICE, LOSS], embedding_weight=0.25)(model)
    suite = load_suite(folder / "suite.yaml")
    scores = {}
    for task in suite.tasks:
        outcome = task.evaluate(Session(model, suite.max_length, suite.seed))
        scores[task.name] = found[f"scorecard/{task.name}"]
        assert scores[task.name] == outcome.score(outcome.examples)
    embedding = (scores["search"] + scores["similar"]) / 2
    generative = (scores["choice"] + math.exp(-scores["loss"])) / 2
    assert found["scorecard/embedding"] == pytest.approx(embedding)
    assert found["scorecard/generative"] == pytest.approx(generative)
    assert found["scorecard/both"] == pytest.approx(0.25 * embedding + 0.75 * generative)


def test_a_suite_of_one_skill_has_no_score_of_both(model, folder):
    assert set(card(folder, [SEARCH])(model)) == {"scorecard/search", "scorecard/embedding"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "a", "type": "alpaca_eval", "path": "alpaca.json"}, r"suite.yaml: task 'a' has no score; leave it"),
        ({"name": "a", "type": "sts", "path": "absent.tsv"}, r"absent.tsv"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(folder, task, message):
    with pytest.raises(InputError, match=message):
        card(folder, [task])


def test_a_trainer_refuses_a_suite_that_nothing_measures(tmp_path):
    config = load_config(ROOT / "configs/tiny.yaml", [f"--train.output={tmp_path}", "--scorecard.suite=suite.yaml"])
    with pytest.raises(InputError, match=r"scorecard.suite=suite.yaml: nothing measures it; give Trainer a scorecard"):
        Trainer(config)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_logs_the_scores_of_the_model_that_it_saves_and_keeps_the_best(num_processes, folder, tmp_path):
    suite = write_suite(folder, [SEARCH, LOSS, SUMS])
    _, *arguments = train_arguments(
        write_data(tmp_path / "data"), tmp_path / "run", "--train.steps=6", f"--scorecard.suite={suite}",
        "--scorecard.every=2", "--checkpoint.keep=1", "--checkpoint.keep_best=1", "--optimizer.learning_rate=0.05",
        "--checkpoint.best_metric=scorecard/search", "--checkpoint.best_is=largest",
    )  # fmt: skip
    launch.run(TRAIN, *arguments, num_processes=num_processes, devices_each=4 // num_processes)
    logged = {line["step"]: line for line in read_lines(tmp_path / "run/metrics.jsonl") if "scorecard/both" in line}
    assert list(logged) == [2, 4, 6]
    best = max(logged, key=lambda step: logged[step]["scorecard/search"])
    kept = {int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {best, 6}
    for step in kept:
        found = Scorecard(ScorecardConfig(suite=str(suite)))(GritModel.load(tmp_path / "run", step=step))
        for name, value in found.items():
            assert np.isclose(logged[step][name], value, rtol=1e-4), name
