"""XLA's options for training steps: libtpu, which refuses one that it does not know, takes them."""

import jax
import pytest

from grit_jax.parallel.chips import CHIPS, compiler_options

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")


def compile_for(topology, options):
    from grit_jax.plan.topology import devices, parse_topology

    device = devices(parse_topology(topology))[0]
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    return jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("num_slices", [1, 2])
def test_libtpu_takes_the_options_of_every_chip(chip, num_slices):
    compile_for(f"{chip.name}-8", compiler_options(chip.device_kind, num_slices))


def test_libtpu_refuses_an_option_that_it_does_not_know():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        compile_for("v5e-8", {"xla_tpu_no_such_option": "true"})


@pytest.mark.parametrize("value", [98304, "98304"])
def test_libtpu_takes_the_values_of_an_option_as_yaml_has_them(value):
    compile_for("v6e-8", {"xla_tpu_scoped_vmem_limit_kib": value, "xla_tpu_enable_data_parallel_all_reduce_opt": True})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"xla_tpu_no_such_option": 3}, "has no option 'xla_tpu_no_such_option'; correct it or leave it out"),
        ({"xla_tpu_scoped_vmem_limit_kib": "abc"}, "xla_tpu_scoped_vmem_limit_kib=abc is no value of that option"),
        ({"xla_backend_optimization_level": "x"}, "xla_backend_optimization_level=x is no value of that option"),
    ],
)
def test_what_libtpu_refuses_is_named_with_its_key(options, problem):
    from grit_jax.config import ModelConfig
    from grit_jax.train.setup import option_problem

    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        compile_for("v5e-8", options)
    found = option_problem(error.value, ModelConfig(compiler_options=options))
    assert found.startswith("model.compiler_options: ")
    assert problem in found
    assert "set model.compiler_options={}" in option_problem(error.value, ModelConfig())


def test_a_step_has_the_options_of_its_mesh_unless_the_config_has_others():
    from grit_jax.config import Config, MeshConfig, ModelConfig
    from grit_jax.plan.program import planned_mesh
    from grit_jax.plan.topology import parse_topology
    from grit_jax.train.setup import step_options

    one, two = (
        planned_mesh(Config(mesh=MeshConfig(data=slices, fsdp=-1)), parse_topology("v6e-8", slices=slices))
        for slices in (1, 2)
    )
    assert step_options(ModelConfig(), one) == {"xla_tpu_scoped_vmem_limit_kib": "98304"}
    assert len(step_options(ModelConfig(), two)) == 3
    assert step_options(ModelConfig(compiler_options={}), two) == {}
