"""Answers from a store: the model reads the documents again, or continues the keys and values of their embedding pass.

`prompts.rag` gives the text of a prompt, and the text after a cached one. A bidirectional embedding pass gives other
keys and values than a causal pass over the same tokens, so the answers differ; they agree for a model with a causal
embedding pass, or once `Rag.read_causally` has read the document.
"""

from __future__ import annotations

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
from grit_jax.retrieval.documents import Document
from grit_jax.retrieval.manifest import DamagedError
from grit_jax.retrieval.retriever import Hit, Retriever
from grit_jax.retrieval.store import Store
from grit_jax.text import prompts
from grit_jax.text.prompts import Positions, RagMethod


class Prepared(NamedTuple):
    """The prompt that an answer continues.

    Attributes:
      prefix: Its cached keys and values, numpy [layers, tokens, kv_heads, head_dim]; None for none.
      text: The text after them.
      tokens: int32 [tokens] of the text.
      hits: The documents that it uses, best first.
    """

    prefix: KVCache | None
    text: str
    tokens: np.ndarray
    hits: list[Hit]


class Answered(NamedTuple):
    """An answer.

    Attributes:
      text: The answer, after `The answer is`.
      hits: The documents that it uses, best first.
      num_cached: Tokens with cached keys and values.
      num_read: Tokens read.
    """

    text: str
    hits: list[Hit]
    num_cached: int
    num_read: int


class Rag:
    """Answers queries from a store with the model that made it.

    Only one thread at a time may use it, except to read the documents of hits.

    Args:
      model: The model.
      store: The store.
      name: The model's name, for messages.
      causal_bytes: Memory for keys and values of documents read causally; the last used are kept.

    Attributes:
      retriever: Finds documents.

    Raises:
      InputError: Another model made the store, or its keys and values are damaged.
    """

    def __init__(self, model: GritModel, store: Store, *, name: str = "this model", causal_bytes: int = 0):
        self.retriever = Retriever(model, store, name=name)
        self._model, self._store = model, store
        self._causal = _CausalMemory(causal_bytes)
        if store.settings.caches:
            store.check_caches()

    @property
    def methods(self) -> list[RagMethod]:
        """The methods that the store supports."""
        return [method for method in prompts.RAG_METHODS if self._lack(method) is None]

    def warm_up(self, max_length: int, progress: Callable[[int], None]) -> None:
        """Compiles the programs of `prepare` for queries of up to `max_length` tokens; `progress` counts them."""
        passes: list[tuple[Attention | None, int]] = [(None, max_length)]
        if self._causal.limit:
            passes.append(("causal", self._store.settings.max_length))
        for attention, longest in passes:
            for length in self._model.runner.row_lengths(longest):
                nothing = prompts.TokenizedPrompt(np.zeros(length, np.int32), np.array([[0, length]], np.int32))
                list(self._model.embed_with_caches([nothing], attention=attention))
                progress(1)
        config = self._model.architecture
        token = KVCache(*[np.zeros((config.num_layers, 1, config.num_kv_heads, config.head_dim), np.float32)] * 2)
        concatenate([token, token], config, corrected=True)
        progress(1)

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
        """Finds documents and assembles the prompt.

        If a method uses the query's keys and values, they come from the pass that embeds it for the search.

        Args:
          query: The query.
          method: How query and documents reach the model.
          instruction: The query's instruction for its embedding; part of a cached query.
          k: Number of documents.
          positions: Positions of a cached text after another: its `own`, as in the paper, or `corrected`.
          max_length: Most tokens of the documents' keys and values, checked before loading; None for no limit.

        Raises:
          InputError: The query is empty, the store lacks keys and values for the method, or the documents are too long.
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
        """Writes the answer by greedy decoding.

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
        """Number of used documents that wait to be read causally."""
        return len(self._causal.waiting)

    def read_causally(self) -> bool:
        """Reads one used document causally, so that later answers from it equal those without a KV cache.

        This takes as long as reading the document in a prompt; a server does it while it has no requests.

        Returns:
          Whether there was one.
        """
        if not self._causal.waiting:
            return False
        row = next(iter(self._causal.waiting))
        del self._causal.waiting[row]
        (cached,) = self._model.encode_with_caches(
            [self._store.document(row).embedded],
            instruction=self._store.settings.instruction,
            max_length=self._store.settings.max_length,
            attention="causal",
        )
        self._causal.put(row, cached.cache)
        return True

    def _cache(self, row: int) -> KVCache:
        """Keys and values of a document, from a causal pass if there has been one."""
        if found := self._causal.get(row):
            return found
        cache, config = self._store.cache(row), self._model.architecture
        expected = config.num_layers, self._store.cache_length(row), config.num_kv_heads, config.head_dim
        if {cache.keys.shape, cache.values.shape} != {expected}:
            raise DamagedError(f"{self._store.folder}: keys and values of row {row} do not have this model's shape")
        if self._store.settings.cache_form == "first":  # a `second` text would be read after the query
            self._causal.request(row, cache)
        return cache

    def _passage(self, document: Document) -> str:
        """A document's text as the store's model read it, without the tokenizer's `ending`."""
        settings, tokenizer = self._store.settings, self._model.tokenizer
        opening = prompts.opening(settings.cache_form, bos=tokenizer.bos)
        prompt = prompts.embedding(document.embedded, settings.instruction, bos=opening)
        starts, limit = tokenizer.encode(prompt.text).starts, settings.max_length - tokenizer.num_ending
        end = starts[limit] if len(starts) > limit else len(prompt.text)
        return prompt.text[prompt.spans[0][0] : end]

    def _lack(self, method: RagMethod) -> str | None:
        """What the store lacks for a method, and the remedy; None if it lacks nothing."""
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
    """The last used keys and values of causal passes that fit the limit, by row.

    Attributes:
      limit: Most bytes.
      waiting: Rows to be read, in the order of their requests.
    """

    def __init__(self, limit: int):
        self.limit, self._size = limit, 0
        self._caches: OrderedDict[int, KVCache] = OrderedDict()
        self.waiting: dict[int, None] = {}

    def get(self, row: int) -> KVCache | None:
        if row in self._caches:
            self._caches.move_to_end(row)
        return self._caches.get(row)

    def request(self, row: int, like: KVCache) -> None:
        """Requests a row whose keys and values are as large as `like`, if they fit at all."""
        if _num_bytes(like) <= self.limit:
            self.waiting[row] = None

    def put(self, row: int, cache: KVCache) -> None:
        self._caches[row] = cache
        self._size += _num_bytes(cache)
        while self._size > self.limit:
            self._size -= _num_bytes(self._caches.popitem(last=False)[1])


def _num_bytes(cache: KVCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes
