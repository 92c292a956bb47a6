"""Logs on a disk and in a bucket."""

import json
import subprocess
import sys

import pytest

from grit_jax.runs.logs import LineWriter, read_lines
from tests.bucket import BUCKET, emulator
from tests.commands import ROOT


def write(path, lines, **options):
    writer = LineWriter(path, **options)
    for line in lines:
        writer.write(line)
    writer.close()


def test_lines_are_on_the_disk_before_the_writer_is_closed(tmp_path):
    writer = LineWriter(tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()
    writer.write({"step": 1})
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1}]
    writer.close()


def test_a_line_cut_short_by_a_crash_is_dropped_and_the_next_writer_appends(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    write(path, [{"step": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_numbers_that_json_does_not_have_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [{"step": 1, "loss": float("nan"), "norm": float("inf"), "rate": 0.5}])
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}
    assert read_lines(path) == [{"step": 1, "rate": 0.5}]


def test_a_log_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "nothing" / "log.jsonl") == []


PROGRAM = """
import sys, time
from etils import epath
from grit_jax import files
from grit_jax.runs import logs
from grit_jax.runs.logs import LineWriter, read_lines
logs.PART_LINES, logs.PART_SECONDS = 2, 0.05
log = sys.argv[1] + "/run/log.jsonl"
names = lambda: files.names(sys.argv[1] + "/run")
writer = LineWriter(log)
for step in (1, 2, 3):
    writer.write({"step": step})
deadline = time.monotonic() + 30
while len(read_lines(log)) < 3 and time.monotonic() < deadline:
    time.sleep(0.05)
assert [line["step"] for line in read_lines(log)] == [1, 2, 3], "seen before the writer is closed"
for step in (4, 5):
    writer.write({"step": step})
writer.close()
assert names() == ["log-000000.jsonl", "log-000001.jsonl", "log-000002.jsonl"], names()
again = LineWriter(log, keep=lambda line: line["step"] <= 3)
assert names() == ["log-000000.jsonl", "log-000001.jsonl"], names()
again.write({"step": 40})
again.close()
assert [line["step"] for line in read_lines(log)] == [1, 2, 3, 40]
# A folder that was copied from a disk has the plain file too; it comes first.
epath.Path(log).write_text('{"step": 0}\\n')
assert [line["step"] for line in read_lines(log)] == [0, 1, 2, 3, 40]
print("as on a disk")
"""


def test_in_a_bucket_a_log_is_parts_that_are_read_cut_and_gone_on_with(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        command = [sys.executable, "-c", PROGRAM, f"gs://{BUCKET}"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "as on a disk", done.stderr
