import json

import pytest

from grit_jax.quickstart.job import config_file
from grit_jax.quickstart.summary import show_summary
from grit_jax.runs.plot import plot_losses

REPORT = {
    "retrieval": {
        "ndcg_at_10": {"untrained": 0.011, "trained": 0.222, "bm25": 0.333},
        "recall_at_10": {"untrained": 0.044, "trained": 0.555, "bm25": 0.666},
    },
    "generation": {"loss_per_token": {"untrained": 9.111, "trained": 4.222, "unigram": 6.333}},
    "wall_seconds": 300.0,
    "tokens_per_second": 4321.0,
    "tokens": 987654,
    "steps": 77,
    "parameters": 3456789,
    "corpus": {
        "objects": 1000,
        "train_embedding_samples": 2000,
        "train_generative_samples": 3000,
        "held_out_queries": 123,
    },
    "searches": [
        {
            "query": "Split on [/] and [bold], not on [/x].",
            "hits": [{"document": "os.split[/](p)\nMore of it.", "score": 0.75, "relevant": True}],
        }
    ],
    "answers": [{"prompt": "What does `[/a]` do?", "answer": "It [/b] does."}],
    "paths": {"plot": "runs/quickstart/losses.png"},
}


def test_the_report_shows_every_figure_and_path(capsys):
    show_summary(REPORT)
    shown = capsys.readouterr().out
    figures = [f"{value:.3f}" for part in (*REPORT["retrieval"].values(),) for value in part.values()]
    figures += ["9.111", "4.222", "6.333", "4,321", "987,654", "3,456,789", "5.0 minutes", "123", "0.750"]
    assert [figure for figure in figures if figure not in shown] == []
    assert "os.split[/](p)" in shown and "runs/quickstart/losses.png" in shown


def test_brackets_in_a_docstring_are_shown_and_not_read_as_markup(capsys):
    show_summary(REPORT)
    shown = capsys.readouterr().out
    for text in ("Split on [/] and [bold], not on [/x].", "What does `[/a]` do?", "It [/b] does."):
        assert text in shown


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("steps", [1, 60])
def test_both_losses_are_drawn_to_a_png(tmp_path, steps, evaluated):
    lines = [{"step": step, "loss/embedding": 4 / step, "loss/generative": 9 / step} for step in range(1, steps + 1)]
    if evaluated:
        lines[-1] |= {"validation/loss/embedding": 1.0, "validation/loss/generative": 2.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_config_is_found_where_the_package_is():
    assert "architecture" in config_file("quickstart.yaml").read_text()


def test_a_base_stands_beside_the_trained_model(capsys):
    base = {name: {"bm25": 0.5, "base": 0.123, "trained": 0.456} for name in REPORT["retrieval"]}
    loss = {"base": 3.21, "trained": 2.1, "unigram": 6.5}
    hits = [{"document": "os.[/]join(p)\nMore.", "score": 0.25, "relevant": False}]
    report = REPORT | {
        "base": "org/[base]",
        "retrieval": base,
        "generation": {"loss_per_token": loss},
        "base_searches": [{"query": REPORT["searches"][0]["query"], "hits": hits}],
        "base_answers": [{"prompt": REPORT["answers"][0]["prompt"], "answer": "It said [/c]."}],
        "corpus": REPORT["corpus"] | {"held_out_queries_in_all": 4567},
    }
    show_summary(report)
    shown = capsys.readouterr().out
    for text in ("org/[base]", "trained further", "0.123", "3.210", "123 of 4,567 held-out queries"):
        assert text in shown
    assert "untrained" not in shown and "from scratch" not in shown
    (beside,) = (line for line in shown.splitlines() if "os.split[/](p)" in line)
    assert beside.index("0.250") < beside.index("os.[/]join(p)") < beside.index("0.750")
    (beside,) = (line for line in shown.splitlines() if "It [/b] does." in line)
    assert beside.index("It said [/c].") < beside.index("It [/b] does.")
