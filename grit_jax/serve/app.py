"""The server: endpoints around one model, and pages that need no model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from grit_jax.inference.model import GritModel
from grit_jax.retrieval.rag import Rag
from grit_jax.serve import chat, completions, embeddings
from grit_jax.serve.bodies import Bodies
from grit_jax.serve.counters import Counters
from grit_jax.serve.endpoint import Endpoint, as_json
from grit_jax.serve.fairness import FairSemaphore
from grit_jax.serve.guards import KnownHosts, check_authorization
from grit_jax.serve.request_errors import RequestError, http_error
from grit_jax.serve.scheduler import Scheduler
from grit_jax.serve.service import Limits, Service

_log = logging.getLogger(__name__)

_PAGE_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_PAGE_HEADERS = {"content-security-policy": "default-src 'self'", "x-content-type-options": "nosniff"}
_INSTRUCTION = "Find the text that answers the question"  # the page's example if the server has no instructions
_QUERY_WORDS = 8  # words of an untitled document for the page's example query


class Server:
    """One model behind OpenAI's interface.

    Args:
      model: The model.
      hosts: Names of the server besides this machine's own; see `KnownHosts`. The other arguments are `Service`'s.

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
        hosts: Sequence[str] = (),
    ):
        counters, self._engine = Counters(), model.engine(limits.lanes(), fewer_rows=True)
        self._scheduler = scheduler = Scheduler(
            model, self._engine, counters, queue=limits.queue, prepare=self._warm_up,
            idle=rag.read_causally if rag else lambda: False,
        )  # fmt: skip
        self._service = service = Service(
            model, name, limits, instructions or {}, rag, api_key, scheduler, counters,
            bodies=Bodies(limits.body_bytes, limits.all_bodies * limits.body_bytes, seconds=limits.seconds),
            check_ready=self._check_ready, rag_rows=FairSemaphore(limits.rows),
        )  # fmt: skip
        self._index = _index(rag, service.instructions) if rag else None
        self._num_compiled, self._is_warm = 0, False
        counters.add_gauges(
            {
                "weights_bytes": ("Memory of the weights", lambda: self.weights_bytes),
                "cache_bytes": ("Memory of the KV caches", lambda: self.cache_bytes),
                "answers_active": ("Completions being read or written", lambda: self._engine.num_active),
                "answers_waiting": ("Completions that wait for a row", lambda: scheduler.num_waiting),
                "warm": ("Whether every program is compiled", lambda: float(self._is_warm)),
            }
        )
        endpoints = {
            "/v1/embeddings": Endpoint(service, embeddings.EmbeddingRequest, embeddings.embed, "embed"),
            "/v1/rerank": Endpoint(service, embeddings.RerankRequest, embeddings.rerank, "embed"),
            "/v1/search": Endpoint(service, embeddings.SearchRequest, embeddings.search, "embed"),
            "/v1/chat/completions": Endpoint(service, chat.ChatRequest, chat.chat, "write"),
            "/v1/completions": Endpoint(service, completions.CompletionRequest, completions.complete, "write"),
        }
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/page/{name}", self._page),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
            ],
            middleware=[Middleware(KnownHosts, allowed=hosts)],
            exception_handlers={HTTPException: http_error, RequestError: http_error},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False  # behind a proxy the redirect's address may be wrong

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights, which both skills share."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._service.model.params))

    @property
    def cache_bytes(self) -> int:
        """Memory of the engine's KV caches."""
        return self._engine.cache_bytes

    def _warm_up(self, progress: Callable[[int], None]) -> None:
        """Compiles every program that requests need."""
        service, started = self._service, time.monotonic()
        longest = service.limits.max_length

        def compiled(count: int) -> None:
            self._num_compiled += count
            progress(count)

        service.model.warm_up_embedding(longest, compiled)
        self._engine.warm_up(compiled)
        if service.rag:
            service.rag.retriever.warm_up(embeddings.MOST_HITS, compiled)
            service.rag.warm_up(longest, compiled)
        self._is_warm = True
        _log.info("ready: %d programs in %.1f s", self._num_compiled, time.monotonic() - started)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        self._scheduler.start()
        yield
        await asyncio.to_thread(self._scheduler.stop)

    def _check_alive(self) -> None:
        if self._scheduler.failure:
            raise self._scheduler.failure

    def _check_ready(self) -> None:
        self._check_alive()
        if not self._is_warm:
            message = f"programs are being compiled, {self._num_compiled} so far; ask again later"
            raise RequestError(503, message, "not_ready")

    async def _page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "no such file")
        content = resources.files("grit_jax.serve").joinpath("page", name).read_bytes()
        return Response(content, media_type=_PAGE_TYPES[name], headers=_PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        self._check_alive()
        return JSONResponse({"status": "ok", "ready": self._is_warm, "programs_compiled": self._num_compiled})

    async def _ready(self, _: Request) -> Response:
        self._check_ready()
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self._service.counters.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        service = self._service
        check_authorization(request, service.api_key)
        model = {
            "id": service.name,
            "object": "model",
            "created": 0,
            "owned_by": "grit_jax",
            "max_length": service.limits.max_length,
            "embed_dim": service.model.embed_dim,
            "index": self._index,
        }
        if "name" in request.path_params:
            service.refuse_other_model(request.path_params["name"])
        else:
            model = {"object": "list", "data": [model]}
        return Response(as_json(model), media_type="application/json")


def _index(rag: Rag, instructions: Mapping[str, str]) -> Mapping[str, Any]:
    """The facts of a store for clients, with an example instruction and query."""
    store = rag.retriever.store
    first = store.document(0)
    query = first.title or " ".join(first.text.split()[:_QUERY_WORDS])
    return {
        "documents": len(store),
        "methods": rag.methods,
        "example": {"instruction": next(iter(instructions.values()), _INSTRUCTION), "query": query},
    }
