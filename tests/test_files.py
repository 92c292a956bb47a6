"""Small files, and what is tried again."""

import contextlib
import errno
import http.server
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from grit_jax import files
from tests.bucket import BUCKET, Bucket, environment
from tests.commands import ROOT, command


def failing(*errors):
    """An action that raises these errors, one a call, and then gives `done`; and the errors that are left."""
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return "done"

    return action, left


def input_output():
    return OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.001)


@pytest.mark.parametrize(
    "error",
    [input_output(), OSError(errno.ESTALE, "stale"), TimeoutError("slow"), ConnectionResetError(errno.ECONNRESET, "r")],
)
def test_what_may_pass_is_tried_again_and_each_time_is_logged(error, caplog):
    action, _ = failing(error, error)
    assert files.retrying("some/file", action) == "done"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all(text in caplog.text for text in ("some/file", type(error).__name__))


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), ValueError()])
def test_what_does_not_pass_is_said_at_once(error, caplog):
    action, left = failing(error, error)
    with pytest.raises(type(error)):
        files.retrying("some/file", action)
    assert len(left) == 1 and not caplog.records


def test_after_the_last_try_the_error_names_the_path_and_what_happened():
    action, left = failing(*[input_output() for _ in range(20)])
    with pytest.raises(files.UnreachableError, match=r"some/file: cannot be reached, tried for 0 s \(OSError: .*Input"):
        files.retrying("some/file", action)
    assert len(left) == 15


def test_a_piece_that_failed_is_read_again_from_where_it_began(tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    with files.open_binary(tmp_path / "file") as file:
        inner = file.raw._file

        class Flaky:
            """Moves on and fails, every other time."""

            failed = False
            seek, close = inner.seek, inner.close

            def readinto(self, buffer):
                count = inner.readinto(memoryview(buffer)[:999])
                Flaky.failed = not Flaky.failed
                if Flaky.failed:
                    raise input_output()
                return count

        file.raw._file = Flaky()
        assert file.read() == content
        file.seek(500)
        assert file.read(10) == content[500:510]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "new" / "file", "old")
    with pytest.raises(ValueError), files.replacing(tmp_path / "new" / "file") as file:
        file.write(b"half")
        raise ValueError
    assert files.names(tmp_path / "new") == ["file"] and files.read_text(tmp_path / "new" / "file") == "old"


def test_another_content_is_another_version(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "one")
    before = files.version(path)
    assert files.version(path) == before
    files.write_text(path, "four")
    assert files.version(path) != before
    with pytest.raises(FileNotFoundError, match="nothing"):
        files.version(tmp_path / "nothing")


# The parent says with a line when the bucket is away.
OUTAGE = """
import sys
from grit_jax import files
from grit_jax.data.sources import open_source
from grit_jax.runs import logs
from grit_jax.runs.logs import LineWriter, read_lines
from grit_jax.runs.lock import WriterLock, read_writer
root = sys.argv[1]
files.write_text(root + "/data/a.jsonl", '{"text": "one"}\\n{"text": "two"}\\n')
logs.PART_SECONDS = 0.1
log = LineWriter(root + "/run/log.jsonl")
lock = WriterLock(root + "/run", beat=0.1)
log.write({"step": 1})
print("ready", flush=True)
sys.stdin.readline()
log.write({"step": 2})
files.write_text(root + "/run/config.yaml", "a: 1")
assert files.is_folder(root + "/data") and files.exists(root + "/data/a.jsonl") and not files.exists(root + "/none")
assert [record.turns for record in open_source(root + "/data/a.jsonl")] == ["one", "two"]
log.write({"step": 3})
log.close()
assert [line["step"] for line in read_lines(root + "/run/log.jsonl")] == [1, 2, 3]
lock.check()
lock.release()
assert read_writer(root + "/run") is None
print("went on")
"""


def test_a_run_goes_on_when_its_bucket_was_away_for_a_while(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    bucket = Bucket()
    bucket.start()
    process = subprocess.Popen(
        [sys.executable, "-c", OUTAGE, f"gs://{BUCKET}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=bucket.environment | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    bucket.stop()
    process.stdin.write("away\n")
    process.stdin.flush()
    time.sleep(3)
    assert process.poll() is None
    bucket.start()
    output, errors = process.communicate(timeout=120)
    bucket.stop()
    assert output == "went on\n", errors
    assert f"gs://{BUCKET}/run/config.yaml: ClientConnectorError" in errors


# The client's waits are a sixtieth of what they are.
UNREACHABLE = """
import asyncio, sys, time
from grit_jax import files
from grit_jax.config import load_config
from grit_jax.data.sources import find_files, open_source
from grit_jax.runs.logs import LineWriter
sleep = asyncio.sleep
asyncio.sleep = lambda seconds: sleep(seconds / 60)
root = sys.argv[1]
for path, action in {
    "config.yaml": load_config, "data": find_files, "a.jsonl": open_source, "text": files.read_text,
    "run": files.names, "written": lambda path: files.write_text(path, ""), "log.jsonl": LineWriter,
}.items():
    begun = time.monotonic()
    try:
        action(root + "/" + path)
    except files.UnreachableError as error:
        assert str(error).startswith(root), error
        assert "cannot be reached, tried for" in str(error), error
        assert time.monotonic() - begun < 20
        print(path)
"""


@contextlib.contextmanager
def answering(code):
    """A store that answers the same to everything; gives the environment."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(code)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield environment(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "store", [lambda: contextlib.nullcontext(environment("http://127.0.0.1:9")), lambda: answering(503)]
)
def test_a_bucket_that_stays_away_or_busy_ends_every_call_with_its_path(store, tmp_path):
    with store() as variables:
        done = subprocess.run(
            [sys.executable, "-c", UNREACHABLE, f"gs://{BUCKET}"],
            env=variables | {"XDG_CACHE_HOME": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    expected = ["config.yaml", "data", "a.jsonl", "text", "run", "written", "log.jsonl"]
    assert done.stdout.split() == expected, done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if line.startswith(f"gs://{BUCKET}/text: ")]
    assert len(warnings) == 6, done.stderr[-3000:]


@pytest.mark.parametrize("code", [401, 403])
def test_a_bucket_that_denies_access_is_one_line_with_the_remedy(code):
    with answering(code) as variables:
        done = subprocess.run(
            command("status", f"gs://{BUCKET}/run"),
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("WARNING:google.auth")]
    assert line.startswith(f"error: gs://{BUCKET}/run: access is denied")
    assert "gcloud auth application-default login" in line
