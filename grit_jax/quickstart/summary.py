"""Shows the result of a quickstart on the terminal."""

from __future__ import annotations

from typing import Any

import rich.console
import rich.table
from rich.markup import escape


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
