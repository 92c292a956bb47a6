"""How the processes of a run find each other, and what is said when they do not."""

import signal
import subprocess
import sys

import jax
import pytest

from grit_jax.config import DistributedConfig
from grit_jax.errors import InputError
from grit_jax.parallel import distributed
from tests.commands import environment
from tests.multiprocess.launch import free_address


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


def test_an_error_ends_its_process_while_threads_of_it_wait_for_others():
    script = """
import sys, threading
from grit_jax.parallel import distributed
from grit_jax.config import DistributedConfig
distributed.start(DistributedConfig(coordinator=sys.argv[1], num_processes=1, process_id=0))
threading.Thread(target=threading.Event().wait).start()
print("said before")
raise OSError("the disk is full")
"""
    command = [sys.executable, "-c", script, free_address()]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (1, "said before\n")
    assert ended.stderr.rstrip().endswith("OSError: the disk is full")


def test_a_process_that_has_nothing_to_save_yet_ends_at_once_when_it_is_told_to():
    script = """
import os, signal, sys, time
from grit_jax.parallel import distributed
from grit_jax.config import DistributedConfig
distributed.start(DistributedConfig(coordinator=sys.argv[1], num_processes=1, process_id=0))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, free_address()]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=50)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
