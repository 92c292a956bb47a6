"""The data of a claim: what is trained on and what is held out, and fixed samples of what models are measured on.

A sample is the items of the lowest hashes: it depends neither on their order nor on a seed.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from claim_setup import CONFIGS, GSM8K, HELD_OUT, Claim

from grit_jax import files
from grit_jax.data.records import EmbeddingRecord, Record
from grit_jax.data.sources import find_files, open_source, vocabulary_texts
from grit_jax.data.text_files import read_text
from grit_jax.errors import InputError
from grit_jax.evaluation.likelihood import Perplexity
from grit_jax.evaluation.reading import existing, read_records
from grit_jax.evaluation.retrieval import Retrieval, collection_files, read_collection
from grit_jax.evaluation.suite import Suite, load_suite
from grit_jax.text.tokenizer import train_bpe

_PROBLEMS = "eval/generative/gsm8k_test.jsonl.gz"
_ANSWERS = "eval/generative/xquad_qa_en.jsonl"
_PARAGRAPHS = "eval/retrieval/xquad_en"
_PLAYS = "train/lm/tinyshakespeare.txt.gz"
_NUM_EXTRACTS, _EXTRACT = 100, 1000  # of the plays; characters
_ONE_IN = 20
_VOCAB_SIZE = 8192

T = TypeVar("T")


def prepare(claim: Claim, data: Path, output: Path) -> None:
    """Writes the data of a claim and, for models from random weights, the tokenizer; once.

    Raises:
      InputError: The output was made from other data.
    """
    done, made_from = output / "data/done", digest(sources(claim, data))
    if done.exists():
        if done.read_text() != made_from:
            raise InputError(f"{output} was made from other data than --data {data}; choose another --output")
        return
    split(claim, data / "train", output / "data")
    with gzip.open(data / _PROBLEMS, "rt") as file:
        problems = [json.loads(line) for line in file]
    if claim.num_problems is not None:
        problems = sample(problems, claim.num_problems, lambda row: row["question"])
    _write_texts(_text_file(output, GSM8K), [[row["question"], _without_marks(row["solution"])] for row in problems])
    for name, texts in texts_of_base(data).items() if claim.has_base else ():
        _write_texts(_text_file(output, name), texts)
    for name, number in claim.num_documents.items():
        sample_documents(data / f"eval/retrieval/{name}", _collection(output, name), number)
    if not claim.has_base:
        embedding = sorted((output / "data/train/embedding").iterdir())
        _write_lines(one_file(output), [line for path in embedding for line in path.read_bytes().splitlines()])
        tokenizer = train_bpe(vocabulary_texts(str(output / "data/train")), _VOCAB_SIZE)
        for name, content in tokenizer.files().items():
            files.write_text(_made(output / "tokenizer" / name), content)
    files.write_text(done, made_from)


def suite_of(claim: Claim, name: str, data: Path, output: Path) -> Suite:
    """A suite of `CONFIGS`, with the data that `prepare` has written."""
    suite = load_suite(CONFIGS / name, data=data / "eval")
    texts = [(HELD_OUT, output / "data/held_out/generative")]
    texts += [(task, _text_file(output, task)) for task in (GSM8K, *claim.texts)]
    written = [Perplexity(task, str(path), max_length=claim.max_length) for task, path in texts]
    others = [
        dataclasses.replace(task, path=str(_collection(output, task.name)))
        if task.name in claim.num_documents else task for task in suite.tasks
    ]  # fmt: skip
    return dataclasses.replace(suite, tasks=(*written, *others))


def sources(claim: Claim, data: Path) -> list[Path]:
    """Files of `data` that `prepare` reads."""
    found = [*training_files(claim, data / "train"), data / _PROBLEMS]
    if claim.has_base:
        found += [data / _ANSWERS, data / _PLAYS, *_collection_files(data / _PARAGRAPHS)]
    return found + [file for name in claim.num_documents for file in _collection_files(data / f"eval/retrieval/{name}")]


def one_file(output: Path) -> Path:
    """All embedding records that `prepare` has written for models from random weights, in a file."""
    return output / "data/one_file/embedding.jsonl"


def _collection_files(folder: Path) -> list[Path]:
    return list(map(existing, collection_files(folder, Retrieval.split)))


def training_files(claim: Claim, folder: Path) -> list[Path]:
    """The claim's files of training data in a folder with `embedding/` and `generative/`."""
    found = list(map(Path, find_files([str(folder / "embedding"), str(folder / "generative")])))
    return [path for path in found if claim.sources is None or _name(path) in claim.sources]


def _name(path: Path) -> str:
    return path.name.split(".")[0]


def digest(paths: Iterable[Path]) -> str:
    """Digest of the content of files, in the order of their paths."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(bytes.fromhex(files.sha256(path)))
    return found.hexdigest()[:16]


def split(claim: Claim, data: Path, output: Path) -> None:
    """Splits the records of each file between `train/` and, a twentieth of them, `held_out/`."""
    for path in training_files(claim, data):
        source = open_source(path)
        parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
        for number, record in enumerate(source):
            parts["held_out" if _held_out(record) else "train"].append(source.lines(number, number + 1)[0].rstrip())
        for part, lines in parts.items():
            if lines:  # a twentieth of a small file may be empty
                _write_lines(output / part / path.parent.name / f"{_name(path)}.jsonl", lines)


def key(record: Record) -> str:
    """The text that decides on which side of the split a record is: its query, or its first turn."""
    return record.query.text if isinstance(record, EmbeddingRecord) else record.texts()[0]


def _held_out(record: Record) -> bool:
    return _hash(key(record)) % _ONE_IN == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def sample(items: Iterable[T], number: int, text: Callable[[T], str]) -> list[T]:
    """The `number` items, or fewer if there are no more, whose texts have the lowest hashes, in that order."""
    return sorted(items, key=lambda item: _hash(text(item)))[:number]


def sample_documents(folder: Path, output: Path, number: int) -> None:
    """Writes a collection with all its judged queries, and with all relevant documents and a sample of the others.

    Args:
      folder: The collection, in BEIR layout.
      output: Where the smaller one goes.
      number: Size of the new corpus.

    Raises:
      InputError: More documents than that are relevant.
    """
    collection = read_collection(folder, Retrieval.split)
    relevant = {name for judged in collection.judgements.values() for name, score in judged.items() if score > 0}
    if len(relevant) > number:
        raise InputError(f"{folder}: {len(relevant)} documents are relevant, more than the {number} to keep; keep more")
    others = sample(collection.documents.keys() - relevant, number - len(relevant), str)
    corpus, queries, judgements = collection_files(output, Retrieval.split)
    for path, texts in (
        (corpus, {name: collection.documents[name] for name in sorted((*relevant, *others))}),
        (queries, collection.queries),
    ):
        _write_lines(path, [json.dumps({"_id": name, "text": text}).encode() for name, text in texts.items()])
    rows = [
        f"{query}\t{name}\t{score:g}" for query, judged in collection.judgements.items()
        for name, score in judged.items() if name in relevant or name in others
    ]  # fmt: skip
    files.write_text(_made(judgements), "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")


def texts_of_base(data: Path) -> dict[str, list[list[str] | str]]:
    """What shows how much of the base's knowledge a model has kept, by the name of the task.

    Answers without the passage that has them: what the model knows by itself. Paragraphs of Wikipedia: prose as in what
    the base was trained on, of articles that no training file has. Plays of Shakespeare: text as unlike the training
    files as any. The last two are plain, so that learning a format does not hide what is forgotten.
    """
    paragraphs = read_collection(data / _PARAGRAPHS, Retrieval.split).documents.values()
    extracts = [""]
    for speech in read_text(data / _PLAYS).split("\n\n"):
        if len(extracts[-1]) >= _EXTRACT:
            extracts.append("")
        extracts[-1] = f"{extracts[-1]}\n\n{speech}".strip()
    return {
        "xquad answers": [
            [record.get("question"), record.one_or_more("answers", str)[0]] for record in read_records(data / _ANSWERS)
        ],
        "wikipedia": list(paragraphs),
        "shakespeare": sample(extracts, _NUM_EXTRACTS, str),
    }


def _without_marks(solution: str) -> str:
    return re.sub(r"<<.*?>>", "", solution)


def _text_file(output: Path, name: str) -> Path:
    return output / f"data/{'gsm8k_test' if name == GSM8K else name}.jsonl"


def _collection(output: Path, name: str) -> Path:
    return output / f"data/retrieval/{name}"


def _write_texts(path: Path, texts: Sequence[list[str] | str]) -> None:
    _write_lines(path, [json.dumps({"text": text}).encode() for text in texts])


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    files.write_bytes(_made(path), b"".join(line + b"\n" for line in lines))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
