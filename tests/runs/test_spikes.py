import collections

import numpy as np
import pytest

from grit_jax.runs.spikes import Spikes, robust_z


def steps(values, name="loss/generative"):
    return [{name: float(value)} for value in values]


def found(spikes, lines):
    return [number for number, line in enumerate(lines) if spikes.find(line)]


def test_a_robust_score_is_not_moved_by_an_outlier_in_the_window():
    # Median 2, absolute deviations 1, 0, 1, 0, 98: their median 1.
    assert robust_z(4.9652, collections.deque([1.0, 2.0, 3.0, 2.0, 100.0])) == pytest.approx(2.0)


def test_noise_and_a_falling_loss_are_no_spikes_and_a_jump_is_one():
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    falling = 1 + 3 * np.exp(-np.arange(200) / 30) + noise
    falling[150] += 2
    assert found(Spikes(6.0), steps(falling)) == [150]


def test_of_a_row_of_spikes_the_first_is_reported():
    values = [1.0 + 0.01 * (step % 3) for step in range(30)] + [5.0] * 5 + [1.0] * 5 + [5.0]
    assert found(Spikes(6.0), steps(values)) == [30, 40]


def test_a_batch_is_compared_with_those_of_its_own_file():
    def line(file, value):
        return {"loss/embedding": value, f"loss/embedding/{file}": value}

    lines = [line("easy", 0.1), *[line("hard", 2.0)] * 3] * 20
    spikes = Spikes(6.0)
    assert found(spikes, lines) == []
    # Usual among all files, yet twenty times what this file's are.
    assert spikes.find(line("easy", 2.0))[:2] == ("loss/embedding", 2.0)


def test_losses_that_are_not_finite_or_not_there_are_left_out():
    spikes = Spikes(6.0)
    assert found(spikes, steps([1.0] * 20 + [float("nan"), float("inf")])) == []
    assert spikes.find({}) is None
