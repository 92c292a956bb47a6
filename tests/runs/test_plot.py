import numpy as np
import pytest

from grit_jax.errors import InputError
from grit_jax.runs.history import running_mean, series
from grit_jax.runs.plot import plot_run
from tests.runs.runs import write_lines, write_run


def test_a_run_is_drawn(tmp_path):
    from matplotlib.image import imread

    plot_run(write_run(tmp_path / "run"), tmp_path / "plot.png")
    height, width, _ = imread(tmp_path / "plot.png").shape
    assert width > 1500 and height > 700


def test_a_run_of_one_stream_and_one_step_is_drawn(tmp_path):
    line = {"step": 1, "loss": 1.0, "loss/generative": 1.0, "learning_rate": 0.0, "tokens_per_second": 5.0}
    write_lines(tmp_path / "metrics.jsonl", [line | {"grad_norm": 1.0}])
    plot_run(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no step in metrics.jsonl; name a run folder whose run has begun"):
        plot_run(tmp_path, tmp_path / "plot.png")


def test_a_series_has_the_steps_that_have_it_and_its_mean_looks_back():
    steps, values = series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [2, 4])
    assert np.allclose(running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])
