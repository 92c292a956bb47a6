"""`grit-jax serve` as a process."""

import json
import signal
import socket
import subprocess
import time

import httpx2
import pytest

from grit_jax.checkpoint import CheckpointMetadata, save_params
from tests.hf.test_folder import random_model
from tests.runs import command, environment, grit_jax


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose greedy answers never end by themselves."""
    pretrained, params = random_model(tie_embeddings=False)
    params["head"] = params["head"].at[pretrained.tokenizer.eos_id].set(0)
    folder = tmp_path_factory.mktemp("served") / "mine"
    about = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(folder, params, about)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_stopped_server_finishes_what_it_has_begun(model):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    serve = command("serve", model, "--port", port, "--max-length", 64, "--rows", 1)
    with subprocess.Popen(serve, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert f"mine at {address} once it is ready" in process.stdout.readline()
        ready = None
        while ready != 200:
            time.sleep(0.2)
            assert process.poll() is None
            try:
                ready = httpx2.get(f"{address}/ready").status_code
            except httpx2.ConnectError:
                continue
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


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-length", "100000"], "--max-length=100000 is over the model's"),
        (["--rows", "0"], "--rows=0 must be positive"),
        (["--prompts", "nowhere.json"], "--prompts nowhere.json: cannot be read"),
        (["--index", "nowhere"], "nowhere"),
        (["--mesh.tensors=2"], "mesh.tensors"),
        (["--verbose"], "--verbose"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_served(model, more, told):
    ended = grit_jax("serve", str(model), *more)
    assert ended.returncode == 2
    assert told in ended.stderr
