"""The environment of the hosts, launch/env.sh: libtpu, which ends at a flag that it does not know, takes its flags."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.commands import ROOT

START = """
import os
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
from jax.experimental import topologies
print(len(topologies.get_topology_desc("v6e:2x2", "tpu").devices), os.environ["LIBTPU_INIT_ARGS"])
"""


def start_libtpu(more=""):
    """What a process prints that loads libtpu with the flags of all chips and of several slices."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    script = f'source launch/env.sh && LIBTPU_INIT_ARGS+="{more}" exec "$1" -c "$2"'
    return subprocess.run(
        ["bash", "-euc", script, "-", sys.executable, START],
        env=os.environ | {"GRIT_TYPE": "v6e-8", "GRIT_SLICES": "2"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_libtpu_takes_the_flags():
    done = start_libtpu()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 --xla_tpu")


def test_libtpu_refuses_a_flag_that_it_does_not_know():
    done = start_libtpu(" --xla_tpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr
