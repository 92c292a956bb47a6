"""A server of a tiny random model and three documents, in a thread."""

import contextlib
import json
import threading
import time

import httpx2
import pytest
import uvicorn

from grit_jax.retrieval.rag import Rag
from grit_jax.retrieval.store import Store
from grit_jax.serve.app import Server
from grit_jax.serve.guards import StrictProtocol
from grit_jax.serve.service import Limits
from tests.models import make
from tests.retrieval import stores

NAME = "tiny"
PROMPTS = {"question": "Find what answers"}
DOCUMENTS = [
    {"_id": "sea", "title": "The sea", "text": "Salt water, wide and deep. " * 12},
    {"_id": "hut", "title": "", "text": "A small house of wood."},
    {"_id": "cabin", "title": "", "text": "A small house of wood."},
    {"_id": "sun", "title": "The sun", "text": "Light, every day."},
]


@contextlib.contextmanager
def running(server, *, protocol=StrictProtocol, drain=10):
    """Runs a server until the block ends; gives its address once it is ready."""
    config = uvicorn.Config(server.app, port=0, http=protocol, log_config=None, timeout_graceful_shutdown=drain)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        while not runner.started:
            assert thread.is_alive()
            time.sleep(0.01)
        address = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
        while httpx2.get(f"{address}/ready").status_code == 503:
            assert httpx2.get(f"{address}/health").status_code == 200
            time.sleep(0.1)
        yield address
    finally:
        runner.should_exit = True
        thread.join()


def metric(server, name):
    lines = httpx2.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"grit_jax_{name}"))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="session")
def model():
    """A model whose greedy answers never end by themselves."""
    model = make(max_length=1024)
    table = model.params["embedding"]
    model.params["embedding"] = table.at[model.tokenizer.eos_id].set(0)
    return model


@pytest.fixture(scope="session")
def rag(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    stores.index(folder / "store", model, corpus, caches="float32")
    return Rag(model, Store(folder / "store"))


@pytest.fixture(scope="session")
def server(model, rag):
    limits = Limits(max_length=1024, rows=4, queue=64, body_bytes=200_000)
    with running(Server(model, name=NAME, limits=limits, instructions=PROMPTS, rag=rag)) as address:
        yield address
