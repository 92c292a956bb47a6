"""Who may write to a run folder."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.runs import lock
from grit_jax.runs.lock import WriterLock, read_writer, refuse_living, writer_lock
from tests.bucket import BUCKET, emulator
from tests.commands import ROOT


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
    program = f"from grit_jax.runs.lock import WriterLock; import os; WriterLock({str(tmp_path)!r}); os._exit(1)"
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
    held._thread.join(10)
    with pytest.raises(InputError, match=r"was taken over by process .* on elsewhere"):
        held.check()
    held.release()
    assert read_writer(tmp_path).token == "theirs"


PROGRAM = """
import os, sys, time
from grit_jax.errors import InputError
from grit_jax.runs import lock
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


RACE = """
import sys, threading, time
from grit_jax.errors import InputError
from grit_jax.runs import lock
folder, begin, rounds, threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
held = []
def take(number):
    time.sleep(max(0, begin - time.time()))
    try:
        held.append(lock.WriterLock(f"{folder}/{number}"))
    except InputError as error:
        assert "is being written by" in str(error), error
for number in range(rounds):
    together = [threading.Thread(target=take, args=[number]) for _ in range(threads)]
    [thread.start() for thread in together]
    [thread.join() for thread in together]
    begin = time.time()
print(*[one.folder.rpartition("/")[2] for one in held], flush=True)
sys.stdin.read()  # the others are still at it
for one in held:
    one.confirm()
"""


def winners(folder, *, processes, rounds, threads, environment=None):
    """Who held each of many folders, of processes and threads that all begin together."""
    command = [sys.executable, "-c", RACE, str(folder), str(time.time() + 2), str(rounds), str(threads)]
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(processes)
    ]  # fmt: skip
    held = [process.stdout.readline().split() for process in running]
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), errors
    return sorted(int(number) for numbers in held for number in numbers)


def test_of_many_that_start_together_one_holds_the_folder(tmp_path):
    assert winners(tmp_path, processes=4, rounds=50, threads=4) == list(range(50))


def test_of_many_that_take_over_a_dead_writer_together_one_holds_the_folder(tmp_path):
    program = "import os, sys; from grit_jax.runs.lock import WriterLock"
    program += "; [WriterLock(f'{sys.argv[1]}/{number}') for number in range(20)]; os._exit(1)"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    assert winners(tmp_path, processes=4, rounds=20, threads=4) == list(range(20))


def test_of_many_that_start_together_one_holds_a_bucket():
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        where = f"gs://{BUCKET}/race"
        assert winners(where, processes=2, rounds=5, threads=3, environment=environment) == list(range(5))


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_a_claim_that_nobody_stands_behind_is_in_the_way_for_a_moment_only(tmp_path, content):
    if content is None:  # a process that is gone
        with writer_lock(tmp_path):
            rewrite(tmp_path, process_started=1)
            content = (tmp_path / lock.NAME).read_bytes()
            (tmp_path / lock.NAME).unlink()
    (tmp_path / lock.CLAIM).write_bytes(content)
    WriterLock(tmp_path, limit=0.3).release()
    assert os.listdir(tmp_path) == []


WRITER = """
import sys, time
from grit_jax.errors import InputError
from grit_jax.runs import lock
held = lock.WriterLock(sys.argv[1], beat=0.1, limit=0.6)
print("held", flush=True)
sys.stdin.readline()  # it is stopped here, and taken over
try:
    getattr(held, sys.argv[2])()
except InputError as error:
    print("was taken over" in str(error))
else:
    print("writes")
held.release()
"""


def after_a_pause(folder, call, take_over, environment=None):
    """What a writer says that was stopped until another had taken its folder over."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), call],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    try:
        take_over()
        process.stdin.write("\n")
        process.stdin.flush()
    finally:
        os.kill(process.pid, signal.SIGCONT)
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize("call", ["check", "confirm"])
@pytest.mark.parametrize("ended", [False, True])
def test_a_writer_that_was_stopped_and_taken_over_writes_nothing_more(tmp_path, call, ended):
    def take_over():
        time.sleep(0.7)
        other = WriterLock(tmp_path, limit=0.6)
        (other.release if ended else others.append)(*[] if ended else [other])

    others = []
    assert after_a_pause(tmp_path, call, take_over) == "True\n"
    assert [read_writer(tmp_path).token] == [other._writer.token for other in others] if others else True
    assert ended == (read_writer(tmp_path) is None)
    for other in others:
        other.confirm()
        other.release()


OTHER = """
import sys, time
from grit_jax.runs import lock
time.sleep(0.7)
lock.WriterLock(sys.argv[1], limit=0.6)
"""


def test_a_writer_of_a_bucket_that_was_stopped_and_taken_over_writes_nothing_more():
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        folder = f"gs://{BUCKET}/run"
        other = [sys.executable, "-c", OTHER, folder]
        said = after_a_pause(
            folder, "confirm", lambda: subprocess.run(other, env=environment, cwd=ROOT, check=True), environment
        )
    assert said == "True\n"


def test_a_lock_that_somebody_removed_is_lost(tmp_path):
    held = WriterLock(tmp_path)
    (tmp_path / lock.NAME).unlink()
    with pytest.raises(InputError, match="was taken over by another process, which has ended since"):
        held.confirm()
    held.release()
    assert read_writer(tmp_path) is None
