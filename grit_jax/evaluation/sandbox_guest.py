"""Runs inside a sandbox: a program that answers calls, or the test that makes them.

Started by `sandbox.run` with a role and bytes of memory; imports nothing from this package. The two exchange lines of
JSON: the arguments of a call, and what it returned or raised.
"""

import builtins
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import IO, Any, NoReturn

_LIMITS = ((resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0))
_TYPES: dict[str, Callable[[Any], Any]] = {
    "bytes": bytes,
    "complex": lambda parts: complex(*parts),
    "dict": dict,
    "frozenset": frozenset,
    "int": lambda digits: int(digits, 16),  # Python refuses to write long numbers in decimal digits
    "set": set,
    "tuple": tuple,
}


def pack(value: Any) -> Any:
    """Plain data as JSON; a value of a derived type counts as its base, such as a Counter as a dict."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset, list):
        if isinstance(value, kind):
            items = [pack(item) for item in value]
            return items if kind is list else {kind.__name__: items}
    raise TypeError(f"{type(value).__name__} is not plain data, and only that passes between a program and its test")


def unpack(line: str) -> Any:
    """The value of a packed line."""
    return json.loads(line, object_pairs_hook=lambda pairs: _TYPES[pairs[0][0]](pairs[0][1]))


def described(error: BaseException) -> tuple[str, str]:
    """An exception's type and message."""
    return type(error).__name__, " ".join(str(error)[:300].split())


def answer_calls(task: dict[str, str], calls: IO[str], answers: IO[str]) -> None:
    """Runs a program, tells whether that succeeded, and then answers calls to its function."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def answer(action: Callable[[], Any]) -> None:
        try:
            outcome = [pack(action())]
        except BaseException as error:
            outcome = described(error)
        print(json.dumps(outcome), file=answers, flush=True)

    answer(lambda: exec(compile(task["program"], "program", "exec"), names))
    for line in calls:
        given, named = unpack(line)
        answer(lambda given=given, named=named: names[task["function"]](*given, **named))


def make_calls(task: dict[str, str], answers: IO[str], calls: IO[str], report: IO[str]) -> NoReturn:
    """Runs a test and tells how it ended."""

    def end(verdict: str) -> NoReturn:
        report.write(verdict)
        report.flush()
        os._exit(0)

    def function(*given: Any, **named: Any) -> Any:
        call = json.dumps([pack(given), pack(named)])
        try:
            print(call, file=calls, flush=True)
        except BrokenPipeError:
            end("the program ended before its test")
        return next_answer()

    def next_answer() -> Any:
        line = answers.readline()
        if not line:  # not an exception, which the test might catch
            end("the program ended before its test")
        outcome = unpack(line)
        if len(outcome) == 1:
            return outcome[0]
        name, message = outcome
        known = getattr(builtins, name, None)
        base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
        kind = type(name, (base,), {"__str__": lambda _: message})
        raise kind.__new__(kind, message)  # some of Python's own exceptions need more than a message

    names = {"__name__": "__main__", task["function"]: function}
    try:
        next_answer()
        exec(compile(task["setup"], "setup", "exec"), names)
        names[task["function"]] = function
        exec(compile(task["code"], "test", "exec"), names)
    except BaseException as error:
        end(": ".join(filter(None, described(error))))
    end("passed")


def main() -> None:
    """Hides all files but the pipes from the program, limits its resources and runs it."""
    role, memory = sys.argv[1], int(sys.argv[2])
    with open("/task.json") as file:
        task = json.load(file)
    null = os.open("/dev/null", os.O_RDWR)
    kept = [os.fdopen(os.dup(number), mode) for number, mode in enumerate("rww")]
    for number in range(3):
        os.dup2(null, number)
    received, sent, report = kept
    for limit, most in (*_LIMITS, (resource.RLIMIT_AS, memory)):
        resource.setrlimit(limit, (most, most))
    if role == "program":
        report.close()
        print("ready", file=sent, flush=True)
        answer_calls(task, received, sent)
    elif received.readline() == "ready\n":
        print("begun", file=report, flush=True)
        make_calls(task, received, sent, report)


if __name__ == "__main__":
    main()
