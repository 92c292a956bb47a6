from types import SimpleNamespace

import pytest

from grit_jax.runs import goodput
from grit_jax.runs.goodput import Clock, goodput_of


def line(session, end, from_step, step, **seconds):
    return {"session": session, "time": end, "from_step": from_step, "step": step, "seconds": seconds}


def test_the_last_line_of_a_session_counts():
    lines = [line(0, 50, 0, 3, useful=30, compile=20), line(0, 100, 0, 8, useful=80, compile=20)]
    found = goodput_of(lines)
    assert (found.sessions, found.wall_seconds, found.ratio) == (1, 100, 0.8)


def test_steps_done_again_restarts_and_pauses_are_not_useful():
    lines = [
        line(0, 100, 0, 10, useful=80, startup=20),  # steps 7 to 10 are lost: 4 of 10
        line(130, 200, 6, 12, useful=60, startup=10),
    ]
    found = goodput_of(lines)
    assert found.seconds["useful"] == pytest.approx(80 * 0.6 + 60)
    assert found.seconds["restart"] == pytest.approx(80 * 0.4 + 10)
    assert found.seconds["startup"] == 20
    assert found.seconds["down"] == 30
    assert found.wall_seconds == pytest.approx(200)
    assert found.sessions == 2


def test_steps_lost_to_a_later_session_are_lost_too():
    lines = [line(0, 10, 0, 10, useful=10), line(10, 12, 8, 10, useful=2), line(12, 20, 4, 12, useful=8)]
    assert goodput_of(lines).seconds["useful"] == pytest.approx(4 + 0 + 8)


def test_a_run_that_has_not_begun_has_none():
    assert goodput_of([]).ratio == 0


def test_a_clock_counts_every_second_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 5000 + now[0]))
    clock = Clock(began=90.0, from_step=3)
    clock.add("startup", 8.0)
    with clock.spent("evaluation"):
        now[0] += 2
        with clock.spent("compile"):
            now[0] += 4
            clock.add("data", 1.0)
        now[0] += 1
    now[0] += 5
    seconds = {"useful": 7.0, "startup": 8.0, "compile": 3.0, "data": 1.0, "evaluation": 3.0}
    assert clock.line(4) == {"session": 5090.0, "time": 5112.0, "from_step": 3, "step": 4, "seconds": seconds}
