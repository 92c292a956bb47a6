import json
import shutil

import numpy as np
import pytest

from grit_jax.errors import InputError
from grit_jax.evaluation.evaluate import evaluate
from grit_jax.evaluation.report import fingerprint
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
    with pytest.raises(InputError, match="exists and is not a report"):
        kept()


def test_a_finished_task_is_kept_only_with_the_files_that_it_wrote(model, tmp_path, capsys):
    write_jsonl(tmp_path / "sums.jsonl", [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(3)])
    task = {"name": "sums", "type": "exact_match", "path": "sums.jsonl", "max_new_tokens": 2}
    suite, output = load_suite(write_suite(tmp_path, [task])), tmp_path / "report.json"
    answers, examples = tmp_path / "report.sums.json", tmp_path / "examples/sums.npy"

    def kept(folder=examples.parent):
        evaluate(model, suite, output=output, examples=folder)
        return capsys.readouterr().err.count(": kept, ")

    assert (kept(None), kept(None)) == (0, 1)
    examples.parent.mkdir()
    np.save(examples, np.ones(3))  # another model's
    assert (kept(), kept(), kept(None)) == (0, 1, 1)
    for change in (lambda: np.save(examples, np.ones(3)), examples.unlink, lambda: answers.write_text("[]"),
                   answers.unlink):  # fmt: skip
        change()
        assert (kept(), kept()) == (0, 1)
    report = json.loads(output.read_text())
    del report["tasks"]["sums"]["written"]
    output.write_text(json.dumps(report))
    assert (kept(), kept()) == (0, 1)


def test_a_fingerprint_changes_with_the_rows_that_are_examples_and_with_the_groups_of_written_ones(tmp_path):
    rows = [{"question": f"{n}?", "answer": "1", "kind": "a"} for n in range(3)]
    for name in ("rows.jsonl", "same.jsonl"):
        write_jsonl(tmp_path / name, rows)
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots/a.txt").write_text("Q: 0?\nA: the answer is 1.")

    def mark(**settings):
        task = {"name": "t", "type": "exact_match", "path": "rows.jsonl", "group": "kind", **settings}
        suite = load_suite(write_suite(tmp_path, [task]))
        return fingerprint(suite.tasks[0], suite, "model")

    assert mark(shots_path="rows.jsonl") != mark(shots_path="same.jsonl")
    before = mark(shots_path="shots")
    (tmp_path / "shots/a.txt").rename(tmp_path / "shots/b.txt")
    assert mark(shots_path="shots") != before


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
