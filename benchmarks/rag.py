"""Answers from a store with and without cached keys and values: how long they take, and how good they are.

    python benchmarks/rag.py latency --page docs/rag.md
    python benchmarks/rag.py quality runs/claim/0/unified --limit 300 --page docs/rag.md

`latency` answers from a store of one document with a model of random weights, 58 million parameters with a vocabulary
of 32,000, whose tokens are bytes. One side grows while the other is one token: the document, whose keys and values come
from the store, or the query, which is embedded for the search anyway. Time runs from the query to the written tokens:
embedding, search, reading files and prompts, writing. Tokens are written eight at a time, so one takes as long as
eight.

`quality` asks the questions of XQuAD and MedQuAD with every method; queries are embedded with the instructions of
configs/claim/suite.yaml. A gold answer of XQuAD is a span of the judged passage, of MedQuAD the first sentence of the
judged answer. `match` is whether the output contains a gold answer, `loss` the loss per token of the first gold answer
after `The answer is`, `found` whether the judged document is the one used. Losses are compared in pairs, question by
question, with those of the method that a method replaces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
from claim import CONFIGS
from pages import COLOURS, draw_differences, markdown_table, print_tables, publish, save_drawing

from grit_jax import GritModel, files
from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.cli.main import main as grit_jax
from grit_jax.config import EmbeddingConfig, MeshConfig
from grit_jax.evaluation.compare import compare
from grit_jax.evaluation.generation import contains, is_right
from grit_jax.evaluation.likelihood import loss_per_token
from grit_jax.evaluation.reading import read_records
from grit_jax.evaluation.report import interval
from grit_jax.evaluation.retrieval import Retrieval, read_collection
from grit_jax.evaluation.suite import load_suite
from grit_jax.evaluation.task import Outcome
from grit_jax.inference.decode import empty_state, extend, write_prefix
from grit_jax.inference.engine import Continuation, Engine, LaneSize
from grit_jax.model.transformer import KVCache, init_params
from grit_jax.parallel import sharding
from grit_jax.retrieval.rag import Positions, Prepared, Rag
from grit_jax.retrieval.store import Store
from grit_jax.text import prompts
from grit_jax.text.prompts import RagMethod
from grit_jax.text.tokenizer import Tokenizer

WRITTEN = (1, 16, 64)
STORES = {
    "float32": ("--caches=float32",),
    "bfloat16": ("--caches=bfloat16",),
    "int8": ("--caches=int8",),
    "second": ("--caches=float32", "--cache-form=second"),
}
_AT_ONCE = 16  # answers written together
_NEW_TOKENS = 16


class Side(NamedTuple):
    """A way to an answer.

    Attributes:
      method: How query and document reach the model.
      store: The store to answer from.
      positions: Positions of a cached text after another.
      causal: Whether documents are read causally before use.
      against: The side to compare its loss with.
    """

    method: RagMethod
    store: str = "float32"
    positions: Positions = "own"
    causal: bool = False
    against: str | None = None

    def prepare(self, rag: Rag, query: str, instruction: str = "") -> Prepared:
        """The prompt of an answer."""
        options: Any = {"method": self.method, "positions": self.positions, "instruction": instruction}
        prepared = rag.prepare(query, **options)
        if self.causal and rag.read_causally():
            prepared = rag.prepare(query, **options)
        return prepared


SIDES = {
    "no document": Side("none"),
    "query first": Side("query_first", against="no document"),
    "document first": Side("document_first", against="no document"),
    "document cache": Side("document_cache", against="document first"),
    "document cache, bfloat16": Side("document_cache", "bfloat16", against="document cache"),
    "document cache, int8": Side("document_cache", "int8", against="document cache"),
    "document cache, read causally": Side("document_cache", causal=True, against="document cache"),
    "query cache": Side("query_cache", against="query first"),
    "query-document cache": Side("query_document_cache", "second", against="query first"),
    "query-document cache, corrected": Side(
        "query_document_cache", "second", "corrected", against="query-document cache"
    ),
    "document-query cache": Side("document_query_cache", against="document first"),
    "document-query cache, corrected": Side(
        "document_query_cache", positions="corrected", against="document-query cache"
    ),
}
GROWING = {
    "document": {"without": Side("document_first"), "float32": Side("document_cache"),
                 "bfloat16": Side("document_cache", "bfloat16"), "int8": Side("document_cache", "int8"),
                 "float32, query-document": Side("query_document_cache", "second"),
                 "float32, document-query": Side("document_query_cache")},
    "query": {"without": Side("query_first"), "float32": Side("query_cache"),
              "float32, query-document": Side("query_document_cache", "second"),
              "float32, document-query": Side("document_query_cache")},
}  # fmt: skip


def index(model: Path, corpus: Path, store: Path, *options: str) -> Store:
    """A store by `grit-jax index`, made now or earlier."""
    if grit_jax(["index", str(model), str(corpus), str(store), *options]):
        raise SystemExit(f"{store}: not made")
    return Store(store)


def write_corpus(path: Path, documents: dict[str, str]) -> Path:
    """A corpus file of texts by id."""
    lines = [json.dumps({"_id": name, "text": text}, ensure_ascii=False) for name, text in documents.items()]
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def random_model(folder: Path, longest: int) -> Path:
    """A checkpoint of random weights that reads bytes; made once."""
    if not folder.exists():
        tokenizer = Tokenizer.load("bytes")
        shape = dataclasses.replace(common.ARCHITECTURE, vocab_size=32_000, max_length=longest + 1024)
        architecture = shape.resolve(tokenizer.vocab_size)
        params = jax.jit(init_params, static_argnums=0)(architecture, jax.random.key(0))
        mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        about = CheckpointMetadata(architecture, EmbeddingConfig(), tokenizer.files())
        save_params(folder, jax.device_put(params, sharding.replicated(mesh)), about)
    return folder


def timed(side: Side, rag: Rag, engine: Engine, query: str) -> tuple[float, ...]:
    """Seconds until each number of tokens in `WRITTEN` is written."""
    started, seconds, written = time.perf_counter(), {}, 0
    prepared = side.prepare(rag, query)
    engine.submit(Continuation(prepared.tokens, max(WRITTEN), prefix=prepared.prefix))
    while engine.is_busy:
        for block in engine.step():
            written += len(block.tokens)
            for count in WRITTEN:
                if written >= count:
                    seconds.setdefault(count, time.perf_counter() - started)
    if written < max(WRITTEN):
        raise SystemExit(f"the random model ended its answer after {written} tokens; choose another seed")
    return tuple(seconds.values())


def latency(output: Path, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Median seconds of every growing side, length and number of written tokens."""
    folder = random_model(output / f"random-{max(lengths)}", max(lengths))
    model, words = GritModel.load(folder), "the quick brown fox jumps over the lazy dog "
    found = []
    for growing, sides in GROWING.items():
        for length in lengths:
            head = len(prompts.embedding("", bos="")[0]) + 1
            text = (words * (length // len(words) + 1))[: length - head]
            document, query = (text, "x") if growing == "document" else ("x", text)
            corpus = write_corpus(output / f"{growing}-{length}.jsonl", {"d": document})
            stores = {side.store for side in sides.values()}
            rags = {
                name: Rag(model, index(folder, corpus, output / f"stores/{growing}-{length}-{name}", *STORES[name]))
                for name in stores
            }
            engine = model.engine([LaneSize(1, model.architecture.max_length)])
            seconds = {name: [] for name in sides}
            for run in range(repeats + 1):
                for name, side in sides.items():
                    once = timed(side, rags[side.store], engine, query)
                    if run:  # the first one compiles
                        seconds[name].append(once)
            for name, runs in seconds.items():
                medians = dict(zip(map(str, WRITTEN), map(statistics.median, zip(*runs)), strict=True))
                found.append({"growing": growing, "tokens": length, "keys_and_values": name, "seconds": medians})
    return found


def plot_latency(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Draws seconds against the length of the growing side, and against the number of written tokens."""
    from matplotlib.figure import Figure

    colours = dict(zip(("float32", "without", "int8", "bfloat16"), COLOURS, strict=True))
    figure = Figure(figsize=(13, 4), layout="constrained")
    *panels, last = figure.subplots(1, 3)
    longest = max(row["tokens"] for row in found)
    for name, colour in colours.items():
        for panel, growing in zip(panels, GROWING, strict=True):
            rows = [row for row in found if (row["growing"], row["keys_and_values"]) == (growing, name)]
            panel.plot([row["tokens"] for row in rows], [row["seconds"]["16"] for row in rows], "o-", color=colour)
            panel.set_title(f"16 written tokens, {growing} growing", loc="left")
            panel.set_xlabel(f"tokens of the {growing}")
        for row in found:
            if (row["growing"], row["keys_and_values"], row["tokens"]) == ("document", name, longest):
                last.plot(WRITTEN, list(row["seconds"].values()), "o-", color=colour, label=name)
    last.set_title(f"document of {longest:,} tokens", loc="left")
    last.set_xlabel("written tokens")
    last.legend(frameon=False, title="keys and values")
    for panel in figure.axes:
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("seconds")
    save_drawing(path, figure)


def plot_quality(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Draws the difference of each side's loss to that of the side it replaces."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for panel, (name, sides) in zip(figure.subplots(1, 2, sharey=True), measured.items(), strict=True):
        compared = {label: row["loss against"] for label, row in sides.items() if "loss against" in row}
        draw_differences(panel, {f"{label}\nagainst {one['against']}": one for label, one in compared.items()})
        panel.set_title(f"{name}: loss of the gold answer", loc="left")
    save_drawing(path, figure)


class Question(NamedTuple):
    """A question, its gold answers and the ids of the documents judged to hold one."""

    text: str
    answers: list[str]
    documents: set[str]


def read_questions(data: Path, name: str) -> tuple[dict[str, str], list[Question]]:
    """The documents of a collection by id, and its questions."""
    collection = read_collection(data / f"retrieval/{name}", "test")
    if name == "xquad_en":
        rows = read_records(data / "generative/xquad_qa_en.jsonl")
        asked = [Question(row.get("question"), row.strings("answers"), {row.get("doc")}) for row in rows]
        return collection.documents, asked
    asked = []
    for query, judged in collection.judgements.items():
        names = {document for document, relevance in judged.items() if relevance > 0}
        sentence = re.split(r"(?<=[.?!])\s", collection.documents[min(names)].strip())[0]
        asked.append(Question(collection.queries[query], [sentence], names))
    return collection.documents, asked


def log_likelihood(model: GritModel, prefix: KVCache | None, prompt: prompts.TokenizedPrompt) -> tuple[float, int]:
    """Sum of log p of the tokens in a text's span after keys and values, in nats, and their number."""
    runner, dtype = model.runner, model.runner.execution.dtype
    ((first, last),) = prompt.spans.tolist()
    num_cached, length = 0 if prefix is None else prefix.keys.shape[1], runner.row_length(len(prompt.tokens))
    total = 0.0
    with jax.set_mesh(runner.mesh):
        slots = runner.row_length(num_cached + length)
        state = empty_state(runner.model, runner.params, rows=runner.shards, slots=slots, dtype=dtype)
        if prefix is not None:
            padding = ((0, 0), (0, slots - num_cached), (0, 0), (0, 0))
            padded = KVCache(*(np.pad(x.astype(dtype), padding) for x in prefix))
            state = write_prefix(state, padded, np.int32(0), np.int32(0))
        for start, stop in [(0, first), *((index, index + 1) for index in range(first, last - 1))]:
            tokens = np.zeros((runner.shards, length if start == 0 else 1), np.int32)
            tokens[:, : stop - start] = prompt.tokens[start:stop]
            starts, lengths = (np.full(runner.shards, x, np.int32) for x in (num_cached + start, stop - start))
            state = extend(runner.model, runner.params, state, tokens, starts, lengths)
            total += float(jax.nn.log_softmax(state.logits[0])[prompt.tokens[stop]])
    return total, last - first


def figures(
    side: Side, rag: Rag, model: GritModel, questions: Sequence[Question], instruction: str
) -> dict[str, Outcome]:
    """The figures of one side over questions, by metric."""
    matches, exact, found, losses = [], [], [], []
    for first in range(0, len(questions), _AT_ONCE):
        texts = []
        some = questions[first : first + _AT_ONCE]
        for question in some:
            prepared = side.prepare(rag, question.text, instruction)
            texts.append(Continuation(prepared.tokens, _NEW_TOKENS, prefix=prepared.prefix))
            gold = prompts.Prompt(
                f"{prepared.text} {question.answers[0]}",
                ((len(prepared.text), len(prepared.text) + 1 + len(question.answers[0])),),
            )
            (tokenized,) = prompts.tokenize([gold], model.tokenizer)
            losses.append(log_likelihood(model, prepared.prefix, tokenized))
            found.append(any(hit.document.id in question.documents for hit in prepared.hits))
        written = ["".join(pieces) for pieces in zip(*model.write(texts), strict=True)]
        matches += [contains(answer, question.answers) for answer, question in zip(written, some, strict=True)]
        exact += [is_right(answer, question.answers, "span") for answer, question in zip(written, some, strict=True)]
    shares = {"match": matches, "exact": exact, "found": found}
    outcomes = {name: Outcome(name, np.array(values, float)) for name, values in shares.items()}
    return outcomes | {
        "loss": Outcome("loss", np.array(losses) * [-1, 1], score=loss_per_token, bounds=(0.0, math.inf))
    }


def quality(
    model_folder: Path, data: Path, output: Path, *, limit: int | None, max_length: int
) -> dict[str, dict[str, Any]]:
    """Figures with 95 % intervals by collection and side; for losses also the difference to another side's."""
    model, result = GritModel.load(model_folder), {}
    tasks = load_suite(CONFIGS / "suite.yaml", data=data).tasks
    instructions = {task.name: task.instruction or "" for task in tasks if isinstance(task, Retrieval)}
    for name in ("xquad_en", "medquad"):
        documents, questions = read_questions(data, name)
        order = np.random.default_rng(0).permutation(len(questions))[:limit]
        asked = [questions[place] for place in order]
        corpus = write_corpus(output / f"{name}.jsonl", documents)
        stores = {
            kind: index(model_folder, corpus, output / f"stores/{name}-{kind}", *options, f"--max-length={max_length}")
            for kind, options in STORES.items()
        }
        result[name] = {}
        losses: dict[str, np.ndarray] = {}
        for label, side in SIDES.items():
            print(f"{name}, {label}", flush=True)
            rag = Rag(model, stores[side.store], causal_bytes=(1 << 30) * side.causal)
            outcomes = figures(side, rag, model, asked, instructions[name])
            measured: dict[str, Any] = {
                metric: {"value": outcome.score(outcome.examples), "interval": interval(outcome, seed=0)}
                for metric, outcome in outcomes.items()
            }
            losses[label] = outcomes["loss"].examples
            if side.against:
                compared = compare([[losses[label]]], [[losses[side.against]]], loss_per_token)
                measured["loss against"] = compared._asdict() | {"against": side.against}
            result[name][label] = measured
    return result


def latency_table(found: Sequence[dict[str, Any]]) -> str:
    """Seconds, one row per side and length."""
    return markdown_table(
        ["growing", "tokens", "keys and values", *(f"seconds to {count}" for count in WRITTEN)],
        (
            [row["growing"], f"{row['tokens']:,}", row["keys_and_values"],
             *(f"{row['seconds'][str(count)]:.2f}" for count in WRITTEN)]
            for row in found
        ),
    )  # fmt: skip


def quality_table(measured: dict[str, Any]) -> str:
    """Figures of a collection with their intervals, one row per side."""

    def cell(one: dict[str, Any]) -> str:
        return f"{one['value']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"

    def difference(one: dict[str, Any]) -> str:
        return f"{one['difference']:+.2%} ({one['interval'][0]:+.2%} to {one['interval'][1]:+.2%}) of {one['against']}"

    metrics = ("match", "exact", "found", "loss")
    return markdown_table(
        ["", *metrics, "loss against"],
        (
            [side, *(cell(row[metric]) for metric in metrics),
             difference(row["loss against"]) if "loss against" in row else ""]
            for side, row in measured.items()
        ),
    )  # fmt: skip


def tables(command: str, found: Any) -> dict[str, str]:
    """A command's results as Markdown tables, by name."""
    if command == "latency":
        return {command: latency_table(found)}
    return {name: quality_table(sides) for name, sides in found.items()}


def main() -> None:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("latency", help="seconds with and without keys and values")
    speed.add_argument("--lengths", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000], help="tokens")
    speed.add_argument("--repeats", type=int, default=5, help="timed runs of each side (%(default)s)")
    good = commands.add_parser("quality", help="answers of a trained model")
    good.add_argument("model", type=Path, help="run folder")
    good.add_argument(
        "--data", type=Path, default=common.SHARED / "eval", help="folder with retrieval/ and generative/"
    )
    good.add_argument("--limit", type=int, help="questions of each collection, drawn (all of them)")
    good.add_argument("--max-length", type=int, default=256, help="tokens kept of a document (%(default)s)")
    for command in (speed, good):
        command.add_argument("--output", type=Path, default=Path("runs/rag"), help="folder (%(default)s)")
        command.add_argument("--page", type=Path, help="page to fill with the tables; figures and plot go beside it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.command == "latency":
        found: Any = latency(args.output, args.lengths, args.repeats)
        plot_latency(args.output / "latency.png", found)
    else:
        found = quality(args.model, args.data, args.output, limit=args.limit, max_length=args.max_length)
        plot_quality(args.output / "quality.png", found)
    files.write_text(args.output / f"{args.command}.json", json.dumps(found, indent=2) + "\n")
    shown = tables(args.command, found)
    print_tables(shown)
    if args.page:
        kept = [args.output / f"{args.command}.{kind}" for kind in ("json", "png")]
        publish(args.page, shown, *kept)
    common.report({"device": jax.devices()[0].device_kind, "written": f"{args.output}/{args.command}.json"})


if __name__ == "__main__":
    main()
