import jax
import pytest

from grit_jax.train.profile import ProfileWindow


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: made.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(("stop",)))
    return made


def run(window, path, steps, calls):
    """What was called by the time each step had begun and ended."""
    with ProfileWindow(window, path) as profile:
        for step in steps:
            profile.before(step)
            calls.append(step)
            profile.after(step, jax.numpy.zeros(()))
    return calls


def test_the_steps_of_the_window_are_traced(calls, tmp_path):
    assert run([2, 3], tmp_path, [1, 2, 3, 4], calls) == [1, ("start", str(tmp_path)), 2, 3, ("stop",), 4]


def test_a_run_that_is_resumed_within_the_window_traces_the_rest(calls, tmp_path):
    assert run([2, 4], tmp_path, [3, 4, 5], calls) == [("start", str(tmp_path)), 3, 4, ("stop",), 5]


def test_a_run_that_ends_within_the_window_keeps_its_trace(calls, tmp_path):
    assert run([2, 9], tmp_path, [1, 2], calls)[-1] == ("stop",)


def test_without_a_window_nothing_is_traced(calls, tmp_path):
    assert run(None, tmp_path, [1, 2], calls) == [1, 2]
