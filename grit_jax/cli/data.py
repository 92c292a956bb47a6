"""The command `grit-jax data` and its sub-commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from grit_jax.cli.arguments import refuse_not_positive
from grit_jax.cli.overrides import refuse_unknown
from grit_jax.cli.progress import progress_bar
from grit_jax.config import Config, load_config, parse_config
from grit_jax.errors import InputError

if TYPE_CHECKING:
    from grit_jax.text.tokenizer import Tokenizer

HELP = "check, measure, convert and look at training data, and mine hard negatives"
EXAMPLES = """\
  grit-jax data validate my-data/ --against eval/scifact
  grit-jax data stats my-data/ --tokenizer runs/mine --plot lengths.png
  grit-jax data convert beir/scifact scifact.jsonl --from beir --instruction "Find the evidence"
  grit-jax data sample my-data/ --tokenizer runs/mine --count 3
  grit-jax data mine-negatives pairs.jsonl mined.jsonl --count 4 --range 1-50
"""
TAKES_OVERRIDES = True  # --data.key=value of stats and sample, --distributed.key=value of mine-negatives

_OVERLAPS = 1
_SHOWN_MATCHES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data`."""
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)

    def tool(name: str, help: str) -> argparse.ArgumentParser:
        return tools.add_parser(name, help=help, description=help, allow_abbrev=False)

    validate = tool("validate", "read every record: malformed ones, duplicates, texts of evaluation sets")
    _add_paths(validate)
    validate.add_argument(
        "--skip-bad", action="store_true", help="exit with 0 where malformed records are all there is"
    )
    validate.add_argument(
        "--against", action="append", default=[], metavar="PATH",
        help="evaluation set that must not occur: BEIR folder, or .jsonl, .txt, .tsv files; may be repeated",
    )  # fmt: skip
    validate.add_argument(
        "--ngram",
        type=int,
        default=13,
        metavar="N",
        help="words in a row that count; 0: whole texts only (%(default)s)",
    )
    validate.add_argument("--report", metavar="FILE.json", help="write everything that was found there")

    stats = tool("stats", "rows, tokens, lengths and how full packed rows are, under limits")
    _add_paths(stats)
    _add_config(stats)
    stats.add_argument("--plot", metavar="FILE.png", help="draw lengths, files and fill there")

    convert = tool("convert", "other formats to GRIT rows, and JSONL to ArrayRecord")
    convert.add_argument("source", metavar="SOURCE", help="file, or folder of BEIR and GRIT data")
    convert.add_argument("output", metavar="OUTPUT", help=".jsonl, .jsonl.gz or .array_record")
    convert.add_argument(
        "--from", dest="kind", required=True, choices=("beir", "triples", "alpaca", "sharegpt", "openai", "grit"),
        help="triples: MS MARCO triples, sentence-transformers pairs and triplets (.tsv, .csv, .jsonl, .json)",
    )  # fmt: skip
    convert.add_argument("--instruction", default="", help="instruction of queries (beir, triples)")
    convert.add_argument("--split", default="train", help="beir: which qrels (%(default)s)")
    convert.add_argument("--min-score", type=float, metavar="S", help="triples: rows with a smaller score are left out")
    convert.add_argument("--skip-bad", action="store_true", help="leave malformed rows out and count them")

    sample = tool("sample", "print random records as the model reads them")
    _add_paths(sample)
    _add_config(sample)
    sample.add_argument("--count", type=int, default=3, metavar="N", help="records (%(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="another seed, other records (%(default)s)")

    mine = tool("mine-negatives", "give queries hard negatives by BM25, or by a model on all devices of all hosts")
    mine.add_argument("source", metavar="SOURCE", help="file of embedding records; their passages are searched")
    mine.add_argument("output", metavar="OUTPUT", help=".jsonl, .jsonl.gz or .array_record")
    mine.add_argument("--model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder (default: BM25)")
    mine.add_argument("--corpus", metavar="FILE.jsonl", help='more passages: {"text": ..., "title": ...} a line')
    mine.add_argument("--count", type=int, default=1, metavar="N", help="negatives of a query (%(default)s)")
    mine.add_argument("--range", default="1-100", metavar="A-B", help="ranks they are taken from (%(default)s)")
    mine.add_argument(
        "--ceiling", type=float, default=0.95, metavar="X",
        help="leave out what scores over X of the query's lowest positive; 0 leaves out nothing (%(default)s)",
    )  # fmt: skip
    mine.add_argument("--draw", action="store_true", help="draw from the ranks at random; else the best are taken")
    mine.add_argument("--keep", action="store_true", help="keep the record's own negatives before the mined ones")
    mine.add_argument("--seed", type=int, default=0, help="of --draw (%(default)s)")
    mine.add_argument("--query-max-length", type=int, default=256, metavar="N", help="tokens of a query (%(default)s)")
    mine.add_argument(
        "--passage-max-length", type=int, default=512, metavar="N", help="the same of a passage (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs a tool; 2 for malformed records, 1 for texts of an evaluation set that are no documents, 0 otherwise."""
    known = {"stats": "--", "sample": "--", "mine-negatives": "--distributed."}.get(args.tool)
    refuse_unknown(args.overrides, f"data {args.tool}", known=known)
    return {
        "validate": _validate, "stats": _stats, "convert": _convert, "sample": _sample, "mine-negatives": _mine,
    }[args.tool](args)  # fmt: skip


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files or folders of GRIT data")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="folder, file, Hub id or `bytes` (%(default)s)"
    )
    parser.add_argument(
        "--config", metavar="CONFIG.yaml", help="take limits and batches from there; --data.key=value changes them"
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


def _validate(args: argparse.Namespace) -> int:
    from grit_jax.data.sources import find_files
    from grit_jax.datatools.overlap import EvaluationTexts
    from grit_jax.datatools.validate import validate

    if args.ngram < 0:
        raise InputError(f"--ngram={args.ngram} is negative; use 0 for whole texts only")
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
    }[args.kind]()
    written = write_records(output, rows, skip_bad=args.skip_bad)
    print(f"{output}: {written.count:,} rows")
    for fault, count, examples in (written.bad | written.left_out).values():
        print(f"left out {count:,} rows: {fault}; for example {examples[0]}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    import rich.console
    import rich.text

    from grit_jax.datatools.sample import draw

    refuse_not_positive(args, "count")
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


def _mine(args: argparse.Namespace) -> int:
    from grit_jax.data.sources import find_files, open_source
    from grit_jax.datatools.negatives import KeywordSearcher, Mined, Mining, ModelSearcher, Passages, mine
    from grit_jax.datatools.record_writer import write_records

    first, last = _range(args.range)
    refuse_not_positive(args, "count", "query_max_length", "passage_max_length")
    if args.ceiling < 0:
        raise InputError(f"--ceiling={args.ceiling} is negative; use 0 for none")
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
        if not first_process:  # it takes part in the search, and the first one writes
            for _ in rows:
                pass
            return 0
        written = write_records(output, rows)
    print(
        f"{output}: {written.count:,} rows over {len(passages):,} passages; {done[0].short:,} got fewer than "
        f"{args.count} negatives; {done[0].over_ceiling / written.count:,.1f} passages a query are over the ceiling"
    )
    return 0


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--range={text} is no range of ranks; write it as 10-100")
    return int(first), int(last)
