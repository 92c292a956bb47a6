import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from grit_jax.config import COPIES, MeshConfig
from grit_jax.errors import InputError
from grit_jax.parallel.sharding import host_share, make_mesh
from grit_jax.plan import topology
from grit_jax.plan.topology import devices, parse_topology, topology_names

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    "name, libtpu_name, num_chips",
    [
        ("v4-8", "v4:2x2x1", 4),
        ("v4-4096", "v4:8x16x16", 2048),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-64", "v6e:8x8", 64),
    ],
)
def test_names_that_count_cores_and_names_that_count_chips_give_the_documented_shape(name, libtpu_name, num_chips):
    parsed = parse_topology(name)
    assert (parsed.libtpu_name, parsed.num_chips) == (libtpu_name, num_chips)


def test_slices_multiply_the_chips_and_not_the_shape():
    parsed = parse_topology("v5p-16", slices=3)
    assert (parsed.libtpu_name, parsed.chips_per_slice, parsed.num_chips) == ("v5p:2x2x2", 8, 24)


def test_every_shape_has_as_many_chips_as_its_name_says():
    for name in topology_names():
        parsed = parse_topology(name)
        assert parsed.num_chips * parsed.chip.num_cores == int(name.rpartition("-")[2])


@pytest.mark.parametrize("name", ["v5p-100", "v5p", "v5p-64x", "v5p-064", "v5p-4", "v6e-512"])
def test_a_wrong_size_names_the_known_ones_of_its_version(name):
    version = name[:3]
    with pytest.raises(InputError, match=f"unknown TPU topology '{name}'; known: {version}-") as error:
        parse_topology(name)
    assert "v4-8" not in str(error.value)


def test_a_wrong_version_names_all_known_ones():
    with pytest.raises(InputError, match=r"unknown TPU topology 'h100-8'; known: v4-8, .*v5p-128.*v6e-256"):
        parse_topology("h100-8")


def test_no_slice_is_refused():
    with pytest.raises(InputError, match="slices=0"):
        parse_topology("v5e-4", slices=0)


def test_rings_are_those_of_whole_cubes_and_of_the_whole_pods_side():
    assert parse_topology("v5p-64").wrap == (False, False, False)
    assert parse_topology("v5p-256").wrap == (True, True, True)
    assert parse_topology("v5e-64").wrap == (False, False, False)
    assert parse_topology("v6e-128").wrap == (False, True, False)


def test_a_missing_libtpu_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install .*-e '\.\[tpu\]'"):
        devices(parse_topology("v5e-4"))


@needs_libtpu
@pytest.mark.parametrize("name", ["v4-16", "v5e-1", "v5p-8", "v6e-8"])
def test_each_chip_is_one_device_of_the_kind_that_its_facts_name(name):
    parsed = parse_topology(name)
    found = devices(parsed)
    assert len(found) == parsed.num_chips
    assert {device.device_kind for device in found} == {parsed.chip.device_kind}


@needs_libtpu
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_torus(tensor):
    chips = devices(parse_topology("v5p-128"))  # 4 x 4 x 4
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=tensor), chips)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 64 // tensor, "tensor": tensor, "expert": 1}
    assert set(mesh.devices.flat) == set(chips)


@needs_libtpu
def test_devices_of_several_slices_come_slice_by_slice():
    found = devices(parse_topology("v5e-4", slices=2))
    assert [device.slice_index for device in found] == [0] * 4 + [1] * 4


@needs_libtpu
def test_devices_are_found_in_a_process_that_set_nothing_up():
    script = """
import os
from grit_jax.plan.topology import devices, parse_topology
devices(parse_topology("v5e-4"))
import jax
print(jax.devices(), os.environ["TPU_SKIP_MDS_QUERY"], os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"])
"""
    done = subprocess.run([sys.executable, "-c", script], env={}, capture_output=True, text=True, check=True)
    assert done.stdout == "[CpuDevice(id=0)] 1 1\n"


def shares_by_coordinates(mesh):
    """The batch shards of each process's devices, from their coordinates in the mesh."""
    _, fsdp, _, expert = mesh.devices.shape
    held = {}
    for (i, j, _, k), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add((i * fsdp + j) * expert + k)
    return held


@needs_libtpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "v5p-12288" else name for name in topology_names()]
)
def test_every_host_of_every_topology_and_mesh_fills_the_shards_that_it_holds(name):
    chips = devices(parse_topology(name))
    meshes = [MeshConfig(), COPIES, MeshConfig(tensor=2), MeshConfig(tensor=8), MeshConfig(2), MeshConfig(expert=4)]
    for config in meshes if len(chips) <= 256 else meshes[:1]:
        if len(chips) % (config.data * config.tensor * config.expert):
            continue
        mesh = make_mesh(config, chips)
        for process, held in shares_by_coordinates(mesh).items():
            share = host_share(mesh, process)
            assert set(share.shards) == held
            rows = share.rows(2 * share.num_shards).reshape(-1, 2)
            assert rows.tolist() == [[2 * shard, 2 * shard + 1] for shard in sorted(held)]


@needs_libtpu
def test_the_shards_of_a_host_of_a_pod_are_not_next_to_each_other():
    assert host_share(make_mesh(MeshConfig(), devices(parse_topology("v5p-128"))), 0).shards == (0, 4, 16, 20)
