"""The mesh, the one table from logical axes to mesh axes, and the shardings that follow from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grit_jax.config import MeshConfig
from grit_jax.data.batch import Batch, HostShare
from grit_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Logical axis of an array dim -> the mesh axes that shard it; None replicates the dim.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": ("fsdp", "expert"),
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "projection": None,
    "norm": None,
    "rank": None,
    "experts": "expert",
    "expert_embed": "fsdp",
    "router": None,
    "whole": None,  # a dim that a kernel needs unsharded
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": None,
    "passages": None,
    "tokens": None,
    "activation_embed": None,
    "activation_mlp": "tensor",
    "activation_heads": "tensor",
    "activation_vocab": "tensor",
}

# Parameter dims sharded only to save memory: every device gathers them before it computes.
_STORAGE_AXES = ("embed", "expert_embed")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the device mesh; one axis of `config` may be -1 to take the remaining devices.

    Raises:
      InputError: The axes do not multiply to the number of devices, or do not fit its slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    described = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise InputError(f"{described}: sizes must be positive, and at most one of them -1")
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise InputError(f"{described} do not multiply to the {len(devices)} devices found; set one of them to -1")
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices arranged in a mesh of these sizes; slices of a multislice job are the outer part of `data`."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:  # on other platforms, hosts have slice numbers too
        slices.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    if sizes[0] % len(slices):
        raise InputError(
            f"mesh.data={sizes[0]} is not divisible by the {len(slices)} slices, which data-parallel copies span; "
            f"use a multiple of {len(slices)}"
        )
    inner = (sizes[0] // len(slices), *sizes[1:])
    # Mesh axes that cannot be whole axes of a slice's torus become parts of them.
    parts = [
        mesh_utils.create_device_mesh(inner, slice_devices, allow_split_physical_axes=True)
        for slice_devices in slices.values()
    ]
    return np.concatenate(parts)


def platform(mesh: Mesh) -> str:
    """The platform of the mesh's devices: `tpu`, `gpu` or `cpu`."""
    return mesh.devices.flat[0].platform


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of an array whose dims are named by `axes`; an unknown name raises KeyError."""
    return PartitionSpec(*(LOGICAL_AXES[axis] for axis in axes))


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Number of shards of a dim with logical axis `axis`."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that shard a dim with logical axis `axis`."""
    names = LOGICAL_AXES[axis]
    return (names,) if isinstance(names, str) else names or ()


def shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shardings of a tree of arrays.

    Args:
      mesh: The device mesh.
      shapes: Tree of arrays or ShapeDtypeStructs.
      axes: The same tree with a tuple of logical axes at each leaf.

    Raises:
      InputError: A dim is not divisible by the mesh axes that shard it.
    """

    def sharding(path, shape, names):
        for size, name in zip(shape.shape, names, strict=True):
            pieces = axis_size(mesh, name)
            if size % pieces:
                raise InputError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {name}={size} is not divisible by "
                    f"mesh.{'*'.join(mesh_axes(name))}={pieces}; choose mesh sizes that divide it"
                )
        return NamedSharding(mesh, partition_spec(names))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def flat(mesh: Mesh) -> NamedSharding:
    """The sharding of a dim over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def spread(mesh: Mesh, shapes: Any) -> Any:
    """Shardings that spread one copy of a tree of arrays over all devices, for conversion rather than computation.

    Each array is sharded along its first dim that the number of devices divides, and replicated if it has none.
    """

    def sharding(shape):
        dim = next((i for i, size in enumerate(shape.shape) if size % mesh.size == 0), None)
        return replicated(mesh) if dim is None else NamedSharding(mesh, PartitionSpec(*[None] * dim, MESH_AXES))

    return jax.tree.map(sharding, shapes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the sharding of `x` over the mesh of `jax.set_mesh`; without a mesh returns `x`.

    Inside `on_devices` only the remaining mesh axes are used.
    """
    free = _free_axes(MESH_AXES)
    return jax.lax.with_sharding_constraint(x, _spec_over(free, axes)) if free else x


def on_devices(function: Callable, *, in_axes: Any, out_axes: Any, over: Sequence[str] = MESH_AXES) -> Callable:
    """`function` run by every device on its own shards, with collectives over the mesh axes `over`.

    `jax.shard_map` by logical axes. Returns `function` itself without a mesh, inside a call over these axes, or if each
    of them has one device and other axes remain.

    Args:
      function: Runs on each device.
      in_axes: For each argument the logical axes of its dims; for a tree, a tree of them.
      out_axes: The same for the result.
      over: Mesh axes; the compiler chooses the sharding over the others.
    """
    free, mesh = _free_axes(over), jax.sharding.get_abstract_mesh()
    # The compiler refuses sums over axes of one device together with axes that it shards itself.
    if not free or (free != _free_axes(MESH_AXES) and all(mesh.shape[name] == 1 for name in free)):
        return function
    in_specs, out_specs = jax.tree.map(functools.partial(_spec_over, free), (in_axes, out_axes), is_leaf=_is_axes)
    # Not checked, as Pallas calls do not declare over which mesh axes their results vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False)


def split_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that shard logical axis `axis` and that the enclosing `on_devices` runs over."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in mesh_axes(axis) if name in manual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    """Gathers a parameter's dims that are sharded only for storage, given a device's shard and its logical axes.

    Shards are sent in `dtype`; the result has the dtype of `x`, in which its gradient is summed over the devices.
    Without such dims the result is `x` itself.
    """
    if not any(axis in _STORAGE_AXES for axis in axes):
        return x

    def whole(shard, dim, names):
        return jax.lax.all_gather(shard, names, axis=dim, tiled=True)

    return _over_storage_dims(whole, x.astype(dtype), axes).astype(x.dtype)


def _gather_backward(axes, _dtype, _residuals, change):
    # JAX itself would sum in `dtype`: possibly in bfloat16, over all devices of a pod.
    def shard(whole, dim, names):
        return jax.lax.psum_scatter(whole, names, scatter_dimension=dim, tiled=True)

    return (_over_storage_dims(shard, change, axes),)


gather.defvjp(lambda x, axes, dtype: (gather(x, axes, dtype), None), _gather_backward)


def _over_storage_dims(
    function: Callable[[jax.Array, int, tuple[str, ...]], jax.Array], x: jax.Array, axes: Sequence[str]
) -> jax.Array:
    """Applies `function(x, dim, mesh axes)` to every dim that the enclosing `on_devices` shards only for storage.

    It also runs over the remaining mesh axes, over which the compiler would gather `x` first.
    """
    dims = [(dim, names) for dim, axis in enumerate(axes) if axis in _STORAGE_AXES and (names := split_axes(axis))]
    if not dims:
        return x
    left = tuple("whole" if axis in _STORAGE_AXES else axis for axis in axes)
    apply = functools.partial(functools.reduce, lambda x, dim: function(x, *dim), dims)
    return on_devices(apply, in_axes=(left,), out_axes=left)(x)


def _free_axes(names: Sequence[str]) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(name for name in names if name not in mesh.manual_axes)


def _spec_over(names: Sequence[str], axes: Sequence[str]) -> PartitionSpec:
    return PartitionSpec(*(tuple(name for name in mesh_axes(axis) if name in names) or None for axis in axes))


def _is_axes(leaf: Any) -> bool:
    return type(leaf) is tuple and all(isinstance(name, str) for name in leaf)


def host_share(mesh: Mesh, process: int | None = None) -> HostShare:
    """The shards of a batch on the devices of a process, for any order of the mesh's devices.

    The TPU runtime orders devices along the torus, so a host's shards are seldom neighbours.

    Args:
      mesh: The device mesh.
      process: Number of the process; None for this one.
    """
    process = jax.process_index() if process is None else process
    num_shards = axis_size(mesh, "batch")
    pieces = NamedSharding(mesh, partition_spec(("batch",))).devices_indices_map((num_shards,))
    held = {_start(index, num_shards) for device, index in pieces.items() if device.process_index == process}
    return HostShare(tuple(sorted(held)), num_shards)


def _start(index: tuple[slice, ...], size: int) -> int:
    """Start of a device's shard in an array's first dim, of length `size`."""
    return index[0].indices(size)[0]


def host_rows(mesh: Mesh, batch: Batch) -> Batch:
    """This host's part of a whole batch, for `place_batch`."""
    share = host_share(mesh)
    return _map_fields(lambda value, per_row: value[share.rows(len(value))] if per_row else value, batch)


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Places this host's rows of a batch on the mesh: rows are sharded over the devices, slots and weights replicated.

    Args:
      mesh: The device mesh.
      batch: The rows of this host's shards, shard by shard as `host_share` lists them.
    """
    share = host_share(mesh)

    def place(value, per_row):
        sharding = _field_sharding(mesh, per_row)
        if not per_row:
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        pieces = dict(zip(share.shards, np.split(value, len(share.shards)), strict=True))
        rows = len(value) // len(share.shards) * share.num_shards

        def piece(index):
            return pieces[_start(index, rows) * share.num_shards // rows]

        return jax.make_array_from_callback((rows, *value.shape[1:]), sharding, piece)

    return _map_fields(place, batch)


def abstract_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Shapes and shardings of a whole batch on the mesh."""

    def abstract(value, per_row):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=_field_sharding(mesh, per_row))

    return _map_fields(abstract, batch)


def _field_sharding(mesh: Mesh, per_row: bool) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(("batch",))) if per_row else replicated(mesh)


def _map_fields(function: Callable[[Any, bool], Any], batch: Batch) -> Batch:
    """The batch with `function(value, per_row)` applied to every field; `per_row`: whether it has one entry per row."""
    return {
        name: type(stream)(*(function(value, field in stream.per_row) for field, value in stream._asdict().items()))
        for name, stream in batch.items()
    }
