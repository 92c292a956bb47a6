"""A suite: a YAML file that names tasks, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from grit_jax import files
from grit_jax.config import from_mapping, parse_mapping
from grit_jax.errors import InputError
from grit_jax.evaluation.code import Code
from grit_jax.evaluation.generation import AlpacaEval, ExactMatch
from grit_jax.evaluation.learning import Classification, Clustering
from grit_jax.evaluation.likelihood import MultipleChoice, Perplexity
from grit_jax.evaluation.reranking import Reranking
from grit_jax.evaluation.retrieval import Retrieval
from grit_jax.evaluation.similarity import STS, PairClassification, Summarization
from grit_jax.evaluation.task import EmbeddingTask, Task

TYPES: Mapping[str, type[Task]] = {
    "retrieval": Retrieval,
    "sts": STS,
    "classification": Classification,
    "clustering": Clustering,
    "pair_classification": PairClassification,
    "summarization": Summarization,
    "reranking": Reranking,
    "multiple_choice": MultipleChoice,
    "perplexity": Perplexity,
    "exact_match": ExactMatch,
    "code": Code,
    "alpaca_eval": AlpacaEval,
}

_PACKAGED = "mteb"
PATHS = ("path", "shots_path", "passages")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks and the settings that they share.

    Attributes:
      tasks: In the order of the file, with resolved paths.
      max_length: Most tokens to keep of an embedded text.
      seed: Seed of all random draws.
    """

    tasks: tuple[Task, ...]
    max_length: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Keys of the file."""

    tasks: list
    instructions: str | None = None
    max_length: int = 512
    seed: int = 0


def load_suite(path: str | Path, *, data: str | Path | None = None) -> Suite:
    """Reads a suite.

    The file has `tasks`, a list of mappings with `name`, `type`, `path` and the settings of their type; optionally
    `instructions` (`mteb`, or a YAML file of instructions by task name), `max_length` and `seed`.

    Args:
      path: The file.
      data: Folder to which the tasks' paths are relative; None for the file's own.

    Raises:
      InputError: The file is missing or malformed, a key is unknown (with a suggestion), a value has the wrong type, a
        name is not unique or cannot name a file, or `instructions` lacks an embedding task.
    """
    path = Path(path)
    data = Path(data) if data else path.parent
    settings = from_mapping(_Settings, _read_mapping(path, "suite"), source=str(path))
    if not settings.tasks:
        raise InputError(f"{path}: tasks is empty; name at least one")
    for key, least in (("max_length", 1), ("seed", 0)):
        if getattr(settings, key) < least:
            raise InputError(f"{path}: {key}={getattr(settings, key)} must be at least {least}")
    instructions = _instructions(settings.instructions, path)
    tasks = [
        _with_instruction(_task(values, number, path, data), instructions, path)
        for number, values in enumerate(settings.tasks)
    ]
    names = [task.name for task in tasks]
    for name in names:
        if not name or set(name) & set("/\\\0"):
            raise InputError(
                f"{path}: name {name!r} of a task cannot be a file's; it must not be empty or have / or \\ in it"
            )
        if names.count(name) > 1:
            raise InputError(f"{path}: there are {names.count(name)} tasks of name {name!r}; give each its own")
    return Suite(tuple(tasks), settings.max_length, settings.seed)


def packaged_instructions() -> dict[str, str]:
    """One instruction for each of MTEB's 56 English tasks and the parts of CQADupstack, by task name."""
    file = resources.files("grit_jax.evaluation") / f"instructions/{_PACKAGED}.yaml"
    return parse_mapping(file.read_text(encoding="utf-8"), source=file.name)


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        text = files.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path}: cannot be read: {error}") from error
    if text is None:
        raise InputError(f"{what} {path}: no such file")
    return parse_mapping(text, source=str(path))


def _instructions(named: str | None, suite: Path) -> dict[str, str] | None:
    if named is None:
        return None
    found = packaged_instructions() if named == _PACKAGED else _read_mapping(suite.parent / named, "instructions")
    for name, text in found.items():
        if not isinstance(text, str):
            raise InputError(f"{named}: the instruction of {name!r} is {text!r:.60}; it must be a text")
    return found


def _task(values: Any, number: int, suite: Path, data: Path) -> Task:
    if not isinstance(values, dict):
        raise InputError(f"{suite}: tasks[{number}] is {values!r:.60}; it must be a mapping with name, type and path")
    where = f"{suite}: task {values.get('name', number)!r}"
    type_name = values.get("type")
    if type_name not in TYPES:
        close = difflib.get_close_matches(str(type_name), TYPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(TYPES)}"
        raise InputError(f"{where}: type is {type_name!r}; {hint}")
    given = {key: value for key, value in values.items() if key != "type"}
    given |= {key: str(data / given[key]) for key in PATHS if isinstance(given.get(key), str)}
    return from_mapping(TYPES[type_name], given, source=where)


def _with_instruction(task: Task, instructions: dict[str, str] | None, suite: Path) -> Task:
    if instructions is None or not isinstance(task, EmbeddingTask) or task.instruction is not None:
        return task
    if task.name not in instructions:
        close = difflib.get_close_matches(task.name, instructions, n=1)
        hint = f"did you mean {close[0]!r}? Else give" if close else "give"
        raise InputError(f"{suite}: task {task.name!r} is not in the suite's instructions; {hint} it an instruction")
    return dataclasses.replace(task, instruction=instructions[task.name])
