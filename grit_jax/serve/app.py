"""The server's endpoints."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from grit_jax.answer import Answer
from grit_jax.batch import sizes
from grit_jax.engine import Continuation, Engine, LaneSize
from grit_jax.inference import GritModel
from grit_jax.model.decode import Logprobs
from grit_jax.model.transformer import KVCache
from grit_jax.prompts import TokenizedPrompt
from grit_jax.rag import Prepared, Rag
from grit_jax.serve import protocol
from grit_jax.serve.http import Bodies, Endpoint, Handler, check_key, http_error
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.protocol import RequestError
from grit_jax.serve.scheduler import Kind, Scheduler

_log = logging.getLogger(__name__)

_SHORTEST_LANE, _LANE_GROWTH = 512, 4
_NEW_TOKENS = 256  # of an answer whose request does not say
_MOST_TOKENS = 300_000  # of the texts of a request, as at OpenAI
_PAGE_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_PAGE_HEADERS = {"content-security-policy": "default-src 'self'", "x-content-type-options": "nosniff"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      max_length: Tokens of a prompt and its answer, and of an embedded text.
      rows: Answers of up to 512 tokens that are written at a time; fewer of longer ones.
      queue: Requests of a kind that wait or are under way.
      body_bytes: Bytes of a request.
      all_bodies: Bytes of all requests under way, in units of `body_bytes`.
      seconds: Of a request.
    """

    max_length: int
    rows: int = 16
    queue: int = 256
    body_bytes: int = 8 << 20
    all_bodies: int = 16
    seconds: float = 300.0

    def lanes(self) -> list[LaneSize]:
        """Batches of the engine, of about as many tokens each."""
        slots = sizes(_SHORTEST_LANE, self.max_length, growth=_LANE_GROWTH)
        return [LaneSize(max(1, self.rows * slots[0] // size), size) for size in slots]


class Server:
    """One model behind OpenAI's interface.

    Args:
      model: The model.
      name: What clients call it.
      limits: What is taken on.
      instructions: Named instructions of `/v1/embeddings`.
      rag: The store that is searched and answered from; None for none.
      api_key: What clients must send; None for nothing.

    Attributes:
      app: The ASGI application. Its lifespan starts and stops the model's thread, which compiles first.
    """

    def __init__(
        self,
        model: GritModel,
        *,
        name: str,
        limits: Limits,
        instructions: Mapping[str, str] | None = None,
        rag: Rag | None = None,
        api_key: str | None = None,
    ):
        self._model, self._name, self._limits, self._instructions = model, name, limits, instructions or {}
        self._rag, self._api_key = rag, api_key
        self._bodies = Bodies(limits.body_bytes, limits.all_bodies * limits.body_bytes)
        self._metrics = Metrics()
        self._engine: Engine = model.engine(limits.lanes(), fewer_rows=True)
        self._scheduler = Scheduler(
            model, self._engine, self._metrics, queue=limits.queue, prepare=self._warm_up,
            idle=rag.read_causally if rag else lambda: False,
        )  # fmt: skip
        # No more keys and values of documents are in memory than there are rows for.
        self._with_documents = asyncio.Semaphore(limits.rows)
        self._is_warm = False
        self._metrics.gauges(
            {
                "weights_bytes": ("Memory of the weights", lambda: self.weights_bytes),
                "cache_bytes": ("Memory of keys and values of answers", lambda: self.cache_bytes),
                "answers_active": ("Answers that are read or written", lambda: self._engine.num_active),
                "answers_waiting": ("Answers that wait for a row", lambda: self._engine.num_waiting),
                "warm": ("Whether every program is compiled", lambda: float(self._is_warm)),
            }
        )
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/page/{name}", self._page),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._told_metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                *(
                    Route(path, self._endpoint(handler, kind), methods=["POST"])
                    for path, handler, kind in (
                        ("/v1/embeddings", self._embeddings, "embed"),
                        ("/v1/chat/completions", self._chat, "write"),
                        ("/v1/completions", self._completions, "write"),
                        ("/v1/rerank", self._rerank, "embed"),
                        ("/v1/search", self._search, "embed"),
                    )
                ),
            ],
            exception_handlers={HTTPException: http_error, RequestError: http_error},
            lifespan=self._lifespan,
        )

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights; there is one copy for both skills."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._model.params))

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of all answers."""
        return self._engine.cache_bytes

    def _warm_up(self, progress: Callable[[int], None]) -> None:
        """Compiles every program that requests need."""
        started, longest = time.monotonic(), self._limits.max_length
        count = self._model.warm_up_embedding(longest, progress) + self._engine.warm_up(progress)
        if self._rag:
            count += self._rag.retriever.warm_up(protocol.MOST_FOUND, progress) + self._rag.warm_up(longest, progress)
        self._is_warm = True
        _log.info("ready: %d programs in %.1f s", count, time.monotonic() - started)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        self._scheduler.start()
        yield
        await asyncio.to_thread(self._scheduler.stop)

    def _endpoint(self, handler: Handler, kind: Kind) -> Endpoint:
        return Endpoint(
            handler, metrics=self._metrics, check=self._refuse_if_unready, place=lambda: self._scheduler.place(kind),
            api_key=self._api_key, bodies=self._bodies, seconds=self._limits.seconds,
        )  # fmt: skip

    def _refuse_if_failed(self) -> None:
        if self._scheduler.failure:
            raise self._scheduler.failure

    def _refuse_if_unready(self) -> None:
        self._refuse_if_failed()
        if not self._is_warm:
            raise RequestError(503, "programs are being compiled; ask again later", "not_ready")

    # What is told without the model.

    async def _page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "there is no such file")
        content = resources.files("grit_jax.serve").joinpath("page", name).read_bytes()
        return Response(content, media_type=_PAGE_TYPES[name], headers=_PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        self._refuse_if_failed()
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        self._refuse_if_unready()
        return JSONResponse({"status": "ready"})

    async def _told_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        check_key(request, self._api_key)
        index = self._rag and {"documents": self._rag.retriever.num_documents, "methods": self._rag.methods}
        model = {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "grit_jax",
            "max_length": self._limits.max_length,
            "embed_dim": self._model.embed_dim,
            "index": index,
        }
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._refuse_other_model(request.path_params["name"])
        return JSONResponse(model)

    def _refuse_other_model(self, name: str) -> None:
        if name != self._name:
            raise RequestError(404, f"there is no model {name[:100]!r} here; ask for {self._name!r}", "model_not_found")

    # Embeddings.

    async def _embeddings(self, body: bytes) -> Mapping[str, Any]:
        request = protocol.parse(protocol.EmbeddingRequest, body)
        self._refuse_other_model(request.model)
        if request.dimensions not in (None, self._model.embed_dim):
            raise RequestError(400, f"dimensions: vectors of this model have {self._model.embed_dim}; leave it out")
        texts = [request.input] if isinstance(request.input, str) else request.input
        instruction = protocol.instruction_of(request, self._instructions)
        prompts = await self._embedding_prompts(texts, instruction, truncate=request.truncate)
        vectors = await self._scheduler.embed(prompts)
        return protocol.embeddings(vectors, request.encoding_format, self._name, _num_tokens(prompts))

    async def _rerank(self, body: bytes) -> Mapping[str, Any]:
        request = protocol.parse(protocol.RerankRequest, body)
        self._refuse_other_model(request.model)
        query = await self._embedding_prompts([request.query], request.instruction, truncate=request.truncate)
        passages = await self._embedding_prompts(request.texts, "", truncate=request.truncate)
        vectors = await self._scheduler.embed([*query, *passages])
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores = vectors[1:] @ vectors[0]
        order = np.argsort(-scores, kind="stable")[: request.top_n].tolist()
        results = [
            {"index": place, "relevance_score": float(scores[place])}
            | ({"document": {"text": request.texts[place]}} if request.return_documents else {})
            for place in order
        ]
        read = _num_tokens([*query, *passages])
        return protocol.about("rerank", self._name, results=results, usage=protocol.usage(read))

    async def _search(self, body: bytes) -> Mapping[str, Any]:
        request = protocol.parse(protocol.SearchRequest, body)
        self._refuse_other_model(request.model or self._name)
        rag = self._needed_rag()
        prompts = await self._embedding_prompts([request.query], request.instruction)
        vectors = await self._scheduler.embed(prompts)
        best = await self._scheduler.call(lambda: rag.retriever.best(vectors, request.k))
        (hits,) = await asyncio.to_thread(rag.retriever.hits, *best)
        read = _num_tokens(prompts)
        return {"object": "list", "model": self._name, "data": protocol.documents(hits), "usage": protocol.usage(read)}

    def _needed_rag(self) -> Rag:
        if self._rag is None:
            raise RequestError(400, "this server has no documents; start it with --index STORE", "no_index")
        return self._rag

    async def _embedding_prompts(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = False
    ) -> list[TokenizedPrompt]:
        """Tokens of texts that are embedded.

        Raises:
          RequestError: A text is too long and is not to be cut, or there are too many of them.
          InputError: A text is empty, or the instruction leaves no room for it.
        """
        limit = self._limits.max_length
        self._refuse_huge(instruction, "the instruction")
        if len(instruction) * len(texts) > self._limits.body_bytes:
            raise RequestError(
                413, f"{len(texts)} texts, each with the instruction, are too much; send fewer at a time"
            )
        if truncate:
            texts = [text[: self._most_characters] for text in texts]
        for place, text in enumerate(texts):
            self._refuse_huge(text, f"text {place}")
        prompts = await asyncio.to_thread(
            self._model.embedding_prompts, texts, instruction=instruction, max_length=limit
        )
        for place, prompt in enumerate(prompts):
            if len(prompt.tokens) > limit and not truncate:
                raise _too_long(f"text {place} has {len(prompt.tokens)} tokens", limit)
        prompts = [prompt.cut(limit) for prompt in prompts]
        if (num_tokens := _num_tokens(prompts)) > _MOST_TOKENS:
            raise RequestError(400, f"the texts have {num_tokens} tokens; the limit of a request is {_MOST_TOKENS}")
        return prompts

    def _refuse_huge(self, text: str, what: str) -> None:
        """Refuses what is too long whatever its tokens are, before it is tokenized."""
        if len(text) > self._most_characters:
            raise _too_long(f"{what} has {len(text)} characters", self._limits.max_length)

    @property
    def _most_characters(self) -> int:
        return self._limits.max_length * self._model.tokenizer.longest_token

    # Written text.

    async def _chat(self, body: bytes) -> Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]:
        request = protocol.parse(protocol.ChatRequest, body)
        self._refuse_other_model(request.model)
        messages = [message.turn() for message in request.messages]
        self._refuse_huge("".join(message["content"] for message in messages), "the conversation")
        form = protocol.ChatForm(self._model.tokenizer, request.top_logprobs or 0)
        return await self._answered(request, self._chat_begun(request, messages), form)

    @asynccontextmanager
    async def _chat_begun(
        self, request: protocol.ChatRequest, messages: Sequence[Mapping[str, str]]
    ) -> AsyncGenerator[_Begun]:
        most, wants = request.max_completion_tokens or request.max_tokens, bool(request.logprobs)
        if request.retrieval is None:
            (tokens,) = await asyncio.to_thread(self._model.prompt_tokens, [messages])
            yield self._begun(request, [tokens], most, logprobs=wants)
            return
        async with self._with_documents:
            prefix, _, tokens, hits = await self._prepared(messages, request.retrieval)
            more = {"documents": protocol.documents(hits)}
            yield self._begun(request, [tokens], most, logprobs=wants, prefix=prefix, more=more)

    async def _prepared(self, messages: Sequence[Mapping[str, str]], retrieval: protocol.Retrieval) -> Prepared:
        """What an answer from documents goes on from."""
        rag = self._needed_rag()
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise RequestError(400, "messages: with retrieval a question is answered by itself; send one user message")
        query, how = messages[0]["content"], retrieval.model_dump()
        prompts = await self._embedding_prompts([query], retrieval.instruction)  # refuses what is too long
        found = await self._scheduler.call(lambda: rag.prepare(query, **how, max_length=self._limits.max_length))
        if retrieval.method != "none":
            self._metrics.tokens.labels("embedded").inc(_num_tokens(prompts))
        return found

    async def _completions(self, body: bytes) -> Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]:
        request = protocol.parse(protocol.CompletionRequest, body)
        self._refuse_other_model(request.model)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        for place, text in enumerate(texts):
            self._refuse_huge(text, f"prompt {place}")
        prompts = await asyncio.to_thread(self._model.prompt_tokens, texts, raw=True)
        form = protocol.CompletionForm(self._model.tokenizer, request.logprobs or 0)
        wants = request.logprobs is not None
        begun = self._begun(request, prompts, request.max_tokens, logprobs=wants)
        return await self._answered(request, nullcontext(begun), form)

    def _begun(
        self,
        request: protocol.WrittenRequest,
        prompts: Sequence[np.ndarray],
        max_tokens: int | None,
        *,
        logprobs: bool,
        prefix: KVCache | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> _Begun:
        """What the engine does for a request, after a prefix and with more to tell where documents are used."""
        num_cached = 0 if prefix is None else prefix.keys.shape[1]
        longest = num_cached + max(map(len, prompts))
        room = self._limits.max_length - longest
        if room < (max_tokens or 1):
            raise _too_long(f"a prompt of {longest} tokens and {max_tokens or 1} new ones", self._limits.max_length)
        if (count := len(prompts) * request.n) > self._limits.queue:
            raise RequestError(400, f"n: the request is for {count} answers; the limit is {self._limits.queue}")
        seed = secrets.randbits(32) if request.seed is None else request.seed
        continuations = [
            Continuation(
                tokens, max_tokens or min(room, _NEW_TOKENS), request.temperature, request.top_p, seed + number,
                logprobs, prefix,
            )
            for tokens in prompts
            for number in range(request.n)
        ]  # fmt: skip
        num_read = sum(map(len, prompts))
        self._metrics.tokens.labels("read").inc(num_read)
        self._metrics.tokens.labels("cached").inc(num_cached)
        return _Begun(continuations, num_cached + num_read, num_cached, more)

    async def _answered(
        self, request: protocol.WrittenRequest, beginning: AbstractAsyncContextManager[_Begun], form: protocol.Form
    ) -> Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]:
        """A response, or the events of one."""
        about = form.about(self._name, streams=request.stream)
        if request.stream:
            return self._events(request, beginning, form, about)
        async with beginning as begun:
            by_index: list[list[protocol.Piece]] = [[] for _ in begun.continuations]
            async with aclosing(self._pieces(begun.continuations, request.stops)) as pieces:
                async for piece in pieces:
                    by_index[piece.index].append(piece)
        wholes = [_joined(some) for some in by_index]
        written = sum(len(piece.tokens) for piece in wholes)
        choices = [form.whole(piece) for piece in wholes]
        return {**about, **begun.more, "choices": choices, "usage": begun.usage(written)}

    async def _events(
        self,
        request: protocol.WrittenRequest,
        beginning: AbstractAsyncContextManager[_Begun],
        form: protocol.Form,
        about: Mapping[str, Any],
    ) -> AsyncGenerator[Mapping[str, Any]]:
        started, written = time.perf_counter(), 0
        async with beginning as begun, aclosing(self._pieces(begun.continuations, request.stops)) as pieces:
            if begun.more:
                yield {**about, **begun.more, "choices": []}
            async for piece in pieces:
                if not written and len(piece.tokens):
                    self._metrics.first_token_seconds.observe(time.perf_counter() - started)
                written += len(piece.tokens)
                if piece.text or piece.finish or piece.logprobs:
                    yield {**about, "choices": [form.part(piece)]}
        if request.includes_usage:
            yield {**about, "choices": [], "usage": begun.usage(written)}

    async def _pieces(
        self, continuations: Sequence[Continuation], stops: Sequence[str]
    ) -> AsyncGenerator[protocol.Piece]:
        """What is new of all answers, in the order in which it is written."""
        found = asyncio.Queue[protocol.Piece | Exception]()

        async def write(index: int, continuation: Continuation) -> None:
            answer = Answer(self._model.tokenizer, continuation.tokens, stops)
            try:
                async with aclosing(self._scheduler.write(continuation)) as blocks:
                    async for block in blocks:
                        before = answer.num_tokens
                        text = answer.extend(block.tokens, last=block.finish is not None)
                        new = slice(answer.num_tokens - before)
                        logprobs = block.logprobs and Logprobs(*(x[new] for x in block.logprobs))
                        finish = "stop" if answer.done else block.finish
                        found.put_nowait(protocol.Piece(index, text, finish, block.tokens[new], logprobs))
                        if answer.done:
                            break
            except Exception as error:  # told to the one who asked
                found.put_nowait(error)

        tasks = [asyncio.create_task(write(*pair)) for pair in enumerate(continuations)]
        try:
            left = len(tasks)
            while left:
                piece = await found.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Begun(NamedTuple):
    """What is written for a request.

    Attributes:
      continuations: Every answer of the first prompt, then of the next.
      num_tokens: Of the prompts, once each.
      num_cached: Of these, tokens whose keys and values were there.
      more: What is told beside the answers.
    """

    continuations: list[Continuation]
    num_tokens: int
    num_cached: int
    more: Mapping[str, Any]

    def usage(self, num_written: int) -> Mapping[str, Any]:
        return protocol.usage(self.num_tokens, num_written, self.num_cached)


def _joined(pieces: Sequence[protocol.Piece]) -> protocol.Piece:
    """A whole answer."""
    logprobs = None
    if pieces[0].logprobs is not None:
        logprobs = Logprobs(*(np.concatenate(x) for x in zip(*(piece.logprobs or () for piece in pieces), strict=True)))
    text, tokens = "".join(piece.text for piece in pieces), np.concatenate([piece.tokens for piece in pieces])
    return protocol.Piece(pieces[0].index, text, pieces[-1].finish, tokens, logprobs)


def _num_tokens(prompts: Sequence[TokenizedPrompt]) -> int:
    return sum(len(prompt.tokens) for prompt in prompts)


def _too_long(what: str, limit: int) -> RequestError:
    return RequestError(400, f"{what}; the limit is {limit} tokens: shorten it", "context_length_exceeded")
