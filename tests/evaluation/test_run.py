import json
import shutil

import numpy as np
import pytest

from grit_jax.config import InputError
from grit_jax.evaluation.run import evaluate
from grit_jax.evaluation.suite import TYPES, load_suite
from tests.evaluation.tasks import WORDS, write_jsonl, write_suite
from tests.models import make


def test_every_type_is_scored_with_an_interval_around_the_score(report):
    tasks = report[1]["tasks"]
    assert {one["type"] for one in tasks.values()} == set(TYPES)
    for name, one in tasks.items():
        if name == "alpaca":
            assert (one["main_score"], one["interval"], one["metric"]) == (None, None, None)
            continue
        low, high = one["interval"]
        assert low <= one["main_score"] <= high
        assert one["num_examples"] > 0
    assert tasks["choice"]["chance"] == 0.25
    assert tasks["choice"]["num_examples"] == 10  # two of twelve rows are examples
    assert tasks["sums"]["num_examples"] == 4
    assert tasks["programs"]["num_too_long"] == 0


def test_a_second_model_run_gives_the_same_bytes(report, model, suite, tmp_path):
    evaluate(model, load_suite(suite), output=tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == report[0].read_bytes()
    for name in ("alpaca", "sums", "programs"):
        assert (tmp_path / f"report.{name}.json").read_bytes() == report[0].with_name(
            f"report.{name}.json"
        ).read_bytes()


def test_alpaca_evals_file_has_its_format(report):
    answers = json.loads(report[0].with_name("report.alpaca.json").read_text())
    assert [sorted(answer) for answer in answers] == [["dataset", "generator", "instruction", "output"]]


def test_finished_tasks_are_kept_until_something_changes(model, tmp_path, capsys):
    answers, other = tmp_path / "answers.jsonl", tmp_path / "other.jsonl"
    for path in (answers, other):
        write_jsonl(path, [{"text": [f"say {word}", f"{word}!"]} for word in WORDS])
    tasks = [{"name": name, "type": "perplexity", "path": f"{name}.jsonl"} for name in ("answers", "other")]
    output = tmp_path / "report.json"

    def kept(some_model=model, **settings):
        evaluate(some_model, load_suite(write_suite(tmp_path, tasks, **settings)), output=output)
        return capsys.readouterr().err.count(": kept, ")

    assert kept() == 0
    first = output.read_bytes()
    assert kept() == 2
    assert output.read_bytes() == first
    tasks[0]["max_length"] = 45
    assert kept() == 1
    write_jsonl(other, [{"text": ["say so", "so!"]}])
    assert kept() == 1
    assert kept(seed=1) == 0
    assert kept(make(max_length=1024, seed=1), seed=1) == 0
    (tmp_path / "moved").mkdir()
    for path in (answers, other):
        shutil.move(path, tmp_path / "moved")
        next(task for task in tasks if task["name"] == path.stem)["path"] = f"moved/{path.name}"
    assert kept(make(max_length=1024, seed=1), seed=1) == 2
    output.write_text("[]")
    with pytest.raises(InputError, match="is there and is no report"):
        kept()


def test_loss_per_token_is_that_of_the_logits(report, model):
    losses = []
    for word in WORDS:
        before = f"<|user|>\nsay {word}\n<|assistant|>\n"
        logits = model.logits([f"{before}{word}!</s>"])[0]
        scored = [*f"{word}!", "</s>"]
        ids = [model.tokenizer.encode(text).ids[0] for text in scored]
        rows = logits[len(before) : len(before) + len(ids)].astype(np.float64)
        losses += (np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(ids)), ids]).tolist()
    assert np.isclose(report[1]["tasks"]["loss"]["main_score"], np.mean(losses), atol=1e-4)
