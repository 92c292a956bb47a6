"""Which rows each process fills, where the devices of processes alternate in the mesh."""

import pytest

from tests.multiprocess import launch

PLACE = """
    import itertools
    import numpy as np
    from jax.sharding import Mesh
    from grit_jax.parallel import sharding
    from grit_jax.doctor.batches import embedding_batch, generative_batch, random_texts

    rng = np.random.default_rng(0)
    texts = random_texts(rng, 48)
    rows = np.arange(48).reshape(16, 3).tolist()
    whole = {
        "embedding": embedding_batch(texts, rows, 64, num_queries=16),
        "generative": generative_batch(texts, rows, 64),
    }
    shapes = [(1, 8, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 2, 2)]
    for seed, shape in itertools.product(range(8), shapes):
        devices = np.random.default_rng(seed).permutation(np.array(jax.devices(), dtype=object))
        mesh = Mesh(devices.reshape(shape), sharding.MESH_AXES)
        mine = sharding.host_rows(mesh, whole)
        placed = sharding.place_batch(mesh, mine)
        for field, array, own, expected in zip(*map(jax.tree.leaves, (
            {name: type(stream)(*stream._fields) for name, stream in whole.items()}, placed, mine, whole
        ))):
            assert array.shape == expected.shape, field
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, expected[shard.index]), (field, seed, shape)
            needed = {shard.index[0].indices(len(expected)) for shard in array.addressable_shards}
            assert len(own) == sum(stop - start for start, stop, _ in needed), field
    print("placed")
"""


@pytest.mark.parametrize("num_processes", [2, 4])
def test_every_device_gets_its_rows_and_a_host_fills_no_others_in_any_order(num_processes):
    outputs = launch.run(PLACE, num_processes=num_processes, devices_each=8 // num_processes)
    assert outputs == ["placed\n"] * num_processes


SELFTEST = """
    import sys
    from grit_jax.doctor import selftest
    from grit_jax.parallel import sharding
    from grit_jax.config import MeshConfig

    shards = sharding.host_share(sharding.make_mesh(MeshConfig())).shards
    assert list(shards) != list(range(shards[0], shards[-1] + 1)), shards
    for check in selftest.selftest(sys.argv[1]):
        if check.target.startswith(("train step", "contrastive", "checkpoint")):
            print(check.target, check.passed)
"""


@pytest.mark.long
def test_the_selftest_passes_where_devices_of_hosts_alternate(tmp_path):
    outputs = launch.run(SELFTEST, tmp_path, num_processes=2, devices_each=2)
    lines = outputs[0].splitlines()
    assert outputs[1] == outputs[0]
    assert len(lines) == 5
    assert all(line.endswith("True") for line in lines), lines
