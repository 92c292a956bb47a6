"""How the processes of a run find each other, and what is said when they do not."""

import jax
import pytest

from grit_jax import distributed
from grit_jax.config import DistributedConfig, InputError


@pytest.fixture
def alone(monkeypatch):
    """Nobody answers."""

    def initialize(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)


def test_an_address_where_nobody_answers_is_bad_input(alone):
    config = DistributedConfig(coordinator="10.0.0.1:9911", num_processes=2, process_id=1)
    with pytest.raises(InputError, match=r"distributed.coordinator=10.0.0.1:9911.*Barrier timed out"):
        distributed.start(config)


def test_hosts_of_a_tpu_that_miss_each_other_are_to_be_started_again(alone, monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setitem(distributed.DEVICE_FILES, "TPU", (str(tmp_path / "accel*"),))
    with pytest.raises(RuntimeError, match="start all of them again"):
        distributed.start(DistributedConfig())
