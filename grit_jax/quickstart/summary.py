"""Shows the result of a quickstart on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
import rich.table
from rich.markup import escape
from rich.text import Text


def show_summary(report: dict[str, Any]) -> None:
    """Prints the content of a report.json; searches and answers of a base beside those of the trained model."""
    console = rich.console.Console(highlight=False)
    console.rule("quickstart")
    corpus = report["corpus"]
    base, before = report.get("base"), "base" if "base" in report else "untrained"
    if base:
        console.print(f"base: {escape(base)}", soft_wrap=True)
    start = "trained further" if base else "trained from scratch"
    console.print(
        f"{report['parameters']:,} parameters {start} on {corpus['train_embedding_samples']:,} embedding "
        f"and {corpus['train_generative_samples']:,} generative samples from the docstrings of "
        f"{corpus['objects']:,} objects; "
        f"{report['steps']} steps, {report['tokens']:,} tokens, {report['tokens_per_second']:,.0f} tokens/s, "
        f"{report['wall_seconds'] / 60:.1f} minutes in all"
    )
    table = rich.table.Table("held-out", before, "trained", "baseline")
    retrieval, generation = report["retrieval"], report["generation"]
    for name, label in (("ndcg_at_10", "nDCG@10"), ("recall_at_10", "recall@10")):
        scores = retrieval[name]
        table.add_row(label, f"{scores[before]:.3f}", f"{scores['trained']:.3f}", f"{scores['bm25']:.3f} BM25")
    loss = generation["loss_per_token"]
    table.add_row("loss per token", f"{loss[before]:.3f}", f"{loss['trained']:.3f}", f"{loss['unigram']:.3f} unigram")
    console.print(table)
    console.print(
        f"{corpus['held_out_queries']:,} queries over {corpus['held_out_queries']:,} documents of held-out objects"
    )
    if sample := sampled(corpus):
        console.print(f"measured{sample}")
    for number, search in enumerate(report["searches"]):
        console.print(f"\n[bold]search[/bold] {escape(search['query'])}", soft_wrap=True)
        hits = [_hit(hit) for hit in search["hits"]]
        if base:
            earlier = [_hit(hit) for hit in report["base_searches"][number]["hits"]]
            _side_by_side(console, zip(earlier, hits, strict=True))
        else:
            for hit in hits:
                console.print(hit, soft_wrap=True, markup=False)
    for number, answer in enumerate(report["answers"]):
        console.print(f"\n[bold]prompt[/bold] {escape(answer['prompt'])}", soft_wrap=True)
        if base:
            _side_by_side(console, [(report["base_answers"][number]["answer"], answer["answer"])])
        else:
            console.print(f"  {answer['answer']}", soft_wrap=True, markup=False)
    console.print()
    for name, path in report["paths"].items():
        console.print(f"{name:>10}  {path}", soft_wrap=True)


def sampled(corpus: dict[str, int]) -> str:
    """Which share of the held-out queries is measured, to follow a verb; empty for all of them."""
    in_all = corpus.get("held_out_queries_in_all")
    return f" on {corpus['held_out_queries']:,} of {in_all:,} held-out queries, to be done in minutes" if in_all else ""


def _hit(hit: dict[str, Any]) -> str:
    """A document's mark, score and first line."""
    first_line = hit["document"].partition("\n")[0]
    return f"  {'*' if hit['relevant'] else ' '} {hit['score']:.3f}  {first_line}"


def _side_by_side(console: rich.console.Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Prints texts of the base and of the trained model in two columns."""
    table = rich.table.Table(expand=True)
    for name in ("base", "trained"):
        table.add_column(name, ratio=1, overflow="fold")
    for pair in pairs:
        table.add_row(*map(Text, pair))
    console.print(table)
