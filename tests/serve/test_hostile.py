"""Input that is wrong, on purpose or not: each gets its status, and the server goes on."""

import contextlib
import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest

from grit_jax.serve import bodies
from grit_jax.serve.app import Server
from grit_jax.serve.guards import StrictProtocol
from grit_jax.serve.service import Limits
from tests.serve.conftest import NAME, metric, running, until

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
EMBED = {"model": NAME, "input": "x"}
JSON = {"content-type": "application/json"}


def message(role="user", content="hi"):
    return CHAT | {"messages": [{"role": role, "content": content}]}


@pytest.fixture(autouse=True)
def goes_on(server, model):
    yield
    answer = httpx2.post(f"{server}/v1/embeddings", json=EMBED).json()
    assert np.allclose(answer["data"][0]["embedding"], model.encode(["x"])[0], atol=1e-5)
    assert httpx2.get(f"{server}/health").status_code == 200


def refusal(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("embeddings", b"{", 400, "Invalid JSON"),
        ("embeddings", b"", 400, "Invalid JSON"),
        ("embeddings", b"\xff\xfe", 400, "Invalid JSON"),
        ("embeddings", b'{"model": "tiny", "input": "\xff"}', 400, "Invalid JSON"),
        ("embeddings", b'{"model": "tiny", "input": "\\ud800"}', 400, "Invalid JSON"),
        ("embeddings", b"[" * 100_000, 400, "over 32 lists and objects within each other"),
        ("embeddings", [], 400, "body"),
        ("embeddings", {"input": "x"}, 400, "model: Field required"),
        ("embeddings", EMBED | {"input": []}, 400, "at least 1 item"),
        ("embeddings", EMBED | {"input": 5}, 400, "must be a text, a list of texts, token ids"),
        ("embeddings", EMBED | {"input": [1, 999]}, 400, "the token 999; this model has 258"),
        ("embeddings", EMBED | {"input": [[1], [2, 2**70]]}, 400, "input 1 has the token"),
        ("embeddings", EMBED | {"input": [[1], []]}, 400, "at least 1 item"),
        ("embeddings", EMBED | {"input": [1, -1]}, 400, "greater than or equal to 0"),
        ("embeddings", EMBED | {"input": [1, "x"]}, 400, "valid integer"),
        ("embeddings", EMBED | {"input": [257]}, 400, "text 0 is empty"),
        ("embeddings", EMBED | {"input": ["x", None]}, 400, "input"),
        ("embeddings", EMBED | {"input": ""}, 400, "text 0 is empty"),
        ("embeddings", EMBED | {"input": ["x"] * 2049}, 400, "at most 2048 items"),
        ("embeddings", EMBED | {"more": 1}, 400, "more: is not known here; leave it out"),
        ("embeddings", EMBED | {"input": "a " * 80_000}, 400, "160000 characters; the limit is 1024 tokens"),
        ("embeddings", EMBED | {"input": "a " * 1_000_000}, 413, "over 200000 bytes"),
        ("embeddings", EMBED | {"instruction": "x" * 2000}, 400, "leaves no room for the text"),
        ("embeddings", EMBED | {"instruction": "x" * 50_000}, 400, "the instruction has 50000 characters"),
        ("embeddings", EMBED | {"input": ["x"] * 2000, "instruction": "x" * 200}, 400, "send fewer"),
        ("embeddings", EMBED | {"input": ["x" * 60] * 2048, "instruction": "x" * 95}, 400, "over 300000 tokens"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("chat/completions", message("system"), 400, "no user message follows"),
        ("chat/completions", message("tool"), 400, "messages.0.role: must be one of system, developer, user"),
        ("chat/completions", message("assistant"), 400, "must be user and assistant in turn"),
        ("chat/completions", message(content=None), 400, "messages.0.content"),
        ("chat/completions", message(content=[]), 400, "messages.0.content"),
        ("chat/completions", message(content="word " * 250), 400, "the limit is 1024 tokens"),
        ("chat/completions", message(content="a " * 80_000), 400, "characters; the limit is 1024 tokens"),
        ("chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", CHAT | {"max_tokens": 2**70}, 400, "the limit is 1024 tokens"),
        ("chat/completions", CHAT | {"max_tokens": "5"}, 400, "max_tokens"),
        ("chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
        ("chat/completions", b'{"model": "tiny", "messages": [], "temperature": NaN}', 400, "temperature"),
        ("chat/completions", CHAT | {"n": 1000}, 400, "n: "),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "send logprobs: true"),
        ("chat/completions", CHAT | {"stop": ["a"] * 5}, 400, "stop"),
        ("chat/completions", CHAT | {"frequency_penalty": 1.5}, 400, "frequency_penalty"),
        ("chat/completions", CHAT | {"retrieval": {"method": "x", "k": 0}}, 400, "retrieval.k"),
        ("chat/completions", CHAT | {"retrieval": {"instruction": "x" * 50_000}}, 400, "the instruction has 50000"),
        ("chat/completions", message(content="word " * 250) | {"retrieval": {}}, 400, "the limit is 1024 tokens"),
        ("completions", {"model": NAME, "prompt": "x", "echo": True}, 400, "echo"),
        ("completions", {"model": NAME, "prompt": ["x"] * 33, "n": 2, "max_tokens": 1}, 400, "the limit is 64"),
        ("rerank", {"model": NAME, "query": "", "documents": ["x"]}, 400, "is empty"),
        ("search", {"query": "x", "k": 10**9}, 400, "k: "),
        ("nothing", {}, 404, "POST /v1/nothing"),
        ("search/", {"query": "x"}, 404, "POST /v1/search/"),
    ],
)
def test_a_bad_request_gets_its_status(server, path, body, status, told):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = refusal(httpx2.post(f"{server}/v1/{path}", content=content, headers=JSON))
    assert found[0] == status
    assert told in found[1]


def test_seeds_of_any_size_and_harmless_fields_are_taken(server):
    nothing = {"temperature": None, "n": None, "stream": None, "retrieval": None, "tools": None}
    for more in ({"seed": -1}, {"seed": 2**60}, {"frequency_penalty": 0.0}, {"stop": []}, {"user": "me"}, nothing):
        assert httpx2.post(f"{server}/v1/chat/completions", json=CHAT | more).status_code == 200


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/app.py", "/../../etc/passwd", "/v2"])
def test_only_the_pages_files_are_given(server, path):
    with connected(server) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in received(connection).split(b"\r\n")[0]


def test_other_methods_are_refused(server):
    assert httpx2.get(f"{server}/v1/embeddings").status_code == 405
    assert httpx2.post(f"{server}/health").status_code == 405


def test_what_is_no_http_is_refused(server):
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01\x00 no http at all\r\n\r\n")
        assert b" 400 " in received(connection).split(b"\r\n")[0]


def test_a_body_larger_than_it_says_or_without_a_size_is_refused(server):
    pieces = (b"x" * 50_000 for _ in range(10))
    assert httpx2.post(f"{server}/v1/embeddings", content=pieces, headers=JSON).status_code == 413
    with connected(server) as connection:
        connection.sendall(head_of("embeddings", 99999999))
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize("more", [{}, {"retrieval": {"k": 2}}], ids=["plain", "with documents"])
def test_clients_that_vanish_leave_nothing_behind(server, more):
    body = json.dumps(CHAT | {"max_tokens": 400, "stream": True} | more).encode()
    head = head_of("chat/completions", len(body))
    for sent in (head[:20], head, head + body[:10], head + body):
        for waits in range(5):  # for one more answer than there are rows
            with connected(server) as connection:
                connection.sendall(sent)
                if sent == head + body:
                    time.sleep(0.1 * waits)
    assert httpx2.post(f"{server}/v1/chat/completions", json=CHAT | more).status_code == 200


def test_slow_clients_are_let_go(model, monkeypatch):
    monkeypatch.setattr(bodies, "_SECONDS", 1e6)  # beyond the request's own time

    class Impatient(StrictProtocol):
        head_seconds = 0.5

    body = json.dumps(EMBED).encode()
    head = head_of("embeddings", len(body))
    limits = Limits(max_length=1024, rows=4, seconds=1.0)
    with running(Server(model, name=NAME, limits=limits), protocol=Impatient) as address:
        for before, slow, told in (
            (b"", head[:20], [b"408"]),
            (head + body, head[:20], [b"200", b"408"]),
            (head, body[:5], [b"408"]),
        ):
            with connected(address) as connection:
                connection.sendall(before)
                trickle(connection, slow)
                assert re.findall(rb"HTTP/1.1 (\d+)", received(connection)) == told
        with connected(address) as connection:
            for piece in (head, body):
                connection.sendall(piece)
                time.sleep(0.6)  # longer than a head may take, between a head and its body
            assert b" 200 " in connection.recv(1000).split(b"\r\n")[0]


def test_a_body_that_comes_slowly_makes_room_for_others(model):
    body = json.dumps(EMBED).encode().ljust(1000)
    head = head_of("embeddings", len(body))
    limits = Limits(max_length=1024, rows=4, body_bytes=1000, all_bodies=3)
    with running(Server(model, name=NAME, limits=limits)) as address, contextlib.ExitStack() as clients:
        slow = [clients.enter_context(connected(address)) for _ in range(3)]
        for connection in slow:
            connection.sendall(head + body[:900])
        for _ in range(4):
            assert httpx2.post(f"{address}/v1/embeddings", content=body, headers=JSON).status_code == 200
        assert b" 408 " in slow[0].recv(1000).split(b"\r\n")[0]
        slow[2].sendall(body[900:])
        assert b" 200 " in slow[2].recv(1000).split(b"\r\n")[0]


def test_a_client_that_does_not_read_its_answers_keeps_no_row(model):
    body = json.dumps(
        CHAT | {"max_tokens": 900, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
    ).encode()
    head = head_of("chat/completions", len(body))
    limits = Limits(max_length=1024, rows=4, seconds=5.0)
    with running(Server(model, name=NAME, limits=limits)) as address, connected(address) as connection:
        connection.sendall(head + body)
        assert httpx2.post(f"{address}/v1/embeddings", json=EMBED).status_code == 200
        until(lambda: metric(address, "answers_active") > 0)
        until(lambda: metric(address, "answers_active") == 0)
        assert httpx2.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200


def test_a_million_tokens_are_refused_at_the_usual_limits(model):
    with running(Server(model, name=NAME, limits=Limits(max_length=1024, rows=4))) as address:
        text = "a " * 1_000_000
        for path, body in (("embeddings", EMBED | {"input": text}), ("chat/completions", message(content=text))):
            found = refusal(httpx2.post(f"{address}/v1/{path}", json=body))
            assert found[0] == 400 and "characters; the limit is 1024 tokens" in found[1]


def head_of(path, length):
    lines = [
        f"POST /v1/{path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def trickle(connection, content):
    """Sends the bytes one by one, and none after the server has closed."""
    for number in range(len(content)):
        with contextlib.suppress(OSError):
            connection.sendall(content[number : number + 1])
        time.sleep(0.01)


def connected(server):
    address = urlsplit(server)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def received(connection):
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found
