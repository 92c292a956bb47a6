import jax
import pytest

from grit_jax.train.callbacks.profile import Profile
from tests.train.callbacks import made_up


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: made.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(("stop",)))
    return made


def run(window, path, steps, calls):
    """What was called by the time each step had been computed."""

    def make(step):
        calls.append(step)
        return made_up.metrics()

    made_up.run(path, Profile(window), make=make, start=steps[0] - 1, steps=steps[-1])
    return calls


def test_the_steps_of_the_window_are_traced(calls, tmp_path):
    assert run([2, 3], tmp_path, [1, 4], calls) == [1, ("start", f"{tmp_path}/profile"), 2, 3, ("stop",), 4]


def test_a_run_that_is_resumed_within_the_window_traces_the_rest(calls, tmp_path):
    assert run([2, 4], tmp_path, [3, 5], calls) == [("start", f"{tmp_path}/profile"), 3, 4, ("stop",), 5]


def test_a_run_that_ends_within_the_window_keeps_its_trace(calls, tmp_path):
    assert run([2, 9], tmp_path, [1, 2], calls)[-1] == ("stop",)


def test_without_a_window_nothing_is_traced(calls, tmp_path):
    assert run(None, tmp_path, [1, 2], calls) == [1, 2]
