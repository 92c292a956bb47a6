"""Answers from a store: what is found is read anew, or gone on from with the keys and values of the embedding pass.

What a cached text and the text after it read is `prompts.rag`. The embedding pass is bidirectional, so that answers
from its keys and values are not those of a causal pass over the same tokens; with a model whose embedding pass is
causal, or once a document has been read causally (`Rag.read_causally`), they are.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.config import Attention
from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.inference.engine import Continuation
from grit_jax.inference.kv_cache import concatenate
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import KVCache
from grit_jax.retrieval.layout import DamagedError, Document, Store
from grit_jax.retrieval.retriever import Hit, Retriever
from grit_jax.text import prompts
from grit_jax.text.prompts import Positions, RagMethod


class Prepared(NamedTuple):
    """What the model goes on from.

    Attributes:
      prefix: Keys and values, numpy [layers, tokens, kv_heads, head_dim]; None for nothing.
      text: What is read after them.
      tokens: int32 [tokens] of it.
      hits: The documents that are used, best first.
    """

    prefix: KVCache | None
    text: str
    tokens: np.ndarray
    hits: list[Hit]


class Answered(NamedTuple):
    """An answer.

    Attributes:
      text: The answer, after `The answer is`.
      hits: The documents that it was made from, best first.
      num_cached: Tokens whose keys and values were there.
      num_read: Tokens that were read.
    """

    text: str
    hits: list[Hit]
    num_cached: int
    num_read: int


class Rag:
    """Answers queries from a store with the model that made it.

    To be used by one thread at a time, but for reading the documents of hits.

    Args:
      model: The model.
      store: What answers are found in.
      name: What the model is called in messages.
      causal_bytes: Most bytes of the keys and values of documents that have been read causally; those that were used
        last are kept.

    Attributes:
      retriever: What finds documents.

    Raises:
      InputError: Another model made the store, or a file of it is missing or damaged.
    """

    def __init__(self, model: GritModel, store: Store, *, name: str = "this model", causal_bytes: int = 0):
        self.retriever = Retriever(model, store, name=name)
        self._model, self._store = model, store
        self._causal = _CausalMemory(causal_bytes)
        if store.settings.caches:
            store.check_caches()

    @property
    def methods(self) -> list[RagMethod]:
        """The methods for which the store has what they need."""
        return [method for method in prompts.RAG_METHODS if self._lack(method) is None]

    def warm_up(self, max_length: int, progress: Callable[[int], None] = lambda _: None) -> int:
        """Compiles what answers need beside writing, for queries of up to `max_length` tokens, and returns how much.

        `progress` is called after each program.
        """
        passes: list[tuple[Attention | None, int]] = [(None, max_length)]
        if self._causal.limit:
            passes.append(("causal", self._store.settings.max_length))
        config = self._model.architecture
        token = KVCache(*[np.zeros((config.num_layers, 1, config.num_kv_heads, config.head_dim), np.float32)] * 2)
        calls: list[Callable[[], object]] = [
            functools.partial(self._read_nothing, length, attention)
            for attention, longest in passes
            for length in self._model.runner.row_lengths(longest)
        ]
        calls.append(functools.partial(concatenate, [token, token], config, corrected=True))
        for call in calls:
            call()
            progress(1)
        return len(calls)

    def _read_nothing(self, length: int, attention: Attention | None) -> None:
        nothing = prompts.TokenizedPrompt(np.zeros(length, np.int32), np.array([[0, length]], np.int32))
        list(self._model.embed_with_caches([nothing], attention=attention))

    def prepare(
        self,
        query: str,
        *,
        method: RagMethod,
        instruction: str = "",
        k: int = 1,
        positions: Positions = "own",
        max_length: int | None = None,
    ) -> Prepared:
        """Finds documents and puts together what an answer goes on from.

        Where the query's keys and values are used, they are those of the pass that embeds it for the search.

        Args:
          query: What is asked.
          method: How query and documents come to the model.
          instruction: What the model is told about the query when it is embedded; part of a cached query.
          k: How many documents are used.
          positions: Of a cached text that comes after another: its `own`, as in the paper, or `corrected`.
          max_length: Most tokens of the documents, of which more are not brought to memory; None for any number.

        Raises:
          InputError: The query is empty, the store lacks keys and values that the method needs, or the documents are
            too long.
        """
        require_positive("k", k)
        parts = prompts.cached_parts(method)
        if lack := self._lack(method):
            raise InputError(lack)
        hits, caches = [], {"query": [], "document": []}
        if "query" in parts:
            (cached,) = self._model.encode_with_caches([query], instruction=instruction)
            caches["query"] = [cached.cache]
            (hits,) = self.retriever.nearest(cached.vector[None], k)
        elif method != "none":
            (hits,) = self.retriever.find([query], instruction=instruction, k=k)
        if "document" in parts:
            if max_length is not None:
                num_tokens = sum(self._store.cache_length(hit.row) for hit in hits)
                if num_tokens > max_length:
                    raise InputError(
                        f"k={k}: the documents have {num_tokens} tokens; the limit is {max_length}: use fewer"
                    )
            caches["document"] = [self._cache(hit.row) for hit in hits]
        prefix = concatenate(
            [cache for part in parts for cache in caches[part]],
            self._model.architecture,
            corrected=positions == "corrected",
        )
        passage = "\n\n".join(self._passage(hit.document) for hit in hits)
        text = prompts.rag(method, query, passage, bos=self._model.tokenizer.bos)
        return Prepared(prefix, text, self._model.tokenizer.encode(text).ids, hits)

    def answer(self, prepared: Prepared, *, max_new_tokens: int = 64, stop: str | Sequence[str] = ()) -> Answered:
        """Writes an answer with the likeliest tokens.

        Args:
          prepared: From `prepare`.
          max_new_tokens: Most tokens of the answer.
          stop: The answer ends before this string, or the first of several.

        Raises:
          InputError: Query, documents and answer do not fit the model.
        """
        continuation = Continuation(prepared.tokens, max_new_tokens, prefix=prepared.prefix)
        text = "".join(piece for (piece,) in self._model.write([continuation], stop=stop))
        return Answered(text, prepared.hits, continuation.num_cached, len(prepared.tokens))

    @property
    def num_waiting(self) -> int:
        """Documents that have been used and wait to be read causally."""
        return len(self._causal.waiting)

    def read_causally(self) -> bool:
        """Reads one document that has been used, so that answers from it are from now on those without keys and values.

        That takes as long as reading the document in a prompt; a server does it while nobody waits.

        Returns:
          Whether there was one.
        """
        if not self._causal.waiting:
            return False
        row, _ = self._causal.waiting.popitem(last=False)
        (cached,) = self._model.encode_with_caches(
            [self._store.document(row).embedded],
            instruction=self._store.settings.instruction,
            max_length=self._store.settings.max_length,
            attention="causal",
        )
        self._causal.put(row, cached.cache)
        return True

    def _cache(self, row: int) -> KVCache:
        """Keys and values of a document: of a causal pass where there has been one."""
        if found := self._causal.get(row):
            return found
        cache, config = self._store.cache(row), self._model.architecture
        expected = config.num_layers, self._store.cache_length(row), config.num_kv_heads, config.head_dim
        if {cache.keys.shape, cache.values.shape} != {expected}:
            raise DamagedError(f"{self._store.folder}: keys and values of row {row} are not of this model's shape")
        if self._store.settings.cache_form == "first":  # what comes second would be read after the query
            self._causal.ask(row, cache)
        return cache

    def _passage(self, document: Document) -> str:
        """What the store's model read of a document, without the tokenizer's `ending`, which stays where one is cut."""
        settings, tokenizer = self._store.settings, self._model.tokenizer
        opening = prompts.opening(settings.cache_form, bos=tokenizer.bos)
        prompt = prompts.embedding(document.embedded, settings.instruction, bos=opening)
        starts, limit = tokenizer.encode(prompt.text).starts, settings.max_length - tokenizer.num_ending
        end = starts[limit] if len(starts) > limit else len(prompt.text)
        return prompt.text[prompt.spans[0][0] : end]

    def _lack(self, method: RagMethod) -> str | None:
        """What the store lacks for a method, and the remedy."""
        if "document" not in prompts.cached_parts(method):
            return None
        settings, needed = self._store.settings, prompts.document_form(method)
        if settings.caches and settings.cache_form == needed:
            return None
        found = f"made with --cache-form {settings.cache_form}" if settings.caches else "has no keys and values"
        return (
            f"{self._store.folder}: {found}, and {method} needs those of --cache-form {needed}; index the corpus into "
            f"another folder with --caches bfloat16 --cache-form {needed}, or choose another method"
        )


class _CausalMemory:
    """Keys and values of documents, the last used ones that fit, and which documents are wanted.

    Attributes:
      limit: Most bytes.
      waiting: Rows that are wanted, those that have waited longest first.
    """

    def __init__(self, limit: int):
        self.limit, self._size = limit, 0
        self._caches: OrderedDict[int, KVCache] = OrderedDict()
        self.waiting: OrderedDict[int, None] = OrderedDict()

    def get(self, row: int) -> KVCache | None:
        if row in self._caches:
            self._caches.move_to_end(row)
        return self._caches.get(row)

    def ask(self, row: int, like: KVCache) -> None:
        """Wants a row whose keys and values are as large as these, if they fit at all."""
        if _num_bytes(like) <= self.limit:
            self.waiting[row] = None

    def put(self, row: int, cache: KVCache) -> None:
        self._caches[row] = cache
        self._size += _num_bytes(cache)
        while self._size > self.limit:
            self._size -= _num_bytes(self._caches.popitem(last=False)[1])


def _num_bytes(cache: KVCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes
