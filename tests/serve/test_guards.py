"""What a request must bring before anything of it is read: its name for the server, its key, its type, its length."""

import re

import httpx2
import pytest

from grit_jax.errors import InputError
from grit_jax.serve.app import Server
from grit_jax.serve.guards import check_api_key
from grit_jax.serve.service import Limits
from tests.serve.conftest import NAME, running
from tests.serve.test_hostile import EMBED, connected, received

BODY = b'{"model": "tiny", "input": "x"}'
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = f"{len(BODY):x}\r\n{BODY.decode()}\r\n0\r\n\r\n".encode()


@pytest.fixture(scope="module")
def guarded(model):
    limits = Limits(max_length=1024, rows=4)
    with running(Server(model, name=NAME, limits=limits, api_key="secret", hosts=["grit.example"])) as address:
        yield address


def statuses(server, *lines, body=BODY, host="localhost"):
    """The statuses of all responses to a request with these lines in its head; the connection must end then."""
    head = "".join(f"{line}\r\n" for line in ["POST /v1/embeddings HTTP/1.1", f"Host: {host}", *lines, ""])
    with connected(server) as connection:
        connection.sendall(head.encode("latin-1") + body)
        return statuses_in(received(connection))


def statuses_in(content):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3})", content)]


JSON = "Content-Type: application/json"
CLOSE = "Connection: close"


@pytest.mark.parametrize(
    "lines",
    [
        [LENGTH, "Transfer-Encoding: chunked"],
        ["transfer-encoding: chunked", "CONTENT-LENGTH: 5"],
        [LENGTH, LENGTH],
        [LENGTH, "content-length: 5"],
        [f"{LENGTH}, {len(BODY)}"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x1f"],
        ["Content-Length: 1_0"],
        ["Content-Length: ５"],
        ["Content-Length:"],
        ["Content-Length: " + "9" * 50],
        ["Content-Length : 5"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: identity"],
        ["X: 1", "Host: localhost"],
    ],
)
def test_a_request_whose_length_is_not_told_once_is_the_last_of_its_connection(server, lines):
    body = CHUNKS if any("chunked" in line for line in lines) else BODY
    again = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\n{LENGTH}\r\n\r\n".encode() + BODY
    encoded = [line.encode().decode("latin-1") for line in lines]
    assert statuses(server, JSON, *encoded, body=body + again) == [400]


def test_such_a_request_is_the_last_also_behind_another(server):
    good = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server) as connection:
        bad = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\n{LENGTH}\r\n{LENGTH}\r\n\r\n"
        connection.sendall(good.encode() + bad.encode() + BODY + good.encode())
        assert statuses_in(received(connection)) == [200, 400]


@pytest.mark.parametrize("lines", [[LENGTH], ["Transfer-Encoding: chunked"]])
def test_a_length_that_is_told_once_is_taken(server, lines):
    body = CHUNKS if "chunked" in lines[0] else BODY
    assert statuses(server, JSON, CLOSE, *lines, body=body) == [200]


def test_chunks_that_are_none_end_the_connection_without_an_error_in_the_log(server, caplog):
    assert statuses(server, JSON, "Transfer-Encoding: chunked", body=b"xyz\r\nnot a chunk") == [400]
    with connected(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 200 " in connection.recv(1000)
        connection.sendall(b"no chunk at all\r\n")
        assert b" 200 " not in received(connection)
    assert "Traceback" not in caplog.text and not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LocalHost:80", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("grit.example", True),
        ("Grit.Example:443", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("evil@localhost", False),
        ("localhost:80:80", False),
        ("[localhost]", False),
        ("", False),
    ],
)
def test_only_requests_to_the_servers_own_names_are_answered(guarded, host, known):
    told = ["Authorization: Bearer secret", JSON, LENGTH, CLOSE]
    assert statuses(guarded, *told, host=host) == [200 if known else 400]
    for path in ("/", "/health", "/v1/models"):
        response = httpx2.get(f"{guarded}{path}", headers={"host": host, "authorization": "Bearer secret"})
        assert response.status_code == (200 if known else 400)
        if not known:
            assert response.json()["error"]["code"] == "unknown_host" and "--allow-host" in response.text


def test_a_star_allows_any_name(model):
    with running(Server(model, name=NAME, limits=Limits(max_length=1024, rows=4), hosts=["*"])) as address:
        assert httpx2.get(f"{address}/health", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ('application/json;charset="utf-8"', True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("application/json; charset=latin-1", False),
        ("application/jsonx", False),
        ("text/plain; application/json", False),
        ("", False),
        (None, False),
    ],
)
def test_only_json_is_taken(server, kind, taken):
    headers = {} if kind is None else {"content-type": kind}
    response = httpx2.post(f"{server}/v1/embeddings", content=BODY, headers=headers)
    assert response.status_code == (200 if taken else 415)
    if not taken:
        assert (
            response.json()["error"]["code"] == "unsupported_media_type" and response.headers["connection"] == "close"
        )


def test_a_second_type_and_a_compressed_body_are_refused(server):
    assert statuses(server, JSON, "Content-Type: text/plain", LENGTH) == [415]
    assert statuses(server, JSON, "Content-Encoding: gzip", LENGTH) == [415]
    assert statuses(server, JSON, "Content-Encoding: identity", LENGTH, CLOSE) == [200]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("Bearer secret", True),
        ("bearer secret", True),
        ("BEARER  secret", True),
        ("Basic secret", False),
        ("Bearer Secret", False),
        ("Bearer", False),
        ("Bearersecret", False),
        ("secret", False),
        ("Bearer secrét", False),
        ("", False),
    ],
)
def test_the_key_is_exact_and_its_scheme_of_any_case(guarded, given, right):
    headers = {"authorization": given.encode()}
    assert httpx2.get(f"{guarded}/v1/models", headers=headers).status_code == (200 if right else 401)
    response = httpx2.post(f"{guarded}/v1/embeddings", headers=headers, json=EMBED)
    assert response.status_code == (200 if right else 401)


@pytest.mark.parametrize("key", ["", " ", "a key", "kéy", "key\n"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(InputError, match=r"^GRIT_JAX_API_KEY.*(is empty; give it a key|choose another)"):
        check_api_key(key, source="GRIT_JAX_API_KEY")
    check_api_key("sk-a_key.1", source="GRIT_JAX_API_KEY")
