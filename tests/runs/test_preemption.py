"""Notices of a metadata server, which is one of this machine here."""

import contextlib
import http.server
import threading
import time
import urllib.parse

import pytest

from grit_jax.runs import preemption
from grit_jax.runs.preemption import preemption_notices
from tests.commands import grit_jax, losses, start, train_arguments, write_data


class Metadata(http.server.ThreadingHTTPServer):
    """Answers as Google's does: with a tag, and when it is asked to, once another value is there."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed, self.asked, self.flavor = threading.Condition(), [], "Google"

    def put(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def waited_for(self, number):
        """Waits until so many questions were asked."""
        deadline = time.monotonic() + 20
        while len(self.asked) < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        address = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        folder, _, key = address.path.rpartition("/")
        server = self.server
        assert folder == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google"
        with server.changed:
            server.asked.append(key)
            if query.get("wait_for_change") == "true":
                server.changed.wait_for(lambda: f"tag-{server.values[key]}" != query["last_etag"], 30)
            value = server.values[key].encode()
        with contextlib.suppress(OSError):
            self.send_response(200)
            for name, content in {
                "Metadata-Flavor": server.flavor, "ETag": f"tag-{value.decode()}", "Content-Length": len(value),
            }.items():  # fmt: skip
                self.send_header(name, str(content))
            self.end_headers()
            self.wfile.write(value)

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = Metadata()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield server
    for key in server.values:
        server.put(key, "GONE")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_stops_and_other_changes_do_not(metadata, key, value):
    stop = threading.Event()
    with preemption_notices(stop):
        metadata.waited_for(4)
        metadata.put("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        metadata.waited_for(5)
        assert not stop.wait(0.2)
        metadata.put(key, value)
        assert stop.wait(10)


def test_maintenance_that_was_announced_before_is_left_alone_and_preemption_is_not(metadata):
    metadata.put("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    stop = threading.Event()
    with preemption_notices(stop):
        metadata.waited_for(4)
        assert not stop.wait(0.2)
    metadata.put("preempted", "TRUE")
    with preemption_notices(stop):
        assert stop.wait(10)


def test_a_server_that_fails_is_asked_again_and_another_one_is_not_believed(metadata, monkeypatch):
    monkeypatch.setattr(preemption, "_LONGEST_WAIT", 0.01)
    metadata.flavor = "none"
    metadata.put("preempted", "TRUE")
    stop = threading.Event()
    with preemption_notices(stop):
        metadata.waited_for(2)
        assert not stop.is_set()
        metadata.flavor = "Google"
        assert stop.wait(10)


def test_on_other_machines_nothing_happens(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "nowhere.invalid")
    stop = threading.Event()
    with preemption_notices(stop):
        assert not stop.wait(0.2)


@pytest.mark.long
def test_a_preempted_run_saves_and_exits_75_and_the_same_command_goes_on(metadata, tmp_path):
    data = write_data(tmp_path / "data")
    arguments = train_arguments(data, tmp_path / "run", "--train.steps=200", "--checkpoint.every=1000")
    with start(*arguments) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                metadata.put("preempted", "TRUE")
            if "Google Cloud announces" in line:
                assert "preempted=TRUE" in line
        assert process.wait() == 75
    done = losses(tmp_path / "run")[-1][0]
    assert 1 <= done < 200
    metadata.put("preempted", "FALSE")
    again = grit_jax(*train_arguments(data, tmp_path / "run", f"--train.steps={done + 1}"))
    assert again.returncode == 0 and f"resumed from step {done}" in again.stdout, again.stderr
