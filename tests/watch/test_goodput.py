import time

import pytest

from grit_jax.watch.goodput import Clock, goodput_of


def line(session, end, from_step, step, **seconds):
    return {"session": session, "time": end, "from_step": from_step, "step": step, "seconds": seconds}


def test_the_last_line_of_a_session_counts():
    lines = [line(0, 50, 0, 3, useful=30, compile=20), line(0, 100, 0, 8, useful=80, compile=20)]
    goodput = goodput_of(lines)
    assert (goodput.sessions, goodput.wall_seconds, goodput.ratio) == (1, 100, 0.8)


def test_steps_done_again_restarts_and_pauses_are_not_useful():
    lines = [
        line(0, 100, 0, 10, useful=80, startup=20),  # steps 7 to 10 are lost: 4 of 10
        line(130, 200, 6, 12, useful=60, startup=10),
    ]
    goodput = goodput_of(lines)
    assert goodput.seconds["useful"] == pytest.approx(80 * 0.6 + 60)
    assert goodput.seconds["restart"] == pytest.approx(80 * 0.4 + 10)
    assert goodput.seconds["startup"] == 20
    assert goodput.seconds["down"] == 30
    assert goodput.wall_seconds == pytest.approx(200)
    assert goodput.sessions == 2


def test_steps_lost_to_a_later_session_are_lost_too():
    lines = [line(0, 10, 0, 10, useful=10), line(10, 12, 8, 10, useful=2), line(12, 20, 4, 12, useful=8)]
    assert goodput_of(lines).seconds["useful"] == pytest.approx(4 + 0 + 8)


def test_a_run_that_has_not_begun_has_none():
    assert goodput_of([]).ratio == 0


def test_a_clock_counts_every_second_once():
    clock = Clock(began=time.monotonic() - 1.0, from_step=3)
    clock.add("startup", 0.5)
    with clock.spent("evaluation"):
        time.sleep(0.05)
        with clock.spent("compile"):
            time.sleep(0.1)
    said = clock.line(4)
    seconds = said["seconds"]
    assert (said["from_step"], said["step"]) == (3, 4)
    assert seconds["startup"] == 0.5
    assert 0.1 <= seconds["compile"] < 0.15
    assert 0.05 <= seconds["evaluation"] < 0.1
    assert sum(seconds.values()) == pytest.approx(said["time"] - said["session"], abs=0.01)
