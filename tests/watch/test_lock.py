"""Who may write to a run folder."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from grit_jax import files
from grit_jax.config import InputError
from grit_jax.watch import lock
from grit_jax.watch.lock import WriterLock, read_writer, refuse_living, writer_lock
from tests.bucket import BUCKET, emulator
from tests.runs import ROOT


def rewrite(folder, **changes):
    """Changes what the lock file says."""
    writer = dataclasses.replace(read_writer(folder), **changes)
    files.write_text(folder / lock.NAME, json.dumps(dataclasses.asdict(writer)))


def test_a_second_living_writer_is_refused_and_a_released_folder_is_free(tmp_path):
    with writer_lock(tmp_path):
        begun = time.monotonic()
        with pytest.raises(InputError, match=rf"is being written by process {os.getpid()} on .*; wait for it, end it"):
            WriterLock(tmp_path)
        assert time.monotonic() - begun < lock.BEAT_SECONDS / 2, "on one machine nobody waits for a heartbeat"
        assert read_writer(tmp_path).alive
    assert read_writer(tmp_path) is None
    WriterLock(tmp_path).release()


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path):
    program = f"from grit_jax.watch.lock import WriterLock; import os; WriterLock({str(tmp_path)!r}); os._exit(1)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    dead = read_writer(tmp_path)
    assert dead.dead and not dead.alive and dead.age < 30
    begun = time.monotonic()
    with writer_lock(tmp_path):
        assert read_writer(tmp_path).pid == os.getpid()
    assert time.monotonic() - begun < 5


def test_a_later_process_of_the_same_number_is_not_the_writer(tmp_path):
    with writer_lock(tmp_path):
        rewrite(tmp_path, process_started=1, token="earlier")
        assert read_writer(tmp_path).dead


def test_a_heartbeat_of_another_machine_is_watched_where_it_is_recent(tmp_path):
    with writer_lock(tmp_path):
        rewrite(tmp_path, machine="another", token="theirs", beat=time.time())
    assert read_writer(tmp_path).token == "theirs", "a lock that is another's is left alone"
    begun = time.monotonic()
    refuse_living(tmp_path, limit=0.5)  # stands still: dead
    assert 0.3 < time.monotonic() - begun < 5

    def beat():
        time.sleep(0.2)
        rewrite(tmp_path, count=7)

    rewrite(tmp_path, beat=time.time())
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="is being written by"):
        refuse_living(tmp_path, limit=10)
    thread.join()
    rewrite(tmp_path, beat=time.time() - 61)
    refuse_living(tmp_path)  # at once


def test_heartbeats_are_renewed_and_a_writer_that_was_taken_over_stops(tmp_path):
    held = WriterLock(tmp_path, beat=0.05)
    deadline = time.monotonic() + 10
    while read_writer(tmp_path).count < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_writer(tmp_path).count >= 2
    held.check()
    rewrite(tmp_path, token="theirs", host="elsewhere")
    while held._taken_by is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(InputError, match=r"was taken over by process .* on elsewhere"):
        held.check()
    held.release()
    assert read_writer(tmp_path).token == "theirs"


PROGRAM = """
import os, sys, time
from grit_jax.config import InputError
from grit_jax.watch import lock
folder = sys.argv[1]
held = lock.WriterLock(folder)
try:
    lock.WriterLock(folder)
except InputError as error:
    assert "is being written by" in str(error)
else:
    raise AssertionError("two writers")
held.release()
assert lock.read_writer(folder) is None
print("held")
"""


def test_a_bucket_has_one_writer_too():
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        command = [sys.executable, "-c", PROGRAM, f"gs://{BUCKET}/run"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "held", done.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_lock_names_nobody_and_is_taken_over(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with writer_lock(tmp_path):
        assert read_writer(tmp_path).alive
