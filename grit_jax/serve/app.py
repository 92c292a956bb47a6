"""The server: its endpoints around one model, and what is told without the model."""

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

from grit_jax.inference.engine import Engine
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.rag import Rag
from grit_jax.serve.bodies import Bodies
from grit_jax.serve.chat import Chat
from grit_jax.serve.completions import Completions
from grit_jax.serve.embeddings import Embeddings
from grit_jax.serve.endpoint import Endpoint, Handler, as_json
from grit_jax.serve.errors import RequestError, http_error
from grit_jax.serve.guards import KnownHosts, check_authorization
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.rerank import Rerank
from grit_jax.serve.scheduler import Kind, Scheduler
from grit_jax.serve.search import MOST_FOUND, Search
from grit_jax.serve.service import Limits, Service

_log = logging.getLogger(__name__)

_PAGE_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_PAGE_HEADERS = {"content-security-policy": "default-src 'self'", "x-content-type-options": "nosniff"}
_INSTRUCTION = "Find the text that answers the question"  # that the page offers where the server has none of its own
_QUERY_WORDS = 8  # of a document without a title, for the query that the page offers


class Server:
    """One model behind OpenAI's interface.

    Args:
      model: The model.
      name: What clients call it.
      limits: What is taken on.
      instructions: Named instructions of `/v1/embeddings`.
      rag: The store that is searched and answered from; None for none.
      api_key: What clients must send; None for nothing.
      hosts: Names that requests may come to, beside this machine's own; see `KnownHosts`.

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
        self._metrics = Metrics()
        self._engine: Engine = model.engine(limits.lanes(), fewer_rows=True)
        scheduler = self._scheduler = Scheduler(
            model, self._engine, self._metrics, queue=limits.queue, prepare=self._warm_up,
            idle=rag.read_causally if rag else lambda: False,
        )  # fmt: skip
        self._service = service = Service(model, name, limits, rag, scheduler, self._metrics)
        self._api_key, self._index = api_key, _index(rag, instructions or {}) if rag else None
        self._bodies = Bodies(limits.body_bytes, limits.all_bodies * limits.body_bytes, seconds=limits.seconds)
        self._num_compiled, self._is_warm = 0, False
        self._metrics.gauges(
            {
                "weights_bytes": ("Memory of the weights", lambda: self.weights_bytes),
                "cache_bytes": ("Memory of keys and values of answers", lambda: self.cache_bytes),
                "answers_active": ("Answers that are read or written", lambda: self._engine.num_active),
                "answers_waiting": ("Answers that wait for a row", lambda: scheduler.num_waiting),
                "warm": ("Whether every program is compiled", lambda: float(self._is_warm)),
            }
        )
        endpoints: Sequence[tuple[str, Handler, Kind]] = (
            ("/v1/embeddings", Embeddings(service, instructions or {}), "embed"),
            ("/v1/rerank", Rerank(service), "embed"),
            ("/v1/search", Search(service), "embed"),
            ("/v1/chat/completions", Chat(service), "write"),
            ("/v1/completions", Completions(service), "write"),
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
                *(Route(path, self._endpoint(handler, kind), methods=["POST"]) for path, handler, kind in endpoints),
            ],
            middleware=[Middleware(KnownHosts, allowed=hosts)],
            exception_handlers={HTTPException: http_error, RequestError: http_error},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False  # to an address that a proxy may have rewritten

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights; there is one copy for both skills."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._service.model.params))

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of all answers."""
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
            service.rag.retriever.warm_up(MOST_FOUND, compiled)
            service.rag.warm_up(longest, compiled)
        self._is_warm = True
        _log.info("ready: %d programs in %.1f s", self._num_compiled, time.monotonic() - started)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        self._scheduler.start()
        yield
        await asyncio.to_thread(self._scheduler.stop)

    def _endpoint(self, handler: Handler, kind: Kind) -> Endpoint:
        return Endpoint(
            handler, metrics=self._metrics, check=self._refuse_if_unready,
            place=lambda client: self._scheduler.place(kind, client), api_key=self._api_key, bodies=self._bodies,
            seconds=self._service.limits.seconds,
        )  # fmt: skip

    def _refuse_if_failed(self) -> None:
        if self._scheduler.failure:
            raise self._scheduler.failure

    def _refuse_if_unready(self) -> None:
        self._refuse_if_failed()
        if not self._is_warm:
            raise RequestError(
                503, f"programs are being compiled, {self._num_compiled} so far; ask again later", "not_ready"
            )

    # What is told without the model.

    async def _page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "there is no such file")
        content = resources.files("grit_jax.serve").joinpath("page", name).read_bytes()
        return Response(content, media_type=_PAGE_TYPES[name], headers=_PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        self._refuse_if_failed()
        return JSONResponse({"status": "ok", "ready": self._is_warm, "programs_compiled": self._num_compiled})

    async def _ready(self, _: Request) -> Response:
        self._refuse_if_unready()
        return JSONResponse({"status": "ready"})

    async def _told_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        check_authorization(request, self._api_key)
        service = self._service
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
    """What is told of a store, with an instruction and a query to begin with."""
    first = rag.retriever.document(0)
    query = first.title or " ".join(first.text.split()[:_QUERY_WORDS])
    return {
        "documents": rag.retriever.num_documents,
        "methods": rag.methods,
        "example": {"instruction": next(iter(instructions.values()), _INSTRUCTION), "query": query},
    }
