"""Requests at random: the server answers or refuses each, and goes on.

The oracle for each request: a status of the documented ones, of the 5xx only `overloaded`, `stopped` and `timeout`; a
refusal has OpenAI's form; what is no error is JSON without NaN, or events that end with [DONE]. For all of them: no
traceback in the log, a good request in between gets the library's numbers, no program is compiled, and the process does
not grow by more than 300 MB.
"""

import contextlib
import json
import random
import resource
import socket
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest

from tests.serve.conftest import DOCUMENTS, NAME, metric
from tests.serve.test_clients import CLIENTS, NEUTRAL, REFUSED, recorded

STATUSES = {200, 400, 401, 404, 405, 408, 413, 415, 429, 503}
UNAVAILABLE = {"overloaded", "stopped", "timeout", "queue_full"}
ROUNDS, SHORT_ROUNDS = 10_000, 150
MOST_GROWTH = 300_000  # kilobytes

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SEEDS = [
    ("embeddings", {"model": NAME, "input": ["a text", "another"], "instruction": "Find", "truncate": True}),
    ("embeddings", {"model": NAME, "input": [[1, 2, 3], [4]], "encoding_format": "base64"}),
    ("chat/completions", CHAT),
    ("chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3}),
    ("chat/completions", CHAT | {"retrieval": {"method": "document_cache", "k": 2, "instruction": "Find"}}),
    ("chat/completions", CHAT | {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}),
    ("completions", {"model": NAME, "prompt": ["Once", "The sea"], "max_tokens": 4, "stop": ["a", "b"], "logprobs": 1}),
    ("completions", {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 3}),
    ("rerank", {"model": NAME, "query": "x", "documents": ["a", {"text": "b"}], "top_n": 1}),
    ("search", {"query": "sea", "k": 3, "instruction": "Find"}),
]
ODD = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, "", " ", "x", "\x00", "\ud7ff",
    "😀" * 50, "<|user|>\n", "</s>", "word " * 400, "a" * 100_000, [], {}, [[]], [{}], [None], [1, "x"], [[1], "x"],
    {"type": "text"}, [{"type": "text", "text": "t"}], {"a": {"b": {"c": []}}}, ["x"] * 3000, [0] * 3000, [257], [258],
    [[0]] * 2049, ["\n"] * 64, {"k": 2}, *(value for values in NEUTRAL.values() for value in values),
]  # fmt: skip
NAMES = sorted({*NEUTRAL, *REFUSED, *(name for _, body in SEEDS for name in body), "x", "", "role", "content", "type"})
RAW = [
    b'{"model": NaN}', b"Infinity", b'"', b"{", b"[" * 1000, b'{"a":' * 500, b"\xff", b"\x00", b"nul", b"1e9999",
    b'{"input": "\\ud800"}', b"9" * 500, b'{"model": "tiny", "input": "x", "input": "y"}', b"\xef\xbb\xbf{}", b" " * 9,
]  # fmt: skip
HEADERS = [
    ("host", "evil.example"), ("host", ""), ("content-type", "text/plain"), ("content-type", ""),
    ("content-encoding", "br"), ("authorization", "Bearer x"), ("authorization", "\x7f"), ("accept", "text/html"),
    ("x-forwarded-for", "10.0.0.9, x"), ("x" * 300, "y"), ("cookie", "z" * 70_000), (":path", "/"),
    ("connection", "close"), ("content-length", "0"), ("content-length", "5"), ("content-length", "99999999"),
    ("content-length", "-1"), ("transfer-encoding", "chunked"), ("transfer-encoding", "gzip"),
    ("expect", "100-continue"), ("upgrade", "websocket"), ("connection", "upgrade"),
]  # fmt: skip
PATHS = ["/", "/health", "/v1", "/v1/", "/v1/models/x", "/page/app.js", "/v1/search/", "//v1/search", "/%00", "/%2e."]


class Mutations:
    """Requests that are near to good ones.

    Args:
      seed: Of the draws.
    """

    def __init__(self, seed):
        self._draw = random.Random(seed)
        kept = [(one["path"].removeprefix("/v1/"), json.loads(one["body"])) for client in CLIENTS
                for one in recorded(client) if one["body"]]  # fmt: skip
        self._seeds = [*SEEDS, *kept]

    def request(self):
        """Lines of a head, and a body."""
        draw = self._draw
        path, body = draw.choice(self._seeds)
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            body = self._changed(body)
        content = draw.choice(RAW) if draw.random() < 0.05 else json.dumps(body).encode(errors="replace")
        content = self._spoilt(content) if draw.random() < 0.15 else content
        method, target = "POST", f"/v1/{path}"
        if draw.random() < 0.05:
            method, target = draw.choice(["GET", "PUT", "HEAD", "OPTIONS", "BREW"]), draw.choice([target, *PATHS])
        headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
        headers["connection"] = "close"
        more = [draw.choice(HEADERS)] if draw.random() < 0.15 else []
        if draw.random() < 0.5:  # in the place of another, not beside it
            headers |= dict(more)
            more = []
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in [*headers.items(), *more])]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1", "replace"), content

    def _changed(self, value):
        """The same with something else in one place."""
        draw = self._draw
        if isinstance(value, dict) and value and draw.random() < 0.9:
            name = draw.choice(list(value))
            how = draw.random()
            if how < 0.2:
                return value | {draw.choice(NAMES): draw.choice(ODD)}
            if how < 0.35:
                return {key: one for key, one in value.items() if key != name}
            return value | {name: self._changed(value[name])}
        if isinstance(value, list) and value and draw.random() < 0.7:
            place = draw.randrange(len(value))
            how = draw.random()
            if how < 0.3:
                return value * draw.choice([2, 3, 40])
            return [*value[:place], *([] if how < 0.5 else [self._changed(value[place])]), *value[place + 1 :]]
        return draw.choice(ODD)

    def _spoilt(self, content):
        draw, place = self._draw, self._draw.randrange(len(content) + 1)
        junk = bytes(draw.choice(b'{}[]",:\\x00\xff0e-') for _ in range(draw.randrange(4)))
        return content[:place] + junk + content[place + draw.randrange(3) :]


def sent(address, head, body):
    """What comes back from a request until the connection ends."""
    place, found = urlsplit(address), b""
    names = [line.split(b":")[0] for line in head.split(b"\r\n")]
    ends = b"connection: close\r\n" in head and f"content-length: {len(body)}\r\n".encode() in head
    ends &= names.count(b"content-length") == names.count(b"connection") == 1 and b"transfer-encoding" not in names
    connection = socket.create_connection((place.hostname, place.port), timeout=60)
    with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(head + body)
        if not ends:  # the server would wait for more of it, or for another request
            with contextlib.suppress(OSError):  # the server may have ended the connection
                connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def check(head, body, found):
    """Compares a response with the oracle, and returns its status; None where there is none."""
    told, _, content = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    if not told:
        return None
    status, about = int(told.split()[1]), (head[:300], body[:300], found[:600])
    assert status in STATUSES, about
    assert b"NaN" not in content and b"Traceback" not in content, about
    if b"application/json" in told and content:
        response, _ = json.JSONDecoder().raw_decode(content.decode())
        if status != 200:
            assert set(response["error"]) == {"message", "type", "param", "code"}, about
            assert status != 503 or response["error"]["code"] in UNAVAILABLE, about
            assert len(response["error"]["message"]) <= 1001, about
    if b"text/event-stream" in told:
        assert content.rstrip().endswith((b"data: [DONE]\n\n\r\n0", b"[DONE]")) or b'"error"' in content, about
    return status


def fuzz(address, model, rounds, caplog, *, seed=0):
    mutations, expected = Mutations(seed), model.encode(["x"])[0]
    compiled = metric(address, "compilations_total")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answered = 0
    for number in range(rounds):
        head, body = mutations.request()
        answered += check(head, body, sent(address, head, body)) == 200
        if number % 50 == 0:
            good = httpx2.post(f"{address}/v1/embeddings", json={"model": NAME, "input": "x"}, timeout=60).json()
            assert np.allclose(good["data"][0]["embedding"], expected, atol=1e-5)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert metric(address, "compilations_total") == compiled
    assert metric(address, "answers_active") == metric(address, "answers_waiting") == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
    assert rounds / 20 < answered < rounds * 0.9  # it asks for what is right, and for what is wrong


def test_requests_at_random_are_answered_or_refused(server, model, caplog):
    assert len(DOCUMENTS) == 4  # methods that go on from keys and values are among them
    fuzz(server, model, SHORT_ROUNDS, caplog, seed=1)


@pytest.mark.long
def test_ten_thousand_requests_at_random_are_answered_or_refused(server, model, caplog):
    fuzz(server, model, ROUNDS, caplog)
