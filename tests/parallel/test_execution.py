from types import SimpleNamespace

import jax
import pytest

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
        ("expert_kernel", "megablox", "tpu", "gpu"),
    ],
)
def test_a_kernel_of_another_platform_is_refused(key, kernel, needed, platform):
    config = ModelConfig(**{key: kernel})
    message = f"model.{key}={kernel} needs {needed} devices, but these are {platform}; set it to auto"
    with pytest.raises(InputError, match=message):
        execution(config, platform)
