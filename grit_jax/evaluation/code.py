"""Programs that the model writes, run against tests."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation import metrics, sandbox
from grit_jax.evaluation.data import Row, read_rows
from grit_jax.evaluation.task import Outcome, Session, Task

# What bigcode-evaluation-harness has before every Python program, but for numpy, which is not there when programs run.
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
    `synthesize` asks for what `instruction` says, in an answer that begins with `declaration`. Of that answer what
    HumanEvalSynthesize (OctoPack, arXiv 2308.07124) takes is run: the lines before the first that is neither blank nor
    indented, after common imports of the standard library.

    Attributes:
      form: How the model is asked.
      samples: Programs for each problem.
      k: Numbers of samples of which one must pass; the first gives the main score.
      temperature: Of the draws.
      top_p: Probability of the nucleus that is drawn from.
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
        # A machine that cannot confine programs is told before they are written.
        sandbox.run("", sandbox.Check("", "f", ""), limits)
        rows = read_rows(Path(self.path))
        synthesize = self.form == "synthesize"
        asked = [row.get("instruction" if synthesize else "prompt") for row in rows]
        key, imports = ("declaration", _IMPORTS) if synthesize else ("prompt", "")
        begun = [row.get(key) for row in rows]
        checks = [check_of(row, key, imports) for row in rows]
        programs: list[str | None] = []
        for sample in range(self.samples):
            written = session.answers(
                asked, prefixes=begun if synthesize else None, raw=not synthesize, stop=self.stop, sample=sample,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p,
            )  # fmt: skip
            programs += [
                None if answer is None else imports + begin + (indented(answer) if synthesize else answer)
                for begin, answer in zip(begun, written, strict=True)
            ]  # fmt: skip
        session.progress.start("running programs", len(programs))
        verdicts = sandbox.run_all(
            [program or "raise SystemExit" for program in programs], checks * self.samples, limits,
            done=session.progress.advance,
        )  # fmt: skip
        passed = np.array([verdict.status == "passed" for verdict in verdicts]).reshape(self.samples, len(rows))
        correct = passed.sum(axis=0)
        scores = {k: metrics.pass_at_k(correct, self.samples, k) for k in self.k}
        figures = {f"pass_at_{k}": float(np.mean(values)) for k, values in list(scores.items())[1:]}
        figures["num_too_long"] = float(sum(program is None for program in programs))
        figures["num_timed_out"] = float(sum(verdict.status == "timed out" for verdict in verdicts))
        answers = [
            {"task_id": rows[place % len(rows)].values.get("task_id"), "program": program, **verdict._asdict()}
            for place, (program, verdict) in enumerate(zip(programs, verdicts, strict=True))
        ]
        return Outcome(f"pass_at_{self.k[0]}", scores[self.k[0]], figures=figures, answers=answers)


def indented(answer: str) -> str:
    """The lines before the first one that is neither blank nor indented."""
    lines = answer.split("\n")
    return "\n".join(itertools.takewhile(lambda line: not line.strip() or line[0] in " \t", lines))


def check_of(row: Row, key: str, imports: str = "") -> sandbox.Check:
    """What tests the programs of a row.

    A test sees what comes before the function in the row, imports and helpers, and of a program the function alone.

    Args:
      row: It.
      key: Of the text that programs begin with.
      imports: Before that text.

    Raises:
      InputError: That text is not the beginning of a function.
    """
    setup, function, test = f"{imports}{row.get(key)}    pass\n", row.get("entry_point"), row.get("test")
    try:
        compile(setup, key, "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"{row.where}: {key!r} does not begin a function ({error}); it must end where an indented body can follow"
        ) from error
    calls_itself = any(line.startswith("check(") for line in test.split("\n"))
    return sandbox.Check(setup, function, test if calls_itself else f"{test}\ncheck({function})\n")
