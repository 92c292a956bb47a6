"""The size of a quickstart from a base, by parameters and devices."""

import math
from types import SimpleNamespace

import pytest

from grit_jax.quickstart import sizing
from grit_jax.quickstart.sizing import Size, assumed_flops, choose_size

SMOL, HALF_A_BILLION = 134_515_008, 494_032_768


def device(kind, platform="gpu"):
    return SimpleNamespace(device_kind=kind, platform=platform)


CPU, T4, V5E, H100 = (
    device("cpu", "cpu"), device("Tesla T4"), device("TPU v5 lite", "tpu"), device("NVIDIA H100 80GB HBM3")
)  # fmt: skip


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(sizing.os, "cpu_count", lambda: 2)


def chosen(parameters, *devices, most_tokens=math.inf):
    return choose_size(parameters, devices, most_tokens=most_tokens)


@pytest.mark.parametrize(
    ("parameters", "devices", "queries", "steps"),
    [
        (SMOL, [CPU], 16, 33),
        (SMOL, [T4], 32, 134),
        (SMOL, [V5E], 256, 400),
        (SMOL, [device("TPU v2", "tpu")] * 8, 256, 373),
        (SMOL, [device("NVIDIA L4")], 256, 250),
        (SMOL, [device("NVIDIA A100-SXM4-40GB")], 256, 400),
        (HALF_A_BILLION, [T4], 16, 151),
        (HALF_A_BILLION, [V5E], 256, 111),
        (HALF_A_BILLION, [H100], 256, 400),
    ],
)
def test_the_sizes_of_the_documentation(parameters, devices, queries, steps):
    settings, _ = chosen(parameters, *devices)
    assert (settings["data.embedding_batch"], settings["train.steps"]) == (queries, steps)


def test_a_base_of_135_million_parameters_is_done_on_two_cores_in_the_time_it_may_take():
    settings, measured = chosen(SMOL, CPU)
    tokens = settings["train.steps"] * sizing._step_tokens(sizing._BATCHES[-1])
    assert 8 * SMOL * tokens / assumed_flops([CPU]) <= sizing._TRAIN_SECONDS
    assert settings["data.group_size"] == 1
    assert 100 <= measured <= 200


def test_every_query_is_measured_on_an_accelerator():
    assert all(chosen(SMOL, kind)[1] > 1133 for kind in (T4, V5E, H100))


def test_a_batch_whose_layers_inputs_do_not_fit_is_made_smaller_and_its_steps_more():
    whole, _ = chosen(SMOL, V5E)
    part, _ = chosen(HALF_A_BILLION, V5E, most_tokens=7000)
    assert whole["data.embedding_batch"] == 256
    assert part["data.embedding_batch"] == 16 or sizing._step_tokens(sizing._BATCHES[3]) <= 7000
    assert part["train.steps"] == 400


def test_the_cores_of_a_cpu_are_counted_once_and_the_devices_of_a_pod_each():
    assert assumed_flops([CPU] * 8) == assumed_flops([CPU])
    assert assumed_flops([V5E] * 8) == 8 * assumed_flops([V5E])


def test_an_unknown_accelerator_counts_as_a_slow_one():
    assert 0 < assumed_flops([device("unheard of")]) <= assumed_flops([T4])


def test_the_settings_are_options_of_the_config():
    size = Size("org/base", "1 x Tesla T4", {"train.steps": 7, "data.group_size": 2}, 100)
    assert size.overrides == ["--train.steps=7", "--data.group_size=2"]
