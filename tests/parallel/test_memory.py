"""How much memory a device has, and what says that it ran out."""

from types import SimpleNamespace

import jax
import pytest

from grit_jax.parallel.memory import device_memory, ran_out


def test_device_memory_is_what_jax_says_or_the_chips_own():
    def device(kind, platform, stats):
        return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)

    assert device_memory(device("TPU v5 lite", "tpu", {"bytes_limit": 7}), 1) == 7
    assert device_memory(device("TPU v5 lite", "tpu", None), 1) == int(15.75 * 2**30)
    assert device_memory(device("unheard of", "gpu", None), 1) is None
    cpu = device("cpu", "cpu", None)
    assert device_memory(cpu, 4) == pytest.approx(device_memory(cpu, 1) / 4, rel=1e-6)


def test_an_array_that_no_device_holds_runs_out_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda: jax.numpy.ones(1 << 46, "float32"))().block_until_ready()
    assert ran_out(error.value)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_memory'"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating"),
        OSError("RESOURCE_EXHAUSTED: Quota exceeded"),
    ],
)
def test_other_errors_do_not(error):
    assert not ran_out(error)
