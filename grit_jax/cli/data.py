"""The command `grit-jax data` and its sub-commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from grit_jax.cli.command import Command, argument, command, flag, number, progress_bar, repeated
from grit_jax.config import Config, load_config, parse_config
from grit_jax.config.ranges import FINITE, NOT_NEGATIVE
from grit_jax.errors import InputError

if TYPE_CHECKING:
    from grit_jax.text.tokenizer import Tokenizer

_OVERLAPS = 1
_SHOWN_MATCHES = 10

_PATHS = argument("paths", nargs="+", metavar="PATH", help="files or folders of GRIT data")
_OUTPUT = argument("output", metavar="OUTPUT", help=".jsonl, .jsonl.gz or .array_record")
_CONFIG = (
    argument("--tokenizer", default="bytes", metavar="T", help="folder, file, Hub id or `bytes` (%(default)s)"),
    argument(
        "--config", metavar="CONFIG.yaml", help="take limits and batches from here; --data.key=value changes them"
    ),
)


def _config(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.overrides) if args.config else parse_config("", args.overrides)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=args.paths))


def _tokenizer(source: str) -> Tokenizer:
    from grit_jax.text.tokenizer import Tokenizer

    if source == "bytes":
        return Tokenizer.load(source)

    from grit_jax.checkpoints.opening import open_model, open_tokenizer

    try:
        return open_tokenizer(source)
    except InputError:
        return open_model(source).tokenizer  # a run folder keeps its tokenizer in its checkpoints


@command(
    "read every record: find malformed ones, duplicates and texts of evaluation sets",
    _PATHS,
    flag("--skip-bad", "exit with 0 if malformed records are the only problem"),
    repeated("--against", "PATH", "evaluation set that the data must not contain: BEIR folder, or .jsonl, .txt, .tsv"),
    number("--ngram", "N", "consecutive words that count as a match; 0 for whole texts only", 13, NOT_NEGATIVE),
    argument("--report", metavar="FILE.json", help="write all findings here"),
)
def _validate(args: argparse.Namespace) -> int:
    from grit_jax.data.sources import find_files
    from grit_jax.datatools.overlap import EvaluationTexts
    from grit_jax.datatools.validate import validate

    paths = find_files(args.paths)
    against = EvaluationTexts(list(map(Path, args.against)), ngram=args.ngram) if args.against else None
    with progress_bar("reading") as progress:
        found = validate(paths, against=against, progress=progress)
    for file in found.files:
        if file.problem:
            print(f"error: {file.problem}")
            continue
        print(f"{file.path}: {file.records:,} {file.stream} records, {sum(bad.count for bad in file.bad):,} malformed")
        for bad in file.bad:
            print(f"  {bad.count:,} {bad.fault}")
            for example in bad.examples:
                print(f"    {example}")
    for duplicates in found.duplicates:
        print(f"{duplicates.count:,} {duplicates.what} repeat earlier ones")
        for example in duplicates.examples:
            print(f"  {example}")
    for path, count in found.evaluation_texts.items():
        matches = [match for match in found.matches if match.evaluation.rpartition(":")[0] == path]
        whole = sum(match.whole for match in matches)
        print(
            f"{path}: {len(matches):,} of {count:,} texts occur in the training data "
            f"({whole:,} whole, {len(matches) - whole:,} by {args.ngram} words in a row)"
        )
        for match in matches[:_SHOWN_MATCHES]:
            print(f"  {match.evaluation} in {match.training}")
        if len(matches) > _SHOWN_MATCHES:
            print(f"  and {len(matches) - _SHOWN_MATCHES:,} more; --report lists them")
    if args.report:
        from grit_jax.files import replacing

        content = dataclasses.asdict(found) | {"matches": [match._asdict() for match in found.matches]}
        for file in content["files"]:
            file["bad"] = [dict(zip(("kind", "count", "examples"), bad, strict=True)) for bad in file["bad"]]
        with replacing(Path(args.report), "w") as out:
            json.dump(content, out, indent=2, ensure_ascii=False)
    if found.num_bad and not args.skip_bad:
        return 2
    return _OVERLAPS if any(not match.document for match in found.matches) else 0


@command(
    "count records and tokens, and show lengths and how full packed rows are under limits",
    _PATHS,
    *_CONFIG,
    argument("--plot", metavar="FILE.png", help="draw lengths, files and fill here"),
    overrides="",
)
def _stats(args: argparse.Namespace) -> int:
    from grit_jax.datatools.stats import as_lines, measure, plot

    if args.plot and not args.plot.endswith(".png"):
        raise InputError(f"--plot {args.plot}: must end in .png")
    stats = measure(_config(args), _tokenizer(args.tokenizer))
    print("\n".join(as_lines(stats)))
    if args.plot:
        plot(stats, Path(args.plot))
        print(args.plot)
    return 0


@command(
    "convert other formats to GRIT records, and JSONL to ArrayRecord",
    argument("source", metavar="SOURCE", help="file, or folder of BEIR and GRIT data"),
    _OUTPUT,
    argument(
        "--from", dest="format", required=True,
        choices=("beir", "triples", "alpaca", "sharegpt", "openai", "grit"),
        help="triples: MS MARCO triples, sentence-transformers pairs and triplets (.tsv, .csv, .json, .jsonl)",
    ),
    argument("--instruction", default="", help="instruction of queries (beir, triples)"),
    argument("--split", default="train", help="beir: which qrels (%(default)s)"),
    argument("--min-score", type=float, metavar="S", help="triples: leave out records with a lower score"),
    flag("--skip-bad", "leave malformed records out and count them"),
)  # fmt: skip
def _convert(args: argparse.Namespace) -> int:
    from grit_jax.datatools import convert
    from grit_jax.datatools.record_writer import write_records

    source, output = Path(args.source), Path(args.output)
    if source.resolve() == output.resolve():
        raise InputError(f"{output}: is the source; choose another output")
    rows = {
        "beir": lambda: convert.beir(source, instruction=args.instruction, split=args.split),
        "triples": lambda: convert.triples(source, instruction=args.instruction, min_score=args.min_score),
        "alpaca": lambda: convert.alpaca(source),
        "sharegpt": lambda: convert.sharegpt(source),
        "openai": lambda: convert.openai(source),
        "grit": lambda: convert.grit(args.source),
    }[args.format]()
    written = write_records(output, rows, skip_bad=args.skip_bad)
    print(f"{output}: {written.count:,} records")
    for fault, count, examples in (written.bad | written.left_out).values():
        print(f"left out {count:,} records: {fault}; for example {examples[0]}")
    return 0


@command(
    "print random records as the model reads them",
    _PATHS,
    *_CONFIG,
    number("--count", "N", "records", 3),
    number("--seed", "SEED", "seed of the choice of records", 0, FINITE),
    overrides="",
)
def _sample(args: argparse.Namespace) -> int:
    import rich.console
    import rich.text

    from grit_jax.datatools.sample import draw

    console = rich.console.Console(highlight=False, soft_wrap=True)
    for where, texts in draw(_config(args), _tokenizer(args.tokenizer), count=args.count, seed=args.seed):
        console.rule(rich.text.Text(where), align="left")
        for shown in texts:
            counted = "scored" if shown.role == "conversation" else "pooled"
            cut = f", {shown.cut:,} over the limit are not read" if shown.cut else ""
            console.print(f"{shown.role}: {shown.tokens:,} tokens, {shown.counted:,} {counted}{cut}", style="bold")
            line = rich.text.Text()
            for piece in shown.pieces:
                line.append(f"⟦{piece.text}⟧" if piece.counts else piece.text, style="green" if piece.counts else "dim")
            console.print(line)
    return 0


@command(
    "give queries hard negatives found by BM25, or by a model on all devices of all hosts",
    argument("source", metavar="SOURCE", help="file of embedding records; their passages are searched"),
    _OUTPUT,
    argument("--model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder (default: BM25)"),
    argument("--corpus", metavar="FILE.jsonl", help='more passages: {"text": ..., "title": ...} a line'),
    number("--count", "N", "negatives of a query", 1),
    argument("--range", default="1-100", metavar="A-B", help="ranks to take them from (%(default)s)"),
    number(
        "--ceiling", "X", "leave out passages that score over X of the query's lowest positive; 0 for none", 0.95,
        NOT_NEGATIVE,
    ),
    flag("--draw", "draw from the ranks at random instead of taking the best"),
    flag("--keep", "keep the record's own negatives before the mined ones"),
    number("--seed", "SEED", "of --draw", 0, FINITE),
    number("--query-max-length", "N", "tokens of a query", 256),
    number("--passage-max-length", "N", "tokens of a passage", 512),
    overrides="--distributed.",
)  # fmt: skip
def _mine(args: argparse.Namespace) -> int:
    from grit_jax.data.sources import find_files, open_source
    from grit_jax.datatools.negatives import KeywordSearcher, Mined, Mining, ModelSearcher, Passages, mine
    from grit_jax.datatools.record_writer import write_records

    first, last = _range(args.range)
    if last - first + 1 < args.count:
        raise InputError(f"--range={args.range} holds fewer ranks than --count={args.count}; widen it")
    paths = find_files(args.source)
    if len(paths) > 1:
        raise InputError(f"{args.source}: holds {len(paths)} files; mine them one by one, as each is a task of its own")
    source, output = open_source(paths[0]), Path(args.output)
    if Path(args.source).resolve() == output.resolve():
        raise InputError(f"{output}: is the source; choose another output")
    mining = Mining(args.count, first, last, args.ceiling or None, args.draw, args.keep, args.seed)
    if args.model:
        from grit_jax.parallel import distributed

        distributed.start(parse_config("", args.overrides).distributed)
    elif args.overrides:
        raise InputError(f"{' '.join(args.overrides)}: BM25 runs in one process; name a --model, or leave this out")
    passages = Passages(source, Path(args.corpus) if args.corpus else None)
    first_process = True
    if args.model:
        import jax

        from grit_jax.inference.model import GritModel
        from grit_jax.parallel.distributed import require_same

        first_process = jax.process_index() == 0
        lengths = (args.query_max_length, args.passage_max_length)
        with progress_bar("embedding passages", -(-len(passages) // jax.process_count())) as progress:
            model = GritModel.load(args.model, devices=jax.local_devices())
            require_same({"the model": model.fingerprint(rounded=True), "the records": passages.fingerprint})
            searcher = ModelSearcher(model, passages, max_lengths=lengths, progress=progress)
    else:
        searcher = KeywordSearcher(passages)
    done: list[Mined] = []
    with progress_bar("mining", len(source)) as progress:
        rows = mine(source, passages, searcher, mining, done=done.append, progress=progress)
        if not first_process:  # it takes part in the search; the first one writes
            for _ in rows:
                pass
            return 0
        written = write_records(output, rows)
    print(
        f"{output}: {written.count:,} records over {len(passages):,} passages; {done[0].short:,} got fewer than "
        f"{args.count} negatives; {done[0].over_ceiling / written.count:,.1f} passages a query are over the ceiling"
    )
    return 0


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--range={text} is not a range of ranks; write it as 10-100")
    return int(first), int(last)


run = Command(
    "check, measure, convert and inspect training data, and mine hard negatives",
    tools={
        "validate": _validate, "stats": _stats, "convert": _convert, "sample": _sample, "mine-negatives": _mine,
    },
    examples="""\
  grit-jax data validate my-data/ --against eval/scifact
  grit-jax data stats my-data/ --tokenizer runs/mine --plot lengths.png
  grit-jax data convert beir/scifact scifact.jsonl --from beir --instruction "Find the evidence"
  grit-jax data sample my-data/ --tokenizer runs/mine --count 3
  grit-jax data mine-negatives pairs.jsonl mined.jsonl --count 4 --range 1-50
""",
)  # fmt: skip
