"""Answers from a store, with and without cached keys and values."""

import json

import numpy as np
import pytest

from grit_jax import GritModel
from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig
from grit_jax.errors import InputError
from grit_jax.inference.engine import Continuation
from grit_jax.retrieval.rag import Rag
from grit_jax.retrieval.store import Store
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer
from tests.models import bytes_with_ending, make
from tests.retrieval.stores import index, save_model, write_corpus

QUERY, NUM_NEW = "Title 3 one", 12
CACHED = [method for method in prompts.RAG_METHODS if prompts.cached_parts(method)]


class Made:
    """A model, and a store of each form that its documents' keys and values are kept in."""

    def __init__(self, folder, attention):
        self.model = make(max_length=1024, embedding=EmbeddingConfig(attention=attention))
        corpus = write_corpus(folder / "corpus.jsonl")
        self.stores = {}
        for form in prompts.CACHE_FORMS:
            options = {"caches": "float32", "cache_form": form, "max_length": 60, "instruction": "keep"}
            index(folder / form, self.model, corpus, **options)
            self.stores[form] = Store(folder / form)
        index(folder / "none", self.model, corpus)
        self.stores["none"] = Store(folder / "none")

    def rag(self, method, **options):
        return Rag(self.model, self.stores[prompts.document_form(method)], **options)

    def written(self, *texts):
        """Greedy tokens after keys and values and what is read, as text."""
        return ["".join(pieces) for pieces in zip(*self.model.write(texts), strict=True)]


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("bidirectional"), "bidirectional")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("causal"), "causal")


def uncached(made, method, hit):
    """All that a method with one cached text reads, as tokens."""
    texts = {"query": (QUERY, "find", None), "document": (hit.document.embedded, "keep", 60)}
    (part,) = prompts.cached_parts(method)
    text, instruction, length = texts[part]
    (prompt,) = made.model.embedding_prompts([text], instruction=instruction)
    return prompt.tokens[:length]


@pytest.mark.parametrize("method", prompts.RAG_METHODS)
def test_every_method_answers_from_the_best_documents(bidirectional, method):
    rag = bidirectional.rag(method)
    options = {"method": method, "instruction": "find", "k": 2}
    prepared = [rag.prepare(QUERY, positions=positions, **options) for positions in prompts.POSITIONS]
    answers = [rag.answer(one, max_new_tokens=8) for one in prepared]
    found = rag.retriever.find([QUERY], instruction="find", k=2)[0] if method != "none" else []
    for answered in answers:
        assert [hit.row for hit in answered.hits] == [hit.row for hit in found]
        assert (answered.num_cached > 0) == bool(prompts.cached_parts(method))
    assert answers[0][2:] == answers[1][2:]


@pytest.mark.parametrize("method", CACHED)
def test_what_is_cached_and_what_is_read_is_the_text_of_the_method(bidirectional, method):
    rag = bidirectional.rag(method)
    prepared = rag.prepare(QUERY, method=method, instruction="find", k=2)
    texts = [hit.document.embedded for hit in prepared.hits]
    form = prompts.document_form(method)
    (query,) = bidirectional.model.encode_with_caches([QUERY], instruction="find")
    documents = bidirectional.model.encode_with_caches(texts, instruction="keep", max_length=60, form=form)
    parts = {"query": [query], "document": documents}
    expected = [cached.cache for part in prompts.cached_parts(method) for cached in parts[part]]
    lengths = [cache.keys.shape[1] for cache in expected]
    pieces = np.split(prepared.prefix.keys, np.cumsum(lengths)[:-1], axis=1)
    for piece, cache in zip(pieces, expected, strict=True):
        assert np.abs(piece - cache.keys).max() <= 1e-4 * np.abs(cache.keys).max()
    bos = bidirectional.model.tokenizer.bos
    whole = [prompts.embedding(text, "keep", bos=bos).text for text in texts]
    head = len(prompts.embedding("", "keep", bos=bos).text)
    # A byte is a token here, and BOS, of three characters, another.
    passage = "\n\n".join(text[head : 60 + len(bos) - 1] for text in whole)
    assert prepared.text == prompts.rag(method, QUERY, passage, bos=bos)


@pytest.mark.parametrize("tokenizer", [Tokenizer.load("bytes"), bytes_with_ending()])
def test_plain_methods_read_of_documents_what_the_store_did(tokenizer, tmp_path):
    model, corpus = make(max_length=1024, tokenizer=tokenizer), write_corpus(tmp_path / "corpus.jsonl")
    index(tmp_path / "store", model, corpus, caches="float32", max_length=60, instruction="keep")
    store = Store(tmp_path / "store")
    prepared = Rag(model, store).prepare(QUERY, method="document_first", k=len(store))
    passages = prepared.text.partition("<|user|>\n")[2].partition(f"\n\n{QUERY}\n\n")[0].split("\n\n")
    head = len(prompts.embedding("", "keep", bos="").text)
    for hit, passage in zip(prepared.hits, passages, strict=True):
        assert hit.document.embedded.startswith(passage)
        # A byte is a token here, BOS another, and the tokenizer's ending, which no document has in a prompt, too.
        assert 1 + head + len(passage) + tokenizer.num_ending == store.cache(hit.row).keys.shape[1]
    assert any(hit.document.embedded != passage for hit, passage in zip(prepared.hits, passages, strict=True))


@pytest.mark.parametrize("method", ["document_cache", "query_cache"])
def test_with_causal_keys_cached_answers_are_the_uncached_ones_token_for_token(causal, method):
    prepared = causal.rag(method).prepare(QUERY, method=method, instruction="find")
    before = uncached(causal, method, prepared.hits[0])
    assert len(before) == prepared.prefix.keys.shape[1]
    cached, read = causal.written(
        Continuation(prepared.tokens, NUM_NEW, prefix=prepared.prefix),
        Continuation(np.concatenate([before, prepared.tokens]), NUM_NEW),
    )
    assert cached == read and cached


def test_a_document_that_has_been_read_causally_answers_as_without_a_cache(bidirectional):
    rag = bidirectional.rag("document_cache", causal_bytes=10**6)
    options = {"method": "document_cache", "instruction": "find"}
    first = rag.prepare(QUERY, **options)
    before = uncached(bidirectional, "document_cache", first.hits[0])
    read = Continuation(np.concatenate([before, first.tokens]), NUM_NEW)
    assert rag.num_waiting == 1 and rag.read_causally() and not rag.read_causally()
    second = rag.prepare(QUERY, **options)
    assert rag.num_waiting == 0
    assert np.array_equal(first.tokens, second.tokens)
    texts = [Continuation(one.tokens, NUM_NEW, prefix=one.prefix) for one in (first, second)]
    bidirectionally, causally, uncached_answer = bidirectional.written(*texts, read)
    assert causally == uncached_answer != bidirectionally


def test_the_memory_of_causal_keys_forgets_what_was_not_used_for_longest(bidirectional):
    store = bidirectional.stores["first"]
    queries = [store.document(row).embedded for row in (0, 4, 8)]
    sizes = [2 * store.cache(row).keys.nbytes for row in (0, 4, 8)]
    rag = bidirectional.rag("document_cache", causal_bytes=sum(sizes) - 1)

    def waits(query):
        rag.prepare(query, method="document_cache")
        return rag.num_waiting == 1

    for query in queries[:2]:
        assert waits(query) and rag.read_causally()
    assert not waits(queries[0])
    assert waits(queries[2]) and rag.read_causally()  # the second is forgotten
    assert not waits(queries[0]) and not waits(queries[2]) and waits(queries[1])
    small = bidirectional.rag("document_cache", causal_bytes=min(sizes) - 1)
    small.prepare(queries[0], method="document_cache")
    assert small.num_waiting == 0  # it would not fit
    second = bidirectional.rag("query_document_cache", causal_bytes=10**9)
    second.prepare(queries[0], method="query_document_cache")
    assert second.num_waiting == 0  # what comes second is not read alone


def test_a_store_that_does_not_fit_is_refused(bidirectional):
    first, second, none = (Rag(bidirectional.model, bidirectional.stores[name]) for name in ("first", "second", "none"))
    assert none.methods == ["none", "query_first", "document_first", "query_cache"]
    assert set(prompts.RAG_METHODS) - set(first.methods) == {"query_document_cache"}
    message = "and query_document_cache needs those of --cache-form second; index the corpus into another folder with"
    with pytest.raises(InputError, match=message):
        first.prepare(QUERY, method="query_document_cache")
    with pytest.raises(
        InputError, match="made with --cache-form second, and document_query_cache needs those of --cache-form fi"
    ):
        second.prepare(QUERY, method="document_query_cache")
    with pytest.raises(
        InputError, match="none: has no keys and values, and document_cache needs those of --cache-form first"
    ):
        none.prepare(QUERY, method="document_cache")
    assert none.prepare(QUERY, method="query_cache").prefix
    with pytest.raises(InputError, match=r"made by tiny .*, and other has other weights"):
        Rag(make(seed=1), bidirectional.stores["first"], name="other")
    with pytest.raises(InputError, match=r"k=2: the documents have \d+ tokens; the limit is 20: use fewer"):
        first.prepare(QUERY, method="document_cache", k=2, max_length=20)
    with pytest.raises(InputError, match="are over the limit of 1024; shorten the prompt or ask for fewer"):
        first.answer(first.prepare(QUERY, method="document_cache"), max_new_tokens=1000)
    with pytest.raises(InputError, match="text 0 is empty"):
        first.prepare("", method="query_cache")


def test_the_command_answers_and_names_its_documents(tmp_path, capsys):
    folder, store = save_model(tmp_path / "model"), str(tmp_path / "store")
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    assert main(["index", str(folder), str(corpus), store, "--caches", "int8"]) == 0
    capsys.readouterr()
    arguments = ["answer", str(folder), store, "--query", QUERY, "--k", "2", "--max-new-tokens", "4"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rag = Rag(GritModel.load(folder), Store(store))
    expected = rag.answer(rag.prepare(QUERY, method="document_cache", k=2), max_new_tokens=4)
    assert found["answer"] == expected.text.strip()
    shown = [(one["rank"], one["_id"], one["same_text"]) for one in found["documents"]]
    assert shown == [(rank, hit.document.id, hit.duplicates) for rank, hit in enumerate(expected.hits, start=1)]
    assert (found["cached_tokens"], found["read_tokens"]) == (expected.num_cached, expected.num_read)
    assert main([*arguments, "--query", "blue", "--method", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == QUERY and "  0 tokens cached, " in lines[-1] and "blue" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", " "], "query ' ' is empty; leave it out"),
        (["--query", "x", "--k", "0"], "--k=0 must be positive"),
        (["--query", "x", "--max-new-tokens", "0"], "--max-new-tokens=0 must be positive"),
        (["--query", "x"], "s: no manifest.json, so it is not a store"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["answer", "m", "s", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
