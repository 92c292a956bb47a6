"""What happens to a process that hangs."""

import os
import subprocess
import sys
import time

from grit_jax.runs.watchdog import EXIT_CODE, Watchdog
from tests.commands import ROOT

HANGS = """
import sys, time
from grit_jax.runs.watchdog import Watchdog
def where_it_hangs():
    time.sleep(60)
with Watchdog(0.3, sys.argv[1]) as dog:
    dog.beat("step 7")
    where_it_hangs()
"""


def test_a_hanging_process_says_where_and_ends(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path / "run/stacks-0.txt")]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - begun < 30
    assert "step 7 has taken more than train.watchdog_seconds=0.3: the process hangs and ends now" in done.stderr
    stacks = (tmp_path / "run/stacks-0.txt").read_text()
    for text in (done.stderr, stacks):
        assert "in where_it_hangs" in text


def test_beats_and_pauses_keep_it_quiet(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Watchdog(1.0, tmp_path / "stacks") as dog:
        for step in range(6):
            dog.beat(f"step {step}")
            time.sleep(0.2)
        with dog.paused():
            time.sleep(1.4)
        time.sleep(0.2)
    assert codes == []
    assert not (tmp_path / "stacks").exists()


def test_without_a_limit_nothing_is_watched(tmp_path):
    with Watchdog(None, tmp_path / "stacks") as dog:
        dog.beat("step 1")
