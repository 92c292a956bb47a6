import time

from grit_jax.runs.logs import read_lines
from grit_jax.train.callbacks.goodput import Goodput
from tests.train.callbacks import made_up


def test_a_new_shape_is_a_compile_and_known_ones_are_useful_time(tmp_path):
    made_up.run(tmp_path, Goodput(time.monotonic() - 5), rows=lambda step: 2 + 2 * (step > 6), seconds=0.05)
    seconds = read_lines(tmp_path / "goodput.jsonl")[-1]["seconds"]
    assert 0.1 <= seconds["compile"] < 0.5 <= seconds["useful"], "two of twelve steps have a new shape"
    assert seconds["startup"] >= 5


def test_steps_that_were_skipped_are_no_useful_time(tmp_path):
    made_up.run(tmp_path, Goodput(time.monotonic()), make=lambda step: made_up.metrics(skipped=float(step == 3)))
    assert read_lines(tmp_path / "goodput.jsonl")[-1]["seconds"]["skipped"] > 0


def test_goodput_adds_up_over_sessions(tmp_path):
    made_up.run(tmp_path, Goodput(time.monotonic() - 5), steps=9)
    collected = made_up.run(tmp_path, Goodput(time.monotonic() - 5), start=5)
    sessions = {line["session"]: line for line in read_lines(tmp_path / "goodput.jsonl")}
    assert [line["from_step"] for line in sessions.values()] == [0, 5]
    assert [line["step"] for line in sessions.values()] == [9, 12]
    assert 0 < collected.lines[12]["goodput"] < 0.5, "ten seconds were spent starting"
