"""What two models find and write, side by side, for people to read: chosen by hashes, not by how good they are."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from claim_data import key, sample
from claim_setup import Claim
from pages import markdown_table

from grit_jax import files
from grit_jax.data.sources import find_files, open_source
from grit_jax.evaluation.retrieval import Collection, Retrieval, read_collection
from grit_jax.evaluation.suite import Suite
from grit_jax.evaluation.task import Session
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.exact_search import Searchable
from grit_jax.retrieval.quantization import pack

_WRITTEN, _SHOWN = 20, 10  # of each kind: in the file, and on the page
_NEW_TOKENS = 64
_LINE = 160  # characters of a text
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_RELEVANT = "✓ "


class _Query(NamedTuple):
    """A query of a task, by its id."""

    task: str
    id: str


def write_examples(claim: Claim, suite: Suite, output: Path, models: Mapping[str, Path]) -> dict[str, str]:
    """Writes twenty queries and twenty prompts with what each model finds and writes to `output/examples.md`.

    Queries are those of the lowest hashes of each retrieval task of the figures, in turn; prompts are the first turns
    of the lowest hashes of the held-out conversations. Completions are greedy.

    Args:
      claim: Whose figures.
      suite: Has the tasks.
      output: Folder that `prepare` has filled.
      models: Where the models are, by name.

    Returns:
      The first ten of each by the name of their place on the page.

    Raises:
      InputError: A model is missing.
    """
    tasks = {task.name: task for task in suite.tasks if isinstance(task, Retrieval) and task.name in claim.tasks}
    collections = {name: read_collection(Path(task.path), task.split) for name, task in tasks.items()}
    queries, prompts = _queries(collections), _prompts(output / "data/held_out/generative")
    hits, completions = [], []
    for path in models.values():
        session = Session(GritModel.load(path), suite.max_length)
        hits.append(_first_documents(session, tasks, collections, queries))
        completions.append(session.completions(prompts, max_new_tokens=_NEW_TOKENS))
    found = [
        [query.task, _line(collections[query.task].queries[query.id]), *shown]
        for query, *shown in zip(queries, *hits, strict=True)
    ]
    written = [
        [_line(prompt), *("(too long)" if text is None else _line(text) for text in texts)]
        for prompt, *texts in zip(prompts, *completions, strict=True)
    ]

    def page(count: int) -> str:
        search = markdown_table(
            ["task", "query", *(f"first document of {name} ({_RELEVANT.strip()} relevant)" for name in models)],
            found[:count],
        )
        return f"{search}\n{markdown_table(['prompt', *(f'completion of {name}' for name in models)], written[:count])}"

    files.write_text(output / "examples.md", page(_WRITTEN))
    return {f"{claim.prefix}examples": page(_SHOWN)}


def _queries(collections: Mapping[str, Collection]) -> list[_Query]:
    chosen = [
        [_Query(task, id) for id in sample(collection.queries, _WRITTEN, collection.queries.__getitem__)]
        for task, collection in collections.items()
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*chosen))
    return list(itertools.islice(filter(None, in_turn), _WRITTEN))


def _prompts(held_out: Path) -> list[str]:
    texts = {key(record) for path in find_files(str(held_out)) for record in open_source(path)}
    return sample(texts, _WRITTEN, str)


def _first_documents(
    session: Session,
    tasks: Mapping[str, Retrieval],
    collections: Mapping[str, Collection],
    queries: Sequence[_Query],
) -> list[str]:
    """A line of each query's first document, with a mark if it is relevant."""
    found = {}
    for name, task in tasks.items():
        collection, asked = collections[name], [query for query in queries if query.task == name]
        if not asked:
            continue
        vectors = session.directions([collection.queries[query.id] for query in asked], task.instruction)
        documents = session.directions(list(collection.documents.values()), task.document_instruction)
        _, best = Searchable(**pack(documents, task.stored_dtype)).top_k(vectors, 1)
        ids = list(collection.documents)
        for query, (first,) in zip(asked, best.tolist(), strict=True):
            relevant = collection.judgements[query.id].get(ids[first], 0) > 0
            found[query] = f"{_RELEVANT if relevant else ''}{_line(collection.documents[ids[first]])}"
    return [found[query] for query in queries]


def _line(text: str) -> str:
    """The beginning of a text as a cell of a table in Markdown."""
    line = " ".join(text.split())
    cut = line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"
    return _MARKDOWN.sub(r"\\\1", html.escape(cut, quote=False))
