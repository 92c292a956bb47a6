"""Programs that a model wrote, run where they can do no harm.

A program runs in a process of its own with limits of the kernel on time, memory and files, and under a system-call
filter (seccomp) that lets it compute, read files and nothing else: it can start no process, write, change or remove no
file, and open no connection. It needs Linux on x86-64 or ARM64, and no privilege.
"""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from grit_jax.config import InputError

_GUARD = Path(__file__).with_name("sandbox_guard.py")
_SYSTEMS = {("Linux", "x86_64"), ("Linux", "aarch64")}
_START_SECONDS = 20.0  # in which the interpreter must be ready, whatever else the machine does


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: Time of computing and of waiting, each.
      memory_bytes: Address space.
    """

    seconds: float
    memory_bytes: int


class Verdict(NamedTuple):
    """How a program ended.

    Attributes:
      status: `passed` if it ran to its end without an exception.
      detail: The exception, or what stopped it.
    """

    status: Literal["passed", "failed", "timed out"]
    detail: str = ""


def run(program: str, limits: Limits) -> Verdict:
    """Runs one Python program, without packages beyond the standard library.

    Raises:
      InputError: This machine cannot confine it.
    """
    if (platform.system(), platform.machine()) not in _SYSTEMS:
        raise InputError(
            f"programs can be confined on Linux (x86-64, ARM64), not on {platform.system()} {platform.machine()}; "
            "leave tasks of type code out"
        )
    token = secrets.token_hex(8)  # a program that only ends early cannot say that it passed
    read, write = os.pipe()
    with open(read, "rb") as report:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_GUARD), str(write), str(limits.memory_bytes), str(limits.seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write,),
            cwd="/", env={}, start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            process.communicate(f"{token}\n{program}".encode(), timeout=_START_SECONDS + limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lines = report.read(1 << 16).decode(errors="replace").split("\n")
    if "ready" not in lines:
        raise InputError(
            f"a program cannot be confined on this machine ({' '.join(lines).strip() or 'it did not start'})"
        )
    last = lines[-1]
    if last == f"passed {token}":
        return Verdict("passed")
    if last.startswith("failed "):
        return Verdict("failed", last.removeprefix("failed "))
    if -process.returncode in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
        return Verdict("timed out", f"stopped after {limits.seconds:g} s")
    return Verdict("failed", f"it ended before its end, exit code {process.returncode}")


def run_all(programs: Sequence[str], limits: Limits, *, done: Callable[[int], None] = lambda _: None) -> list[Verdict]:
    """Runs programs, as many at a time as there are cores; arguments and errors as of `run`."""

    def one(program: str) -> Verdict:
        verdict = run(program, limits)
        done(1)
        return verdict

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, programs))
