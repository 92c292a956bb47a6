from types import SimpleNamespace

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from grit_jax.config import ModelConfig
from grit_jax.errors import InputError
from grit_jax.parallel.execution import execution


@pytest.mark.parametrize(("capabilities", "kernel"), [(["9.0", "8.0"], "cudnn"), (["7.5"], "dense")])
def test_gpus_before_ampere_attend_without_cudnn(monkeypatch, capabilities, kernel):
    devices = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
    monkeypatch.setattr(jax, "local_devices", lambda backend: devices)
    assert execution(ModelConfig(), "gpu").attention == kernel
    assert execution(ModelConfig(attention_kernel="cudnn"), "gpu").attention == "cudnn"


@pytest.mark.parametrize(
    ("key", "kernel", "needed", "platform"),
    [
        ("attention_kernel", "splash", "tpu", "cpu"),
        ("attention_kernel", "cudnn", "gpu", "tpu"),
        ("attention_kernel", "cudnn_packed", "gpu", "cpu"),
        ("expert_kernel", "megablox", "tpu", "gpu"),
    ],
)
def test_a_kernel_of_another_platform_is_refused(key, kernel, needed, platform):
    config = ModelConfig(**{key: kernel})
    message = f"model.{key}={kernel} needs {needed} devices, but these are {platform}; set it to auto"
    with pytest.raises(InputError, match=message):
        execution(config, platform)


def test_attention_by_offsets_needs_hopper_and_a_jax_with_that_entrance(monkeypatch):
    capabilities = ["9.0"]
    monkeypatch.setattr(
        jax, "local_devices", lambda backend: [SimpleNamespace(compute_capability=each) for each in capabilities]
    )
    config = ModelConfig(attention_kernel="cudnn_packed")
    assert execution(config, "gpu").attention == "cudnn_packed"
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", lambda query, key, value: None)
    with pytest.raises(InputError, match="has no attention by cuDNN that takes offsets; set it to cudnn"):
        execution(config, "gpu")
    capabilities.append("8.0")
    with pytest.raises(InputError, match=r"cudnn_packed needs GPUs of compute capability 9.0 .* but one has 8.0"):
        execution(config, "gpu")
