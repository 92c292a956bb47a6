import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grit_jax.config import MeshConfig
from grit_jax.data.batch import HostShare
from grit_jax.errors import InputError
from grit_jax.parallel import sharding


def test_a_mesh_axis_of_minus_one_takes_the_devices_left():
    assert dict(sharding.make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(3, 1, 1),
            "mesh.data=3, mesh.fsdp=1, mesh.tensor=1, mesh.expert=1 do not multiply to the 8",
        ),
        (MeshConfig(-1, 3, 1), "do not multiply to the 8 devices"),
        (MeshConfig(-1, -1, 1), "at most one of them -1"),
        (MeshConfig(0, 8, 1), "sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(mesh)


def test_an_unknown_axis_raises_and_an_indivisible_dim_is_named():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    shape = {"mlp": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    with pytest.raises(InputError, match=r"mlp.kernel: embed=3 is not divisible by mesh.fsdp\*expert=2; choose"):
        sharding.shardings(mesh, shape, {"mlp": {"kernel": ("embed", "mlp")}})
    with pytest.raises(KeyError):
        sharding.partition_spec(("unheard_of",))


def test_constraints_are_real_on_cpu():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "activation_mlp"))(np.zeros((8, 4, 6)))
    assert x.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert sharding.constrain(x, "batch") is x


def test_one_host_holds_all_rows_and_shares_split_them():
    assert sharding.host_share(sharding.make_mesh(MeshConfig(2, 2, 2))) == HostShare((0, 1, 2, 3), 4)
    assert HostShare((1,), 4).rows(12).tolist() == [3, 4, 5]
    assert HostShare((0, 2), 4).rows(8).tolist() == [0, 1, 4, 5]


def test_a_gathered_parameter_travels_in_bfloat16_and_its_gradient_adds_up_in_float32():
    axes, dtype = ("embed", "mlp"), jnp.dtype("bfloat16")
    weights, *change = np.random.default_rng(0).normal(0.5, 1.0, (9, 16, 4)).astype(np.float32)
    change = np.stack(change)  # one on each device

    def whole(weights, change):
        gathered, pull_back = jax.vjp(lambda piece: sharding.gather(piece, axes, dtype), weights)
        return gathered, pull_back(change[0])[0]

    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 8, 1))):
        split = sharding.on_devices(whole, in_axes=(axes, ("batch", "whole", "mlp")), out_axes=(("whole", "mlp"), axes))
        program = jax.jit(split).lower(weights, change)
        gathered, gradient = program.compile()(weights, change)
    assert np.all(gathered == weights.astype(dtype))
    np.testing.assert_allclose(gradient, change.sum(axis=0), rtol=1e-5, atol=1e-5)
    assert "bf16" in next(line for line in program.as_text().splitlines() if "all_gather" in line)
