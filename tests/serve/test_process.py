"""`grit-jax serve` as a process."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import time
from urllib.parse import urlsplit

import httpx2
import pytest

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.cli import serve
from grit_jax.config import COPIES, MeshConfig
from tests.commands import command, environment, grit_jax
from tests.hf.test_model_folder import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose greedy answers never end by themselves."""
    pretrained, params = random_model(tie_embeddings=False)
    params["head"] = params["head"].at[pretrained.tokenizer.eos_id].set(0)
    folder = tmp_path_factory.mktemp("served") / "mine"
    about = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(folder, params, about)
    return folder


@contextlib.contextmanager
def serving(*arguments, devices=1, **variables):
    """The command with a free port, as a process that ends with the block."""
    with subprocess.Popen(
        command("serve", *arguments, "--port", 0), env=environment(devices) | variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def told_first(process):
    """Name and address, which the command prints first."""
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line.split()[0], line.split()[2]


def until_it_answers(process, url):
    status = None
    while status != 200:
        time.sleep(0.1)
        assert process.poll() is None
        try:
            status = httpx2.get(url).status_code
        except httpx2.ConnectError:
            continue


def test_a_stopped_server_finishes_what_it_has_begun(model):
    with serving(model, "--max-length", 64, "--rows", 1) as process:
        name, address = told_first(process)
        assert name == "mine"
        until_it_answers(process, f"{address}/ready")
        body = {"model": "mine", "prompt": "a", "max_tokens": 60, "temperature": 0, "n": 16, "stream": True}
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in [first, *lines] if line]
        assert events[-1] == "[DONE]"
        finished = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        assert [choice["finish_reason"] for choice in finished].count("length") == 16
        assert process.wait(60) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")


def test_a_server_writes_its_own_lines_only(model):
    with serving(model, "--max-length", 64, "--rows", 1) as process:
        _, address = told_first(process)
        until_it_answers(process, f"{address}/ready")
        url = urlsplit(address)
        for sent in (
            b"no http\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ):
            with socket.create_connection((url.hostname, url.port), timeout=30) as client:
                client.sendall(sent)
                assert client.recv(1000).startswith(b"HTTP/1.1 ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
        assert re.fullmatch(r"ready: \d+ programs in \S+ s\n", process.stderr.read())


def test_a_server_takes_its_key_store_and_prompts_and_spreads_the_model(model, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "a house"}\n{"_id": "b", "text": "the sea"}\n')
    (tmp_path / "prompts.json").write_text('{"find": "Find it"}')
    indexed = grit_jax("index", model, tmp_path / "corpus.jsonl", tmp_path / "store", "--caches", "float32")
    assert indexed.returncode == 0, indexed.stderr
    with serving(
        model, "--max-length", 256, "--rows", 2, "--name", "it", "--index", tmp_path / "store", "--prompts",
        tmp_path / "prompts.json", "--causal-mb", 1, "--allow-host", "grit.example", "--mesh.tensor=2",
        devices=4, GRIT_JAX_API_KEY="secret",
    ) as process:  # fmt: skip
        name, address = told_first(process)
        assert name == "it" and address.startswith("http://127.0.0.1:")
        until_it_answers(process, f"{address}/ready")

        def post(path, key="secret", **body):
            headers = {"authorization": f"Bearer {key}"}
            return httpx2.post(f"{address}/v1/{path}", json={"model": "it", **body}, headers=headers, timeout=60)

        assert post("search", "wrong", query="sea").status_code == 401
        for host, status in (("grit.example", 200), ("evil.example", 400)):
            assert httpx2.get(f"{address}/health", headers={"host": host}).status_code == status
        plain, named, told = (post("embeddings", input="x", **how).json()["data"] for how in (
            {}, {"prompt_name": "find"}, {"instruction": "Find it"}
        ))  # fmt: skip
        assert named == told != plain
        assert {one["id"] for one in post("search", query="sea").json()["data"]} == {"a", "b"}
        asked = {"messages": [{"role": "user", "content": "sea"}], "retrieval": {"method": "document_cache"}}
        response = post("chat/completions", **asked, max_tokens=4)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_devices_that_are_left_get_copies_of_the_model():
    assert serve._mesh(["--mesh.tensor=2"]) == MeshConfig(data=-1, fsdp=1, tensor=2)
    assert serve._mesh([]) == COPIES


def test_a_port_in_use_is_told_before_the_model_is_loaded(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = grit_jax("serve", str(model), "--port", str(port))
    assert ended.returncode == 2
    assert f"--port {port}: [Errno 98]" in ended.stderr


@pytest.mark.parametrize(("key", "told"), [("", "is empty; give it a key"), ("two words", "no spaces")])
def test_a_key_that_no_client_could_send_is_refused_at_the_start(model, key, told):
    with serving(model, GRIT_JAX_API_KEY=key) as process:
        assert process.wait(60) == 2
        assert f"GRIT_JAX_API_KEY{'' if not key else ':'}" in (text := process.stderr.read()) and told in text


def test_a_server_can_be_stopped_while_it_compiles(model):
    with serving(model) as process:
        _, address = told_first(process)
        until_it_answers(process, f"{address}/health")
        assert httpx2.get(f"{address}/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""  # nothing of what other libraries log as they load a checkpoint


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-length", "100000"], "--max-length=100000 is over the model's"),
        (["--rows", "0"], "--rows=0 must be positive"),
        (["--prompts", "nowhere.json"], "--prompts nowhere.json: cannot be read"),
        (["--index", "nowhere"], "nowhere"),
        (["--mesh.tensors=2"], "mesh.tensors"),
        (["--verbose"], "--verbose"),
        (["--port", "99999"], "--port 99999"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
        (["--allow-host", "http://grit.example"], "--allow-host http://grit.example"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_served(model, more, told):
    ended = grit_jax("serve", str(model), *more)
    assert ended.returncode == 2
    assert told in ended.stderr
