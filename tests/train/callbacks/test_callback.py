"""When callbacks are told what."""

from contextlib import contextmanager

import pytest

from grit_jax.train.callbacks.callback import Callback
from tests.train.callbacks import made_up


class Told(Callback):
    """Writes down the hooks that are called; `due` every few steps."""

    def __init__(self, log, name="", every=None):
        self.log, self.name, self.every = log, name, every

    @contextmanager
    def running(self, run):
        self.log.append(f"{self.name}begin")
        yield
        self.log.append(f"{self.name}end")

    @contextmanager
    def during(self, run, phase, what):
        self.log.append(f"{self.name}{what}")
        yield

    def before_step(self, run, step, batch):
        self.log.append(f"{self.name}before {step}")

    def step_started(self, run, step, metrics):
        self.log.append(f"{self.name}started {step}")

    def due(self, run, step):
        return bool(self.every) and step % self.every == 0

    def step_ended(self, run, step, values):
        self.log.append(f"{self.name}ended {step}")
        values[self.name] = values["loss"]


def test_numbers_come_one_step_late_or_at_once_where_the_state_is_needed(tmp_path):
    late, at_once = [], []
    made_up.run(tmp_path, Told(late), steps=3)
    assert late == [
        "begin", "the data of step 1", "before 1", "step 1", "started 1",
        "the data of step 2", "before 2", "step 2", "started 2", "ended 1",
        "the data of step 3", "before 3", "step 3", "started 3", "ended 2", "ended 3", "end",
    ]  # fmt: skip
    made_up.run(tmp_path, Told(at_once, every=2), steps=3)
    assert at_once[7:12] == ["step 2", "started 2", "ended 1", "ended 2", "the data of step 3"]
    assert at_once[-3:] == ["started 3", "ended 3", "end"]


def test_callbacks_are_told_in_their_order_and_end_in_the_opposite_one(tmp_path):
    log = []
    collected = made_up.run(tmp_path, Told(log, "a "), Told(log, "b "), steps=1)
    assert [entry[0] for entry in log] == [*"abababababab", *"ba"]
    assert collected.lines[1]["a "] == collected.lines[1]["b "] == 4, "the later ones see what the earlier ones add"


def test_an_error_ends_a_run_without_its_last_numbers(tmp_path):
    def make(step):
        return made_up.metrics() if step < 3 else pytest.fail("broken")

    log = []
    with pytest.raises(pytest.fail.Exception):
        made_up.run(tmp_path, Told(log), make=make)
    assert log[-1] == "step 3" and "ended 1" in log


def test_a_run_without_callbacks_is_a_run(tmp_path):
    assert list(made_up.run(tmp_path).lines) == list(range(1, 13))
