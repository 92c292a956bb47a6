"""What fails for one request fails that request, and the others go on."""

import contextlib
import json
import logging

import httpx2
import numpy as np
import pytest

from grit_jax.retrieval.rag import Rag
from grit_jax.retrieval.store import Store
from grit_jax.serve.app import Server
from grit_jax.serve.service import Limits
from tests.models import make
from tests.retrieval import stores
from tests.serve.conftest import DOCUMENTS, NAME, running, until

LIMITS = Limits(max_length=1024, rows=4)
EMBED = {"model": NAME, "input": "x"}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXTS, CACHES = "documents-00000.jsonl", "caches-00000.safetensors"


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    stores.index(folder / "store", model, folder / "corpus.jsonl", caches="float32")
    return folder / "store"


@pytest.fixture(scope="module")
def address(model, folder):
    with running(Server(model, name=NAME, limits=LIMITS, rag=Rag(model, Store(folder)))) as address:
        yield address


@pytest.fixture(scope="module")
def sick():
    """A model whose numbers are not finite where a text has the byte `%`."""
    sick = make(max_length=1024, tie_embeddings=False)
    (token,) = sick.tokenizer.encode("%").ids.tolist()
    sick.params["embedding"] = sick.params["embedding"].at[token].set(np.nan)
    sick.params["head"] = sick.params["head"].at[token].set(0)  # it never writes one
    return sick


@pytest.fixture(scope="module")
def sick_address(sick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sick")
    (folder / "corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "the sea"}\n')
    stores.index(folder / "store", sick, folder / "corpus.jsonl", caches="float32")
    with running(Server(sick, name=NAME, limits=LIMITS, rag=Rag(sick, Store(folder / "store")))) as address:
        yield address


def post(address, path, body):
    response = httpx2.post(f"{address}/v1/{path}", json=body, timeout=60)
    return response.status_code, response.json().get("error", {}).get("code")


def goes_on(address):
    assert httpx2.get(f"{address}/health").status_code == 200
    assert post(address, "embeddings", EMBED) == (200, None)
    for more in ({}, {"retrieval": {"method": "none"}}):
        assert post(address, "chat/completions", CHAT | more) == (200, None)


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def spoil(path):
    """Other bytes of the same number."""
    path.write_bytes(b"\xff" * path.stat().st_size)


def lose_key(path):
    path.write_bytes(path.read_bytes().replace(b'"text": "', b'"tixt": "'))


def change_type(path):
    path.write_bytes(path.read_bytes().replace(b'"title": "",', b'"title": 77,'))


def remove(path):
    path.unlink()


@contextlib.contextmanager
def harmed(path, harm):
    content = path.read_bytes()
    harm(path)
    yield
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, spoil, lose_key, change_type, remove])
def test_a_document_that_cannot_be_read_fails_the_requests_that_need_it(address, folder, harm, caplog):
    with harmed(folder / TEXTS, harm):
        for _ in range(2):
            assert post(address, "search", {"query": "sea", "k": 3}) == (500, "index_damaged")
            for stream in (False, True):
                body = CHAT | {"retrieval": {"method": "document_first", "k": 3}, "stream": stream}
                assert "index_damaged" in httpx2.post(f"{address}/v1/chat/completions", json=body).text
        goes_on(address)
    assert post(address, "search", {"query": "sea"}) == (200, None)
    assert TEXTS in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("harm", [cut, spoil, remove])
def test_keys_and_values_that_cannot_be_read_fail_the_requests_that_need_them(address, folder, harm, caplog):
    with harmed(folder / CACHES, harm):
        for _ in range(2):
            assert post(address, "chat/completions", CHAT | {"retrieval": {}}) == (500, "index_damaged")
        assert post(address, "search", {"query": "sea"}) == (200, None)
        goes_on(address)
    assert post(address, "chat/completions", CHAT | {"retrieval": {}}) == (200, None)
    assert CACHES in caplog.text and "Traceback" not in caplog.text


def test_keys_and_values_of_another_shape_fail_the_request(address, folder, tmp_path):
    other = make(max_length=1024, num_layers=3)
    stores.index(tmp_path / "other", other, folder.parent / "corpus.jsonl", caches="float32")
    with harmed(folder / CACHES, lambda path: path.write_bytes((tmp_path / "other" / CACHES).read_bytes())):
        assert post(address, "chat/completions", CHAT | {"retrieval": {}}) == (500, "index_damaged")
        goes_on(address)


def test_a_document_that_cannot_be_read_causally_is_left_alone(model, folder, caplog):
    rag = Rag(model, Store(folder), causal_bytes=1 << 20)
    with running(Server(model, name=NAME, limits=LIMITS, rag=rag)) as address, caplog.at_level(logging.ERROR):
        with harmed(folder / TEXTS, spoil):
            rag._causal.waiting[0] = None
            goes_on(address)
            until(lambda: not rag.num_waiting)
        assert post(address, "chat/completions", CHAT | {"retrieval": {}}) == (200, None)
    assert "the work of an idle server failed" in caplog.text


@pytest.mark.parametrize("form", ["float", "base64"])
def test_a_vector_that_is_not_finite_is_an_error_of_its_request(sick_address, form):
    for text in ("%", ["x", "50 %"]):
        body = EMBED | {"input": text, "encoding_format": form}
        assert post(sick_address, "embeddings", body) == (500, "not_finite")
    assert post(sick_address, "embeddings", EMBED | {"encoding_format": form}) == (200, None)


def test_what_is_ranked_or_found_by_a_vector_that_is_not_finite_is_an_error_of_its_request(sick_address):
    rerank = {"model": NAME, "query": "x", "documents": ["y", "%"]}
    assert post(sick_address, "rerank", rerank) == (500, "not_finite")
    assert post(sick_address, "rerank", rerank | {"documents": ["y"]}) == (200, None)
    assert post(sick_address, "search", {"query": "%"}) == (500, "not_finite")
    assert post(sick_address, "search", {"query": "x"}) == (200, None)
    for method in ("document_cache", "query_cache"):
        body = CHAT | {"messages": [{"role": "user", "content": "%"}], "retrieval": {"method": method}}
        assert post(sick_address, "chat/completions", body) == (500, "not_finite")
    goes_on(sick_address)


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}])
def test_an_answer_whose_logits_are_not_finite_is_an_error_of_its_request(sick_address, more):
    body = {"model": NAME, "prompt": "50 %", "max_tokens": 4, **more}
    for _ in range(5):  # there are four rows
        assert post(sick_address, "completions", body) == (500, "not_finite")
    streamed = httpx2.post(f"{sick_address}/v1/completions", json=body | {"stream": True}).text
    assert "not_finite" in streamed and "NaN" not in streamed
    for _ in range(5):
        assert post(sick_address, "completions", body | {"prompt": "x"}) == (200, None)
