"""Shows the result of a quickstart: a table on the terminal, and a plot of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.console
import rich.table
from rich.markup import escape

from grit_jax.runs.history import running_mean, series
from grit_jax.runs.logs import read_lines


def show_summary(report: dict[str, Any]) -> None:
    """Prints the content of a report.json as a table."""
    console = rich.console.Console(highlight=False)
    console.rule("quickstart")
    corpus = report["corpus"]
    console.print(
        f"{report['parameters']:,} parameters trained from scratch on {corpus['train_embedding_samples']:,} embedding "
        f"and {corpus['train_generative_samples']:,} generative samples from the docstrings of "
        f"{corpus['objects']:,} objects; "
        f"{report['steps']} steps, {report['tokens']:,} tokens, {report['tokens_per_second']:,.0f} tokens/s, "
        f"{report['wall_seconds'] / 60:.1f} minutes in all"
    )
    table = rich.table.Table("held-out", "untrained", "trained", "baseline")
    retrieval, generation = report["retrieval"], report["generation"]
    for name, label in (("ndcg_at_10", "nDCG@10"), ("recall_at_10", "recall@10")):
        scores = retrieval[name]
        table.add_row(label, f"{scores['untrained']:.3f}", f"{scores['trained']:.3f}", f"{scores['bm25']:.3f} BM25")
    loss = generation["loss_per_token"]
    table.add_row(
        "loss per token", f"{loss['untrained']:.3f}", f"{loss['trained']:.3f}", f"{loss['unigram']:.3f} unigram"
    )
    console.print(table)
    console.print(
        f"{corpus['held_out_queries']:,} queries over {corpus['held_out_queries']:,} documents of held-out objects"
    )
    for search in report["searches"]:
        console.print(f"\n[bold]search[/bold] {escape(search['query'])}", soft_wrap=True)
        for hit in search["hits"]:
            mark = "*" if hit["relevant"] else " "
            first_line = hit["document"].partition("\n")[0]
            console.print(f"  {mark} {hit['score']:.3f}  {first_line}", soft_wrap=True, markup=False)
    for answer in report["answers"]:
        console.print(f"\n[bold]prompt[/bold] {escape(answer['prompt'])}", soft_wrap=True)
        console.print(f"  {answer['answer']}", soft_wrap=True, markup=False)
    console.print()
    for name, path in report["paths"].items():
        console.print(f"{name:>10}  {path}", soft_wrap=True)


def plot_losses(metrics: Path, out: Path) -> None:
    """Plots both losses of a metrics.jsonl against the step, as PNG, with a running mean."""
    from matplotlib.figure import Figure  # pyplot would choose a backend for a notebook that calls this function

    lines = read_lines(metrics)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, title in zip(
        panels, ("loss/embedding", "loss/generative"), ("contrastive loss", "language-modelling loss"), strict=True
    ):
        steps, values = series(lines, name)
        panel.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        panel.plot(steps, running_mean(values, max(1, len(values) // 20)), color="tab:blue", label="training")
        steps, held_out = series(lines, f"validation/{name}")
        if len(steps):
            panel.plot(steps, held_out, "o-", color="tab:orange", label="held-out")
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(out, dpi=120)
