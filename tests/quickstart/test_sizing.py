"""The size of a quickstart from a base, by parameters and devices."""

import math
from types import SimpleNamespace

import pytest

from grit_jax.quickstart import sizing
from grit_jax.quickstart.sizing import Size, assumed_flops, choose_size
from tests.commands import ROOT

PARAMETERS = {"SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "Qwen2.5-0.5B": 494_032_768}
SMOL, _, HALF_A_BILLION = PARAMETERS.values()


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


DOCUMENTED = {
    "CPU, 2 cores": [CPU], "T4": [T4], "TPU v2-8": [device("TPU v2", "tpu")] * 8, "TPU v5e-1": [V5E],
    "L4": [device("NVIDIA L4")], "A100": [device("NVIDIA A100-SXM4-40GB")], "H100": [H100],
}  # fmt: skip


def test_the_sizes_are_those_of_the_documentation():
    page = (ROOT / "docs/quickstart.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    names, _, *rows = rows
    assert names[1:] == list(PARAMETERS)
    assert [name for name, *_ in rows] == list(DOCUMENTED)
    for name, *shown in rows:
        settings = [chosen(count, *DOCUMENTED[name])[0] for count in PARAMETERS.values()]
        assert shown == [f"{each['data.embedding_batch']} × {each['train.steps']}" for each in settings]


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
    part, _ = chosen(SMOL, V5E, most_tokens=sizing._step_tokens(sizing._BATCHES[2]))
    assert (whole["data.embedding_batch"], part["data.embedding_batch"]) == (256, 64)
    part, _ = chosen(HALF_A_BILLION, V5E, most_tokens=sizing._step_tokens(sizing._BATCHES[2]) - 1)
    assert part["data.embedding_batch"] == 32
    assert part["train.steps"] > chosen(HALF_A_BILLION, V5E)[0]["train.steps"]


def test_the_cores_of_a_cpu_are_counted_once_and_the_devices_of_a_pod_each():
    assert assumed_flops([CPU] * 8) == assumed_flops([CPU])
    assert assumed_flops([V5E] * 8) == 8 * assumed_flops([V5E])


def test_an_unknown_accelerator_counts_as_a_slow_one():
    assert 0 < assumed_flops([device("unheard of")]) <= assumed_flops([T4])


def test_the_settings_are_options_of_the_config():
    size = Size("org/base", "1 x Tesla T4", {"train.steps": 7, "data.group_size": 2}, 100)
    assert size.overrides == ["--train.steps=7", "--data.group_size=2"]
