"""When a run stops that is told to."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from grit_jax.config import load_config
from grit_jax.runs.folder import last_checkpoint
from grit_jax.train import stopping
from grit_jax.train.loop import Trainer
from grit_jax.train.stopping import stop_signals, wait_for_turn
from tests.commands import ROOT, TINY, write_data

SECONDS = 1.0  # of a step that takes long


class Running:
    """A number that a step makes, which ends after some seconds."""

    ndim = 0

    def __init__(self, seconds, value=0.0, begins=None):
        self.ends = (begins or time.monotonic()) + seconds
        self._value = value

    def is_ready(self):
        return time.monotonic() >= self.ends

    def block_until_ready(self):
        time.sleep(max(0, self.ends - time.monotonic()))
        return self

    def __array__(self, *options):
        return np.asarray(self.block_until_ready()._value)


def waited(running, expected, stop=None):
    """Seconds until the next step is queued, when the running one is expected to take so many."""
    began = time.monotonic()
    wait_for_turn(running, began + expected, stop or threading.Event())
    return time.monotonic() - began


def test_the_next_step_is_queued_shortly_before_the_running_one_ends(monkeypatch):
    monkeypatch.setattr(stopping, "_AHEAD_SECONDS", 0.2)
    assert 0.2 < waited(Running(0.5), expected=0.5) < 0.4
    assert waited(Running(0.1), expected=0.1) < 0.05, "short steps are queued at once"
    assert 0.1 <= waited(Running(0.1), expected=5) < 0.3, "a step that ends before its time leaves devices idle"
    assert waited(None, expected=5) < 0.05


def test_nothing_is_waited_for_when_the_run_is_to_stop():
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert waited(Running(5), expected=5, stop=stop) < 1


@pytest.fixture
def slow_run(tmp_path, monkeypatch):
    """A run whose steps take `SECONDS` on the devices, while the host goes on."""
    monkeypatch.setattr(stopping, "_AHEAD_SECONDS", SECONDS / 5)
    data = write_data(tmp_path / "data")
    options = [f"--data.train={data}", f"--train.output={tmp_path / 'run'}", "--train.steps=20"]
    trainer = Trainer(load_config(ROOT / "configs/tiny.yaml", [*TINY, *options, "--checkpoint.every=100"]))
    trainer.begun = []
    step = trainer._train_step

    def slow(state, batch):
        state, metrics = step(state, batch)
        before = trainer.begun[-1].ends if trainer.begun else 0
        trainer.begun.append(Running(SECONDS, metrics["loss"], begins=max(before, time.monotonic())))
        return state, metrics | {"loss": trainer.begun[-1]}

    trainer._train_step = slow
    return trainer


def tell_to_stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_a_run_stops_after_the_step_that_is_in_flight_when_it_is_told_to(slow_run):
    def watch():
        while len(slow_run.begun) < 3:  # how long steps take is known from the second on
            time.sleep(0.01)
        time.sleep(slow_run.begun[2].ends - SECONDS / 2 - time.monotonic())
        tell_to_stop()

    threading.Thread(target=watch, daemon=True).start()
    assert not slow_run.fit()
    assert (slow_run.step, last_checkpoint(slow_run.folder)) == (3, 3)


def test_a_run_that_is_told_to_stop_before_its_first_step_does_none(slow_run):
    batches = slow_run.batches

    def told(start):
        tell_to_stop()
        yield from batches(start)

    slow_run.batches = told
    assert not slow_run.fit()
    assert (slow_run.step, last_checkpoint(slow_run.folder)) == (0, None)


def test_a_second_signal_acts_at_once(request):
    # A shell starts what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        for _ in range(2):
            tell_to_stop(signal.SIGINT)
            assert stop.wait(1)
