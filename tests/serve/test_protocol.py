"""Bodies that would cost more than others may wait: what they hold is counted before it is parsed."""

import json
import re
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_jax.serve import protocol
from grit_jax.serve.chat import ChatRequest
from grit_jax.serve.embeddings import EmbeddingRequest, RerankRequest
from grit_jax.serve.request_errors import RequestError

VALUES, KEYS, DEPTH, DIGITS = (
    "over 400000 values",
    "over 20000 keys",
    "over 32 lists and objects",
    "a number of over 64",
)


def chat(content):
    return b'{"model": "m", "messages": [{"role": "user", "content": ' + content + b"}]}"


def embedding(inputs):
    return b'{"model": "m", "input": ' + inputs + b"}"


def many(item, count):
    return b"[" + b",".join([item] * count) + b"]"


def fields(count):
    return b"{" + b",".join(b'"%d":1' % number for number in range(count)) + b"}"


HUGE = {
    "empty parts": (ChatRequest, chat(many(b"{}", 500_000)), VALUES),
    "fewer empty parts": (ChatRequest, chat(many(b"{}", 190_000)), "has 190000 parts"),
    "parts of a wrong type": (ChatRequest, chat(many(b'{"type":1}', 19_000)), "has 19000 parts"),
    "empty strings": (EmbeddingRequest, embedding(many(b'""', 1_000_000)), VALUES),
    "fewer empty strings": (EmbeddingRequest, embedding(many(b'""', 390_000)), "at most 2048 items"),
    "empty lists": (EmbeddingRequest, embedding(many(b"[]", 190_000)), "at least 1 item"),
    "nulls": (EmbeddingRequest, embedding(many(b"null", 390_000)), "must be a text"),
    "texts among tokens": (EmbeddingRequest, embedding(b"[1," + many(b'"x"', 300_000)[1:]), "valid integer"),
    "unknown fields": (EmbeddingRequest, b"{" + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}", KEYS),
    "fewer unknown fields": (
        EmbeddingRequest,
        b"{" + b",".join(b'"%d":1' % n for n in range(19_000)) + b"}",
        "and 18997",
    ),
    "messages": (
        ChatRequest,
        b'{"messages": ' + many(b'{"role":"user"}', 19_000) + b"}",
        "messages.0.content: is missing",
    ),
    "documents": (RerankRequest, b'{"documents": ' + many(b"7", 190_000) + b"}", "documents.0"),
    "lists in lists": (EmbeddingRequest, embedding(b"[" * 4_000_000), VALUES),
    "fewer lists in lists": (EmbeddingRequest, embedding(b"[" * 33 + b"]" * 33), DEPTH),
    "objects in objects": (EmbeddingRequest, embedding(b'{"":' * 15_000), DEPTH),
    "ends of lists": (EmbeddingRequest, embedding(b"]" * 8_000_000), "Invalid JSON"),
    "digits": (ChatRequest, b'{"seed": ' + b"7" * 8_000_000 + b"}", DIGITS),
    "exponents": (ChatRequest, b'{"temperature": 1e' + b"9" * 100 + b"}", DIGITS),
    "escaped quotes": (EmbeddingRequest, b'{"nothing": "' + b'\\"' * 4_000_000 + b'"}', "nothing: is not known here"),
    "a long name": (EmbeddingRequest, b'{"' + b"x" * 8_000_000 + b'": 1}', "is not known here"),
}


@pytest.mark.parametrize(("kind", "body", "told"), HUGE.values(), ids=HUGE)
def test_a_huge_body_is_refused_soon_and_in_little_memory(kind, body, told):
    started = time.thread_time()
    with pytest.raises(RequestError) as refused:
        protocol.parse(kind, body)
    assert time.thread_time() - started < 2
    assert refused.value.status == 400 and told in refused.value.message
    assert len(json.dumps(refused.value.content())) < 1500
    tracemalloc.start()
    with pytest.raises(RequestError):
        protocol.parse(kind, body)
    assert tracemalloc.get_traced_memory()[1] < 100e6 + 4 * len(body)
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (EmbeddingRequest, embedding(json.dumps([']}[{,:\\"' * 400] * 2048).encode())),
        (EmbeddingRequest, embedding(json.dumps(list(range(300_000))).encode())),
        (EmbeddingRequest, embedding(json.dumps([[7] * 146] * 2048).encode())),
        (RerankRequest, json.dumps({"model": "m", "query": "q", "documents": [{"text": "a:b"}] * 2048}).encode()),
        (ChatRequest, chat(json.dumps([{"type": "text", "text": "[[[["}] * 2048).encode())),
        (ChatRequest, chat(b'"' + b"\\\\" * 1_000_000 + b'"')),
    ],
    ids=["texts", "tokens", "lists of tokens", "documents", "parts", "escapes"],
)
def test_the_largest_requests_that_make_sense_are_taken(kind, body):
    assert protocol.parse(kind, body).model == "m"


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='a"\\[]{},:\n\ud7ff'),
    lambda children: st.lists(children) | st.dictionaries(st.text(alphabet='a"\\{:'), children),
    max_leaves=20,
)


def counted(tree):
    """Values, keys and depth of what is parsed."""
    if isinstance(tree, list | dict):
        some = [counted(one) for one in (tree.values() if isinstance(tree, dict) else tree)]
        values, keys, depth = (list(x) for x in zip(*some, strict=True)) if some else ([], [], [])
        num_keys = sum(keys) + (len(tree) if isinstance(tree, dict) else 0)
        return max(0, len(some) - 1) + 1 + sum(values), num_keys, 1 + max(depth, default=0)
    return 0, 0, 0


@given(trees)
def test_what_is_counted_in_the_bytes_is_what_is_in_the_json(tree):
    values, keys, depth = counted(tree)
    with pytest.MonkeyPatch.context() as patch:
        for name, exact in (("_MOST_VALUES", values), ("_MOST_KEYS", keys), ("_DEEPEST", depth)):
            patch.setattr(protocol, name, max(exact, 20) if name != "_DEEPEST" else exact)
        body = json.dumps(tree).encode()
        protocol._check_bounds(body)
        outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body)
        assert outside.count(b",") + outside.count(b"[") + outside.count(b"{") == values
        if depth:
            patch.setattr(protocol, "_DEEPEST", depth - 1)
            with pytest.raises(RequestError, match="within each other"):
                protocol._check_bounds(body)
