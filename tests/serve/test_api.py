"""OpenAI's own client against the server: every answer is the library's."""

import asyncio
import base64
import concurrent.futures
import gc
import json

import httpx2
import numpy as np
import openai
import pytest

from grit_jax.retrieval.rag import Rag
from grit_jax.retrieval.store import Store
from grit_jax.serve.app import Server
from grit_jax.serve.service import Limits
from tests.models import make
from tests.retrieval import stores
from tests.serve.conftest import DOCUMENTS, NAME, PROMPTS, metric, running, until

QUESTION = [{"role": "user", "content": "What is the sea?"}]
TURNS = [*QUESTION, {"role": "assistant", "content": "Water."}, {"role": "user", "content": "More?"}]

LONG = {"model": NAME, "messages": QUESTION, "max_tokens": 900, "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_are_the_librarys(client, model, form):
    texts = ["one", "a longer text " * 20, "three"]
    response = client.embeddings.create(model=NAME, input=texts, encoding_format=form)
    vectors = [one.embedding for one in response.data]
    if form == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    encoded = model.encode_with_counts(texts)
    assert np.allclose(vectors, encoded.vectors, atol=1e-5)
    assert [one.index for one in response.data] == [0, 1, 2]
    assert response.usage.prompt_tokens == response.usage.total_tokens == encoded.num_tokens


def test_an_instruction_is_given_or_named(client, model):
    expected = model.encode(["x"], instruction=PROMPTS["question"])[0]
    for more in ({"instruction": PROMPTS["question"]}, {"prompt_name": "question"}):
        response = client.embeddings.create(model=NAME, input="x", extra_body=more)
        assert np.allclose(response.data[0].embedding, expected, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="'other' is not known; there are: question"):
        client.embeddings.create(model=NAME, input="x", extra_body={"prompt_name": "other"})


def test_dimensions_are_those_of_the_model(client):
    assert len(client.embeddings.create(model=NAME, input="x", dimensions=32).data[0].embedding) == 32
    with pytest.raises(openai.BadRequestError, match="vectors of this model have 32"):
        client.embeddings.create(model=NAME, input="x", dimensions=16)


def test_texts_that_are_too_long_are_refused_or_cut(client, model):
    long = "word " * 300
    with pytest.raises(openai.BadRequestError, match=r"text 1 has \d+ tokens; the limit is 1024"):
        client.embeddings.create(model=NAME, input=["short", long])
    response = client.embeddings.create(model=NAME, input=long, extra_body={"truncate": True})
    assert np.allclose(response.data[0].embedding, model.encode([long])[0], atol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.8, "seed": 7}])
def test_answers_are_the_librarys_whole_and_streamed(client, model, options):
    expected = model.generate(TURNS, max_new_tokens=40, **options)
    whole = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=40, **options)
    assert whole.choices[0].message.content == expected
    events = list(
        client.chat.completions.create(
            model=NAME, messages=TURNS, max_completion_tokens=40, stream=True,
            stream_options={"include_usage": True}, **options,
        )
    )  # fmt: skip
    pieces = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert events[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == len(model.prompt_tokens([TURNS])[0])
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason


def test_an_answer_goes_on_as_a_conversation(client, model):
    stop = model.generate(QUESTION, max_new_tokens=12, temperature=0)[6:9]  # the client takes a whole answer alone
    options = {"max_tokens": 12, "temperature": 0, "stop": stop}
    with client.chat.completions.stream(model=NAME, messages=QUESTION, **options) as stream:
        (choice,) = stream.get_final_completion().choices
    whole = client.chat.completions.create(model=NAME, messages=QUESTION, **options).choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", whole.message.content)
    more = {"role": "user", "content": "More?"}
    turns = [*QUESTION, {"role": "assistant", "content": whole.message.content}, more]
    for message in (choice.message, whole.message, whole.message.model_dump()):
        answer = client.chat.completions.create(model=NAME, messages=[*QUESTION, message, more], **options)
        expected = model.generate(turns, max_new_tokens=12, temperature=0, stop=[stop])
        assert answer.choices[0].message.content == expected


def test_texts_are_continued_as_they_are(client, model):
    texts = ["Once", "The sea"]
    response = client.completions.create(model=NAME, prompt=texts, max_tokens=20, temperature=0)
    assert [choice.text for choice in response.choices] == model.generate(
        texts, raw=True, max_new_tokens=20, temperature=0
    )
    assert response.usage.completion_tokens <= 40
    options = {"model": NAME, "prompt": texts, "max_tokens": 20, "temperature": 0}
    pieces = [event.choices[0] for event in client.completions.create(**options, stream=True)]
    for choice in response.choices:
        assert "".join(piece.text for piece in pieces if piece.index == choice.index) == choice.text


def test_each_of_several_answers_has_its_own_seed(client, model):
    response = client.chat.completions.create(model=NAME, messages=QUESTION, n=3, seed=5, max_tokens=16, temperature=1)
    expected = [model.generate(QUESTION, max_new_tokens=16, temperature=1.0, seed=5 + number) for number in range(3)]
    assert [choice.message.content for choice in response.choices] == expected
    again = [
        client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=16, temperature=1) for _ in range(2)
    ]
    assert again[0].choices[0].message.content != again[1].choices[0].message.content


def test_an_answer_ends_before_a_stop_string(client, model):
    whole = model.generate(QUESTION, max_new_tokens=60, temperature=1.0, seed=5)
    stop = whole[20:22]
    response = client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=60, temperature=1, seed=5, stop=stop
    )
    assert response.choices[0].message.content == whole[: whole.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens < 60


def test_log_p_is_the_librarys(client, model):
    response = client.completions.create(model=NAME, prompt="Once", max_tokens=12, temperature=0, logprobs=3)
    told = response.choices[0].logprobs
    chat = client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(told.tokens) == response.usage.completion_tokens
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob for one in content)
    assert all(bytes(one.bytes).decode() == one.token for one in content if not one.token.startswith("bytes:"))
    events = client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    assert [one for event in events for one in event.choices[0].logprobs.content] == content
    first = model.logits(["Once"])[0][-1]
    log_p = first - np.log(np.sum(np.exp(first - first.max()))) - first.max()
    assert np.isclose(told.token_logprobs[0], log_p.max(), atol=1e-4)


def test_documents_are_put_in_order_and_found(server, model, rag):
    texts = [document["text"] for document in DOCUMENTS]
    body = {"model": NAME, "query": "wood", "documents": texts, "top_n": 2, "instruction": "Find"}
    reranked = httpx2.post(f"{server}/v1/rerank", json=body).json()
    scores = model.encode(texts) @ model.encode(["wood"], instruction="Find")[0]
    order = np.argsort(-scores, kind="stable")[:2].tolist()
    assert [one["index"] for one in reranked["results"]] == order
    assert np.allclose([one["relevance_score"] for one in reranked["results"]], scores[order], atol=1e-5)
    assert reranked["results"][0]["document"] == {"text": texts[order[0]]}
    found = httpx2.post(f"{server}/v1/search", json={"query": "wood", "k": 2}).json()["data"]
    hits = rag.retriever.find(["wood"], k=2)[0]
    assert [(one["id"], one["same_text"]) for one in found] == [(hit.document.id, hit.duplicates) for hit in hits]


METHODS = ["none", "query_first", "document_first", "document_cache", "query_cache", "document_query_cache"]


def test_an_answer_from_documents_is_the_librarys(server, client, rag):
    (told,) = client.models.list()
    assert told.index["documents"] == 3 and told.index["methods"] == METHODS
    compiled = metric(server, "compilations_total")
    for method, positions in [*((method, "own") for method in METHODS), ("document_query_cache", "corrected")]:
        how = {"method": method, "positions": positions, "instruction": "Find"}
        response = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "what is salt?"}], max_tokens=12, temperature=0,
            extra_body={"retrieval": how},
        )  # fmt: skip
        assert metric(server, "compilations_total") == compiled
        answered = rag.answer(rag.prepare("what is salt?", **how), max_new_tokens=12)
        compiled = metric(server, "compilations_total")  # the library's own
        assert response.choices[0].message.content == answered.text
        assert [one["id"] for one in response.documents] == [hit.document.id for hit in answered.hits]
        usage = response.usage
        assert usage.prompt_tokens_details.cached_tokens == answered.num_cached
        assert usage.prompt_tokens == answered.num_cached + answered.num_read
    events = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "salt"}], max_tokens=12, stream=True,
        extra_body={"retrieval": {"method": "document_cache"}},
    )  # fmt: skip
    assert next(iter(events)).documents[0]["rank"] == 1


def test_what_retrieval_cannot_do_is_told(client):
    for messages, method, message in [
        (TURNS, "document_cache", "send one user message"),
        (QUESTION, "query_document_cache", "made with --cache-form first"),
        (QUESTION, "magic", "retrieval.method"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model=NAME, messages=messages, extra_body={"retrieval": {"method": method}})


def test_the_model_is_told_and_no_other_is_there(client):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_length == 1024
    for name in ("other", "../../etc/passwd", "a/../tiny", "tiny\x00"):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.embeddings.create(model=name, input="x")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("a/b")


def test_clients_at_the_same_time_get_the_librarys_answers_and_nothing_is_compiled(server, model):
    options = {"temperature": 1.0, "top_p": 0.9}
    asks = [(f"question {number} " * (1 + number % 7), number, 5 + 3 * (number % 6)) for number in range(24)]
    compiled = metric(server, "compilations_total")

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            answers = [
                client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": text}], seed=seed, max_tokens=most, **options
                )
                for text, seed, most in asks
            ]
            vectors = [client.embeddings.create(model=NAME, input=[text, "and"]) for text, *_ in asks]
            return await asyncio.gather(*answers, *vectors)

    found = asyncio.run(all_of_them())
    assert metric(server, "compilations_total") == compiled
    for (text, seed, most), answer, embedded in zip(asks, found[: len(asks)], found[len(asks) :], strict=True):
        assert answer.choices[0].message.content == model.generate(text, seed=seed, max_new_tokens=most, **options)
        assert np.allclose([one.embedding for one in embedded.data], model.encode([text, "and"]), atol=5e-5)


def test_a_client_that_leaves_frees_its_row(server):
    with httpx2.stream("POST", f"{server}/v1/chat/completions", json=LONG | {"n": 16, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert metric(server, "answers_active") > 0
    until(lambda: metric(server, "answers_active") == 0)
    assert metric(server, 'requests_total{endpoint="/v1/chat/completions",status="499"}') >= 1


def test_a_full_queue_and_a_short_time_are_told(model):
    limits = Limits(max_length=1024, rows=4, queue=1)
    with running(Server(model, name=NAME, limits=limits)) as address:
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            refused = httpx2.post(f"{address}/v1/chat/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "retry-after" in refused.headers
    limits = Limits(max_length=1024, rows=4, seconds=0.1)
    with running(Server(model, name=NAME, limits=limits)) as address:
        late = httpx2.post(f"{address}/v1/chat/completions", json=LONG | {"n": 16})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        events = httpx2.post(f"{address}/v1/chat/completions", json=LONG | {"n": 16, "stream": True}).text.split("\n\n")
        assert '"code": "timeout"' in events[-2]
        until(lambda: metric(address, "answers_active") == 0)


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.long), 2])
def test_several_devices_answer_as_one_does(model, tensor):
    several = make(devices=4, tensor=tensor, max_length=1024)
    several.params["embedding"] = several.params["embedding"].at[model.tokenizer.eos_id].set(0)
    with running(Server(several, name=NAME, limits=Limits(max_length=128, rows=4))) as address:
        compiled = metric(address, "compilations_total")
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            embedded = client.embeddings.create(model=NAME, input=["x", "and"])
            written = client.chat.completions.create(model=NAME, messages=QUESTION, n=5, seed=3, max_tokens=10)
            assert metric(address, "compilations_total") == compiled
            assert np.allclose([one.embedding for one in embedded.data], model.encode(["x", "and"]), atol=1e-5)
            expected = [
                model.generate(QUESTION, max_new_tokens=10, temperature=1.0, seed=3 + number) for number in range(5)
            ]
            assert [choice.message.content for choice in written.choices] == expected


@pytest.mark.parametrize("method", ["document_cache", "query_document_cache"])
def test_documents_of_either_form_are_answered_from_and_read_causally_in_between(model, tmp_path, method):
    form = "second" if method == "query_document_cache" else "first"
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    stores.index(tmp_path / "store", model, tmp_path / "corpus.jsonl", caches="float32", cache_form=form)
    causal_bytes = (1 << 20) if form == "first" else 0
    asked, read = (Rag(model, Store(tmp_path / "store"), causal_bytes=causal_bytes) for _ in range(2))

    def ask(client):
        return client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "what is salt?"}], max_tokens=12, temperature=0,
            extra_body={"retrieval": {"method": method, "instruction": "Find"}},
        ).choices[0].message.content  # fmt: skip

    def expected():
        return read.answer(read.prepare("what is salt?", method=method, instruction="Find"), max_new_tokens=12).text

    with (
        running(Server(model, name=NAME, limits=Limits(max_length=1024, rows=4), rag=asked)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        compiled = metric(address, "compilations_total")
        first = ask(client)
        until(lambda: not asked.num_waiting)
        again = ask(client)
        assert metric(address, "compilations_total") == compiled
    assert first == expected()
    while read.read_causally():
        pass
    assert again == expected()
    assert (again != first) == bool(causal_bytes)


def test_what_has_no_time_to_finish_is_told(model):
    server = Server(model, name=NAME, limits=Limits(max_length=1024, rows=4))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with running(server, drain=0.2) as address:
            cut = pool.submit(httpx2.post, f"{address}/v1/chat/completions", json=LONG | {"n": 16})
            until(lambda: metric(address, "answers_active") > 0)
        assert (cut.result().status_code, cut.result().json()["error"]["code"]) == (503, "stopped")


def test_a_key_is_asked_for(model):
    limits = Limits(max_length=1024, rows=4)
    with running(Server(model, name=NAME, limits=limits, api_key="secret")) as address:
        for key in ("wrong", "secrét"):
            header = {"authorization": f"Bearer {key}".encode()}
            assert httpx2.get(f"{address}/v1/models", headers=header).status_code == 401
            refused = httpx2.post(f"{address}/v1/embeddings", headers=header, json={"model": NAME, "input": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["connection"] == "close"  # nobody reads the rest of the body
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert client.embeddings.create(model=NAME, input="x").data
            assert httpx2.get(f"{address}/").status_code == 200


def test_both_skills_use_one_copy_of_the_weights(model):
    import jax

    def bytes_in_use():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = bytes_in_use()
    server = Server(model, name=NAME, limits=Limits(max_length=1024, rows=4))
    logits = 258 * 4 * (4 + 2)
    with running(server) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert client.embeddings.create(model=NAME, input="x").data
        assert client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=20).choices
        assert bytes_in_use() - before == server.cache_bytes + logits
    assert server.weights_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
