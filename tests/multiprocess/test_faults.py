"""Whatever happens to a run's machines, it ends with the weights of one that nothing happens to."""

import pytest

from tests.multiprocess import faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(folder, seed):
    faults.trial(seed, folder)


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3, 4, 6, *range(100, 150)])
def test_many_disturbed_runs_end_with_the_weights_of_undisturbed_ones(folder, seed):
    faults.trial(seed, folder)
