"""Python starts with this where its folder is on the path: the devices of a mesh then come in the order of a pod.

The TPU runtime numbers chips by their place in the torus, so that the devices of one host are not next to each other
in a mesh: host 0 of a v5p-128 holds shards 0, 4, 16 and 20. `DEVICE_ORDER` is `interleaved`, one device of each process
in turn, or the seed of a random order.
"""

import os

import numpy as np
from jax.experimental import mesh_utils

_ORDER = os.environ["DEVICE_ORDER"]


def _mesh(shape, devices, **_):
    devices = np.array(devices, dtype=object)
    if _ORDER == "interleaved":
        devices = devices.reshape(len({device.process_index for device in devices}), -1).T.ravel()
    else:
        devices = np.random.default_rng(int(_ORDER)).permutation(devices)
    return devices.reshape(shape)


mesh_utils.create_device_mesh = _mesh
