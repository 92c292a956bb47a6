"""Training and held-out data from docstrings, which every machine with this package has.

Sources are the Python standard library and the run-time numeric packages, parsed but never imported. Each documented
module, class or function is an object; objects, not texts, are split into train and held-out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax.errors import InputError

# Run-time requirements and their requirements, so that every installation sees the same texts.
PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "orbax", "grain", "tensorstore", "ml_dtypes", "matplotlib")
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "vendor"}

DESCRIBE = "Given a description, find the documentation of the Python object that it describes"
NAME = "Given the name of a Python object, find its documentation"
EXCERPT = "Given a sentence, find the documentation that it is taken from"

_DOCUMENT_WORDS = 64
_ANSWER_WORDS = 48
_NEGATIVES = 3
_HELD_OUT = 0.1


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class DocumentedObject(NamedTuple):
    """A documented module, class or function.

    Attributes:
      name: Dotted name.
      signature: `name(arguments)` of a function, the bare name of anything else.
      summary: First paragraph of its docstring, on one line.
      body: The rest, on one line.
    """

    name: str
    signature: str
    summary: str
    body: str

    @property
    def document(self) -> str:
        """The text to retrieve: signature and body, without the summary, which is the query."""
        return f"{self.signature}\n{_clip(self.body, _DOCUMENT_WORDS)}"

    @property
    def searchable(self) -> bool:
        """Whether the document has a body and does not contain the summary word for word."""
        return bool(self.body) and _normalized(self.summary) not in _normalized(self.document)

    @property
    def scope(self) -> str:
        """The module or class that the object is defined in."""
        return self.name.rpartition(".")[0]

    @property
    def held_out(self) -> bool:
        """Whether the object is held out of training; depends only on its name."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4]) < _HELD_OUT * 2**32


def write_corpus(
    folder: Path, roots: Iterable[tuple[str, Path]] | None = None, *, most_queries: int | None = None
) -> dict[str, int]:
    """Writes GRIT data and a retrieval task, and returns their counts.

    `train/` and `validation/` hold embedding and generative JSONL; `retrieval/` is in BEIR layout: held-out
    descriptions over the documentation of held-out objects.

    Args:
      folder: The folder to write.
      roots: As in `collect_objects`.
      most_queries: Most held-out queries; `validation/` and `retrieval/` then hold only their objects, chosen by name.
        None takes all held-out objects.
    """
    objects = collect_objects(roots)
    train = [thing for thing in objects if not thing.held_out]
    held_out = [thing for thing in objects if thing.held_out]
    counts = {"objects": len(objects), "held_out_objects": len(held_out)}
    searched = [thing for thing in held_out if thing.searchable]
    if most_queries is not None and len(searched) > most_queries:
        counts["held_out_queries_in_all"] = len(searched)
        sample = sorted(_stable(thing.name) for thing in searched)[:most_queries]
        held_out = searched = [thing for thing in searched if _stable(thing.name) <= sample[-1]]
    for split, things in (("train", train), ("validation", held_out)):
        for stream, files in (("embedding", _embedding_files(things)), ("generative", _generative_files(things))):
            for name, rows in files.items():
                if split == "train" or name in ("describe", "answers"):
                    counts[f"{split}_{stream}_samples"] = counts.get(f"{split}_{stream}_samples", 0) + len(rows)
                    _write_jsonl(folder / split / stream / f"{name}.jsonl", rows)
    _write_jsonl(
        folder / "retrieval/corpus.jsonl", ({"_id": t.name, "title": "", "text": t.document} for t in searched)
    )
    _write_jsonl(folder / "retrieval/queries.jsonl", ({"_id": t.name, "text": t.summary} for t in searched))
    qrels = folder / "retrieval/qrels/test.tsv"
    qrels.parent.mkdir(parents=True, exist_ok=True)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{t.name}\t{t.name}\t1\n" for t in searched))
    return counts | {"held_out_queries": len(searched)}


def collect_objects(roots: Iterable[tuple[str, Path]] | None = None) -> list[DocumentedObject]:
    """All documented objects below the roots, with unique names and texts.

    Args:
      roots: Pairs of dotted prefix and source folder; None is the standard library and `PACKAGES`.
    """
    seen: set[str] = set()
    objects = []
    for prefix, root in _installed_roots() if roots is None else roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if _SKIPPED_FOLDERS.isdisjoint(part.lower() for part in parts) and not parts[-1].startswith("test_"):
                module = ".".join([*([prefix] if prefix else []), *(part for part in parts if part != "__init__")])
                objects += [thing for thing in _parse(path, module or prefix) if _is_new(thing, seen)]
    return objects


def package_roots(packages: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Pairs of name and source folder of installed packages, for `collect_objects`.

    Raises:
      InputError: A package is not installed, or is a single module.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{package}: no package of that name is installed; install it or name another")
        for location in spec.submodule_search_locations:
            yield package, Path(location)


def _installed_roots() -> Iterator[tuple[str, Path]]:
    yield "", Path(sysconfig.get_paths()["stdlib"])
    yield from package_roots(PACKAGES)


def _is_new(thing: DocumentedObject, seen: set[str]) -> bool:
    """Whether name and text are new: packages copy each other's docstrings with small edits."""
    summary = _normalized(thing.summary)
    keys = {thing.name, summary, _normalized(thing.body)} - {""}  # a property's setter has the name of its getter
    if not summary or keys & seen:
        return False
    seen |= keys
    return True


def _normalized(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _parse(path: Path, module: str) -> Iterator[DocumentedObject]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # files for other Python versions
    yield from _walk(tree, module)


def _walk(node: _Documented, name: str) -> Iterator[DocumentedObject]:
    docstring = ast.get_docstring(node)
    if docstring:
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip())
        summary, body = (" ".join(part.split()) for part in (paragraphs[0], "\n".join(paragraphs[1:])))
        if 3 <= len(summary.split()) <= 40:
            yield DocumentedObject(name, _signature(node, name), summary, body if len(body.split()) >= 5 else "")
    for child in ast.iter_child_nodes(node):
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not in_function:
            yield from _walk(child, f"{name}.{child.name}")


def _signature(node: ast.AST, name: str) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return name
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if arguments[:1] in (["self"], ["cls"]):
        arguments = arguments[1:]
    return f"{name}({', '.join(arguments)})"


def _clip(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _embedding_files(things: list[DocumentedObject]) -> dict[str, list[dict[str, Any]]]:
    """One file per type of query, since the queries of a batch come from one file."""
    describe = [(thing, thing.summary, thing.document) for thing in things if thing.searchable]
    name, excerpt = [], []
    for thing in things:
        if thing.body:
            words = " ".join(re.findall(r"[A-Za-z][a-z]*|\d+", thing.name))
            name.append((thing, words, f"{thing.summary}\n{_clip(thing.body, _DOCUMENT_WORDS)}"))
        sentences = [part for part in re.split(r"(?<=[.:;])\s+", thing.body) if len(part.split()) >= 5]
        if len(sentences) >= 2:
            chosen = sentences[_stable(thing.name) % len(sentences)]
            rest = thing.body.replace(chosen, " ", 1)
            document = f"{thing.signature}\n{thing.summary} {_clip(rest, _DOCUMENT_WORDS)}"
            excerpt.append((thing, _clip(chosen, 32), document))
    return {
        "describe": _embedding_rows(DESCRIBE, describe),
        "name": _embedding_rows(NAME, name),
        "excerpt": _embedding_rows(EXCERPT, excerpt),
    }


def _embedding_rows(instruction: str, pairs: list[tuple[DocumentedObject, str, str]]) -> list[dict[str, Any]]:
    """Records of (object, query, document); negatives are documents of the same form."""
    siblings = _siblings([thing for thing, _, _ in pairs])
    return [
        {"query": [instruction, query], "pos": [["", document]], "neg": [["", pairs[other][2]] for other in others]}
        for (_, query, document), others in zip(pairs, siblings, strict=True)
    ]


def _siblings(things: list[DocumentedObject]) -> list[list[int]]:
    """Indices of hard negatives for each object: of its module or class, else its neighbours."""
    scopes: dict[str, list[int]] = defaultdict(list)
    for i, thing in enumerate(things):
        scopes[thing.scope].append(i)
    result = []
    for i, thing in enumerate(things):
        others = [other for other in scopes[thing.scope] if other != i]
        nearby = range(max(0, i - _NEGATIVES), min(i + _NEGATIVES + 1, len(things)))
        others += [other for other in nearby if other != i and other not in others]
        generator = np.random.default_rng(_stable(thing.name))
        pool = others if len(others) <= _NEGATIVES else generator.choice(others, _NEGATIVES, replace=False).tolist()
        result.append(pool[:_NEGATIVES])
    return result


def _generative_files(things: list[DocumentedObject]) -> dict[str, list[dict[str, Any]]]:
    answers = []
    for thing in things:
        answers.append({"text": [f"What does `{thing.name}` do?", thing.summary]})
        if thing.body:
            question = f"Describe `{thing.signature}` in detail."
            answers.append({"text": [question, _clip(f"{thing.summary} {thing.body}", _ANSWER_WORDS)]})
    return {"answers": answers}


def _stable(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[4:8])


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
