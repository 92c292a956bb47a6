import pytest

from grit_jax.parallel.chips import CHIPS, peak_flops


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_peak_of_a_tpu_is_found_by_what_jax_calls_it(chip):
    assert peak_flops(chip.device_kind) == chip.peak_flops


def test_a_longer_name_is_not_taken_for_the_shorter_one_that_starts_it():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops("cpu") is None
