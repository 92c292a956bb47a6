"""The command `grit-jax doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from grit_jax.cli.command import JSON, argument, command, flag
from grit_jax.config import DistributedConfig
from grit_jax.doctor.environment import Environment, Problem, find_problems, inspect
from grit_jax.errors import InputError
from grit_jax.parallel.chips import GIB
from grit_jax.runs.checks import Check, print_checks


@command(
    "show what JAX finds on this machine, likely problems, and whether the numbers are right",
    flag("--selftest", "compare kernels, a sharded step, losses and a checkpoint with references"),
    argument("--checkpoint", metavar="PATH", help="where --selftest writes (default: a temporary folder)"),
    JSON,
    examples="""\
  grit-jax doctor
  grit-jax doctor --selftest
  grit-jax doctor --selftest --checkpoint gs://my-bucket/doctor --json
""",
)
def run(args: argparse.Namespace) -> int:
    """Inspects and tests; 1 if there is a problem or a check fails. In a job, only process 0 prints."""
    if args.checkpoint and not args.selftest:
        raise InputError(f"--checkpoint={args.checkpoint} is where --selftest writes; add --selftest")

    if args.selftest:
        from grit_jax.parallel import distributed

        distributed.start(DistributedConfig())

    facts = inspect()
    problems = list(find_problems(facts))
    prints = facts.process_index == 0
    if prints and not args.json:
        print("\n".join(_lines(facts, problems)), flush=True)
    checks = _checks(args.checkpoint, facts) if args.selftest and not facts.error else iter(())
    if prints and not args.json:
        failed = print_checks(checks)
    else:
        checks = list(checks)
        failed = any(not check.passed for check in checks)
        if prints:
            print(json.dumps(_as_json(facts, problems, checks)))
    return int(failed or bool(problems))


def _checks(folder: str | None, facts: Environment) -> Iterator[Check]:
    if folder is None and facts.process_count > 1:
        raise InputError(f"--checkpoint is missing: name a folder that all {facts.process_count} processes see")

    from grit_jax.doctor.selftest import selftest

    with tempfile.TemporaryDirectory() as temporary:
        yield from selftest(folder or temporary)


def _lines(facts: Environment, problems: Sequence[Problem]) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)
    for devices in facts.devices:
        memory = f", {devices.memory_bytes / GIB:.1f} GiB each" if devices.memory_bytes else ""
        yield f"{devices.count} x {devices.kind} ({devices.platform}){memory}"
    yield f"processes: {facts.process_count}"
    for problem in problems:
        yield f"problem: {problem.text}"
        yield f"  remedy: {problem.remedy}"
    if not problems:
        yield "no problem found"


def _as_json(facts: Environment, problems: Sequence[Problem], checks: Sequence[Check]) -> dict[str, Any]:
    def check_as_json(check: Check) -> dict[str, Any]:
        difference = check.difference if math.isfinite(check.difference) else None  # JSON has no infinity
        return dataclasses.asdict(check) | {"difference": difference, "passed": check.passed}

    found = {"problems": [dataclasses.asdict(problem) for problem in problems]}
    return dataclasses.asdict(facts) | found | {"checks": [check_as_json(check) for check in checks]}
