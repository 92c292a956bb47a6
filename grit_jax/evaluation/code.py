"""The task of writing programs, which are run against tests."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation import sandbox
from grit_jax.evaluation.reading import EvaluationRecord, read_records
from grit_jax.evaluation.scores import pass_at_k
from grit_jax.evaluation.task import Outcome, Session, Task

# The imports that bigcode-evaluation-harness puts before every Python program, except numpy, which the sandbox lacks.
_IMPORTS = """import math
import re
import sys
import copy
import datetime
import itertools
import collections
import heapq
import statistics
import functools
import hashlib
import string
from typing import *
from collections import *
"""


@dataclasses.dataclass(frozen=True)
class Code(Task):
    """Whether programs pass their tests: pass@k.

    `path` is a .jsonl file in HumanEval's or HumanEvalPack's format. `complete` continues `prompt` as it is;
    `synthesize` sends `instruction` and begins the completion with `declaration`. Of that it runs, after common imports
    of the standard library, what HumanEvalSynthesize (OctoPack, arXiv 2308.07124) does: the lines before the first that
    is neither blank nor indented.

    Attributes:
      form: How to prompt the model.
      samples: Programs for each problem.
      k: Values of k in pass@k; the first gives the main score.
      temperature: Temperature of the sampling.
      top_p: Probability of the nucleus to sample from.
      max_new_tokens: Most tokens of a program.
      stop: A program ends before the first of these.
      seconds: Time that a program with its test may take.
      memory_gib: Memory that it may use.
    """

    form: Literal["complete", "synthesize"] = "complete"
    samples: int = 20
    k: list[int] = dataclasses.field(default_factory=lambda: [1])
    temperature: float = 0.2
    top_p: float = 0.95
    max_new_tokens: int = 512
    stop: list[str] = dataclasses.field(
        default_factory=lambda: ["\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert"]
    )
    seconds: float = 5.0
    memory_gib: float = 0.5

    def __post_init__(self):
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise InputError(f"k={self.k} must be numbers from 1 to samples={self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"samples={self.samples} at temperature=0 are all the same; use 1, or a temperature")
        for key in ("seconds", "memory_gib", "max_new_tokens"):
            require_positive(key, getattr(self, key))

    def evaluate(self, session: Session) -> Outcome:
        """Writes and runs the programs."""
        limits = sandbox.Limits(self.seconds, int(self.memory_gib * 2**30))
        # Raises before any work where programs cannot be confined.
        sandbox.run("", sandbox.ProgramTest("", "f", ""), limits)
        records = read_records(Path(self.path))
        synthesize = self.form == "synthesize"
        prompts = [record.get("instruction" if synthesize else "prompt") for record in records]
        key, imports = ("declaration", _IMPORTS) if synthesize else ("prompt", "")
        beginnings = [record.get(key) for record in records]
        tests = [program_test(record, key, imports) for record in records]
        programs: list[str | None] = []
        for sample in range(self.samples):
            written = session.completions(
                prompts, prefixes=beginnings if synthesize else None, raw=not synthesize, stop=self.stop, sample=sample,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p,
            )  # fmt: skip
            programs += [
                None if completion is None else imports + begin + (indented(completion) if synthesize else completion)
                for begin, completion in zip(beginnings, written, strict=True)
            ]
        session.progress.start("running programs", len(programs))
        verdicts = sandbox.run_all(
            [program or "raise SystemExit" for program in programs], tests * self.samples, limits,
            done=session.progress.advance,
        )  # fmt: skip
        passed = np.array([verdict.status == "passed" for verdict in verdicts]).reshape(self.samples, len(records))
        of_k = {k: pass_at_k(passed.sum(axis=0), self.samples, k) for k in self.k}
        scores = {f"pass_at_{k}": float(np.mean(values)) for k, values in list(of_k.items())[1:]}
        scores["num_too_long"] = float(programs.count(None))
        scores["num_timed_out"] = float(sum(verdict.status == "timed out" for verdict in verdicts))
        completions = [
            {"task_id": record.values.get("task_id"), "program": program, **verdict._asdict()}
            for record, program, verdict in zip(records * self.samples, programs, verdicts, strict=True)
        ]
        return Outcome(f"pass_at_{self.k[0]}", of_k[self.k[0]], scores=scores, completions=completions)


def indented(completion: str) -> str:
    """The lines before the first one that is neither blank nor indented."""
    lines = completion.split("\n")
    return "\n".join(itertools.takewhile(lambda line: not line.strip() or line[0] in " \t", lines))


def program_test(record: EvaluationRecord, key: str, imports: str = "") -> sandbox.ProgramTest:
    """The test of a record's programs.

    The test sees the record's text before the function, such as imports and helpers, and only a program's function.

    Args:
      record: A problem.
      key: Key of the text that its programs begin with.
      imports: Code before that text.

    Raises:
      InputError: That text is not the beginning of a function.
    """
    setup, function, test = f"{imports}{record.get(key)}    pass\n", record.get("entry_point"), record.get("test")
    try:
        compile(setup, key, "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"{record.where}: {key!r} does not begin a function ({error}); it must end where an indented body can "
            "follow"
        ) from error
    calls_itself = any(line.startswith("check(") for line in test.split("\n"))
    return sandbox.ProgramTest(setup, function, test if calls_itself else f"{test}\ncheck({function})\n")
