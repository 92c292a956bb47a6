import numpy as np
import pytest

from grit_jax.runs.logs import read_lines
from grit_jax.train.callbacks.bad_batches import BadBatches
from tests.train.callbacks import made_up


def test_skipped_steps_are_counted_in_a_row(tmp_path):
    def make(step):
        return made_up.metrics(skipped=float(step in (2, 3, 6, 7, 8)), generative=np.nan)

    with pytest.raises(FloatingPointError, match=r"3 updates in a row were skipped, up to step 8"):
        made_up.run(tmp_path, BadBatches(6.0, 3), make=make)
    bad = read_lines(tmp_path / "bad_batches.jsonl")
    assert [line["step"] for line in bad] == [2, 3, 6, 7, 8]
    assert bad[0]["samples"] == [
        {"stream": "embedding", "dataset": "nli", "file": "nli.jsonl", "records": [1], "lines": [2]}
    ]


def test_an_update_that_alone_is_not_finite_is_named(tmp_path):
    made_up.run(tmp_path, BadBatches(6.0, 3), make=lambda step: made_up.metrics(skipped=float(step == 2)))
    (bad,) = read_lines(tmp_path / "bad_batches.jsonl")
    assert bad["text"].endswith("norm 0.5, but the optimizer's update is not finite; the update is skipped")


def test_a_spike_is_said_and_written_down_and_stops_nothing(tmp_path):
    def make(step):
        return made_up.metrics(generative=30.0 if step == 25 else 3.0)

    collected = made_up.run(tmp_path, BadBatches(6.0, 3), make=make, steps=30)
    assert len(collected.lines) == 30
    (spike,) = read_lines(tmp_path / "bad_batches.jsonl")
    assert (spike["step"], spike["reason"], spike["loss/generative"]) == (25, "spike", 30.0)
    assert spike["samples"][0]["records"] == [24]
    assert any("step 25: loss/generative is 30" in text for text in collected.said_lines)
    assert made_up.run(tmp_path, BadBatches(None, 3), make=make, steps=30).said_lines == []


def test_bad_batches_of_steps_that_are_done_again_are_cut_off(tmp_path):
    made_up.run(tmp_path, BadBatches(6.0, 3), make=lambda step: made_up.metrics(skipped=float(step in (3, 8))), steps=9)
    made_up.run(tmp_path, BadBatches(6.0, 3), start=5)
    assert [line["step"] for line in read_lines(tmp_path / "bad_batches.jsonl")] == [3]
