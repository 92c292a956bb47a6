import os
import time

import pytest

from grit_jax.evaluation.code import with_test
from grit_jax.evaluation.data import read_rows
from grit_jax.evaluation.sandbox import Limits, Verdict, run, run_all

LIMITS = Limits(seconds=2.0, memory_bytes=1 << 28)


def test_a_program_passes_by_reaching_its_end():
    assert run("import math, collections\nassert math.sqrt(4) == 2\nprint('x' * 10**6)", LIMITS) == Verdict("passed")
    assert run("assert 1 == 2, 'no'", LIMITS) == Verdict("failed", "AssertionError: no")
    assert run("def f(:", LIMITS).detail.startswith("SyntaxError")
    assert run("import os\nos._exit(0)", LIMITS).status == "failed"
    assert run("raise SystemExit(0)", LIMITS).status == "failed"


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_time_is_limited(program):
    begun = time.monotonic()
    assert run(program, LIMITS._replace(seconds=1.0)) == Verdict("timed out", "stopped after 1 s")
    assert time.monotonic() - begun < 15


def test_memory_is_limited():
    assert run("x = bytearray(1 << 30)", LIMITS) == Verdict("failed", "MemoryError")


FORBIDDEN = [
    "open(path, 'w')",
    "open(path, 'r+')",
    "os.remove(path)",
    "os.truncate(path, 0)",
    "os.rename(path, path + '2')",
    "os.mkdir(path + '2')",
    "os.chmod(path, 0)",
    "os.symlink('a', path + '2')",
    "os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.execv('/bin/true', ['true'])",
    "os.kill(os.getppid(), 0)",
    "__import__('resource').setrlimit(7, (9, 9))",
    "__import__('_socket').socket()",
    "__import__('_thread').start_new_thread(print, ())",
]


def test_the_kernel_refuses_all_but_computing_and_reading(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    program = f"""
import os
path = {str(file)!r}
assert open(path).read() == "kept"
done = []
for action in {FORBIDDEN!r}:
    try:
        eval(action)
        done.append(action)
    except (PermissionError, ValueError, RuntimeError) as error:
        if not any(words in str(error) for words in ("permitted", "not allowed", "can't start new thread")):
            done.append(f"{{action}}: {{error!r}}")
assert not done, done
"""
    assert run(program, LIMITS) == Verdict("passed")
    assert file.read_text() == "kept"
    assert os.listdir(tmp_path) == ["file"]


def test_many_programs_keep_their_order():
    verdicts = run_all([f"assert {number} % 2" for number in range(6)], LIMITS)
    assert [verdict.status for verdict in verdicts] == ["failed", "passed"] * 3


def test_humanevals_own_solutions_pass(shared):
    for name, begin in (("humaneval.jsonl", "prompt"), ("humanevalpack_python.jsonl", "declaration")):
        rows = read_rows(shared / "data/eval/generative" / name)[::24]
        programs = [with_test(row.get(begin) + row.get("canonical_solution"), row) for row in rows]
        assert set(run_all(programs, LIMITS)) == {Verdict("passed")}
        wrong = run_all([with_test(row.get(begin) + "    pass", row) for row in rows], LIMITS)
        assert {verdict.status for verdict in wrong} == {"failed"}
