"""The whole job, at its smallest."""

import json

import pytest

from grit_jax.cli.main import main
from grit_jax.errors import InputError
from grit_jax.quickstart import docstrings
from grit_jax.quickstart.job import run_quickstart
from tests.quickstart.objects import documented

SMALL = [
    "--train.steps=3", "--data.embedding_batch=8", "--data.generative_batch=8", "--model.architecture.embed_dim=32",
    "--model.architecture.num_layers=1", "--model.architecture.mlp_dim=48",
]  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "collect_objects", lambda _: documented(300))
        assert run_quickstart(output, overrides=SMALL)
    return output


def test_the_report_holds_every_figure(output):
    report = json.loads((output / "report.json").read_text())
    for name in ("ndcg_at_10", "recall_at_10"):
        figures = report["retrieval"][name]
        assert figures.keys() == {"untrained", "trained", "bm25"}
        assert all(0 <= figure <= 1 for figure in figures.values())
    loss = report["generation"]["loss_per_token"]
    assert loss.keys() == {"untrained", "trained", "unigram"}
    assert loss["trained"] < loss["untrained"]
    assert report["steps"] == 3
    assert report["wall_seconds"] > 0
    assert report["tokens_per_second"] > 0
    assert (len(report["searches"]), len(report["answers"])) == (3, 2)


def test_everything_the_report_names_is_there(output):
    report = json.loads((output / "report.json").read_text())
    from pathlib import Path

    assert all(Path(path).exists() for path in report["paths"].values())
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_second_call_shows_the_finished_report(output, capsys, monkeypatch):
    monkeypatch.setattr("grit_jax.quickstart.job.Trainer", lambda *_: pytest.fail("trained again"))
    assert main(["quickstart", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "nDCG@10" in shown
    assert "finished earlier; --fresh trains again" in shown


def test_fresh_removes_only_a_quickstart(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(InputError, match="is not a quickstart folder"):
        run_quickstart(tmp_path, fresh=True)
    assert (tmp_path / "precious.txt").exists()
