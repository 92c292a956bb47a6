"""The quickstart from a pretrained base, at its smallest."""

import functools
import json
import math
import os
import re
import signal

import jax
import numpy as np
import pytest

from grit_jax import GritModel, Trainer
from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig, load_config
from grit_jax.hf.model_folder import save_folder
from grit_jax.model.pretrained import Pretrained
from grit_jax.quickstart import docstrings, job, sizing
from grit_jax.quickstart.measuring import model_scores, ranks_of, read_task, retrieval_scores
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.callbacks import Callback
from tests import models
from tests.quickstart.objects import documented

LIMIT = 192  # bytes of a text; the instruction of a query takes 101
SMALL = [
    "--train.steps=3", "--data.embedding_batch=8", "--data.generative_batch=8", "--checkpoint.every=1",
    *(f"--data.{name}_max_length={LIMIT}" for name in ("query", "passage", "generative")),
]  # fmt: skip
MEASURED = 12


@pytest.fixture(scope="module", autouse=True)
def small_corpus():
    """Few objects, of which a sample is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "collect_objects", lambda _: documented(300))
        patch.setattr(sizing, "_MEASURE_SECONDS", 0)
        patch.setattr(sizing, "_LEAST_MEASURED", MEASURED)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    config = models.shape()
    about = Pretrained(config, EmbeddingConfig(), Tokenizer.load("bytes"), load=dict)
    save_folder(folder, about, models.weights(config))
    return folder


def quickstart(base, output, *more):
    return main(["quickstart", "--base", str(base), "--output", str(output), *SMALL, *more])


@pytest.fixture(scope="module")
def output(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "run"
    assert quickstart(base, output) == 0
    return output


def report_of(output):
    return json.loads((output / "report.json").read_text())


def test_the_base_takes_the_place_of_the_untrained_model(base, output):
    report = report_of(output)
    assert report["base"] == str(base)
    loss = report["generation"]["loss_per_token"]
    assert loss.keys() == {"base", "trained", "unigram"}
    assert loss["trained"] < loss["base"]
    task, model = read_task(output / "data/retrieval"), GritModel.load(base)
    scores = model_scores(model, task, instruction=docstrings.DESCRIBE, max_lengths=(LIMIT, LIMIT))
    for name, figure in retrieval_scores(ranks_of(scores, task.relevant)).items():
        assert report["retrieval"][name].keys() == {"base", "trained", "bm25"}
        assert np.isclose(report["retrieval"][name]["base"], figure, rtol=1e-6)
    prompt, answer = report["base_answers"][0].values()
    assert answer == model.generate(prompt, max_new_tokens=48)


def test_searches_and_answers_of_both_are_reported(output):
    report = report_of(output)
    for name in ("searches", "answers"):
        assert len(report[name]) == len(report[f"base_{name}"]) == 3
    assert [one["query"] for one in report["searches"]] == [one["query"] for one in report["base_searches"]]
    assert report["searches"] != report["base_searches"]


def test_training_starts_from_the_base_with_its_own_tokenizer(base, output):
    assert load_config(output / "config.yaml").model.init == str(base)
    assert not (output / "tokenizer").exists()
    assert GritModel.load(output / "hf").tokenizer.fingerprint == GritModel.load(base).tokenizer.fingerprint


def test_a_sample_of_the_held_out_queries_is_measured_where_time_is_short(output, capsys):
    corpus = report_of(output)["corpus"]
    assert corpus["held_out_queries"] == len(read_task(output / "data/retrieval").queries) == MEASURED
    assert corpus["held_out_queries_in_all"] == corpus["held_out_objects"] > MEASURED
    assert len((output / "data/validation/embedding/describe.jsonl").read_text().splitlines()) == MEASURED


def test_a_second_call_shows_the_finished_report(base, output, capsys, monkeypatch):
    monkeypatch.setattr(job, "Trainer", lambda *_: pytest.fail("trained again"))
    monkeypatch.chdir(base.parent)
    assert quickstart(base.name, output) == 0  # the same base, by another name
    shown = capsys.readouterr().out
    assert "trained further" in shown and "finished earlier" in shown


class Stop(Callback):
    """Ends the run after its first step, as a preemption does."""

    def step_ended(self, run, step, values):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_goes_on_with_the_size_it_began_with(base, output, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(job, "Trainer", functools.partial(Trainer, callbacks=[Stop()]))
        assert quickstart(base, tmp_path / "run") == 75
    monkeypatch.setattr(sizing, "choose_size", lambda *_, **__: pytest.fail("sized anew"))
    capsys.readouterr()
    assert quickstart(base, tmp_path / "run") == 0
    assert "measuring the base" not in capsys.readouterr().out
    resumed, whole = report_of(tmp_path / "run"), report_of(output)
    for name in ("retrieval", "generation", "searches", "answers", "base_searches"):
        assert resumed[name] == whole[name]


def refused(arguments, capsys):
    assert main(["quickstart", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_folder_of_another_base_is_refused_by_name(base, output, tmp_path, capsys):
    message = refused(["--base", "org/other", "--output", output], capsys)
    assert f"{output} holds a quickstart made with --base {base}, and this one has --base org/other" in message
    message = refused(["--output", output], capsys)
    assert f"made with --base {base}, and this one has no --base; choose another --output" in message
    (tmp_path / "data").mkdir()
    (tmp_path / "data/counts.json").write_text("{}")
    assert "made with no --base" in refused(["--base", base, "--output", tmp_path], capsys)


def test_a_base_that_is_not_there_is_named(tmp_path, capsys):
    message = refused(["--base", tmp_path / "nowhere", "--output", tmp_path / "run"], capsys)
    assert "nowhere: nothing there" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_base_without_network_is_named(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, nowhere))
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refused(["--base", "org/small", "--output", tmp_path / "run"], capsys)
    assert "org/small: not a folder here, not in the cache, and the Hub cannot be reached" in message


def test_a_family_that_is_not_supported_is_named(base, tmp_path, capsys):
    config = json.loads((base / "config.json").read_text()) | {"model_type": "bert"}
    for path in base.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(["--base", tmp_path, "--output", tmp_path / "run"], capsys)
    assert "model_type" in message and "'bert'" in message and "llama" in message


def test_a_base_whose_state_fits_no_device_is_refused_with_what_would_fit(base, tmp_path, capsys, monkeypatch):
    limit = 1 << 15
    monkeypatch.setattr(sizing, "device_memory", lambda *_: limit)
    message = refused(["--base", base, "--output", tmp_path / "run", *SMALL], capsys)
    pattern = r"--base (.*): weights, .* of its ([\d,]+) parameters need .*; choose a base of fewer than ([\d,]+) param"
    name, *counts = re.search(pattern, message).groups()
    parameters, fitting = (int(count.replace(",", "")) for count in counts)
    assert name == str(base)
    assert parameters == sum(leaf.size for leaf in jax.tree.leaves(GritModel.load(base).params)) > fitting
    assert math.isclose(16 * fitting, limit * jax.device_count(), rel_tol=0.1)
    assert not (tmp_path / "run").exists()
