"""The command `grit-jax serve`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from pathlib import Path

from grit_jax.cli.command import MODEL, argument, command, number, repeated
from grit_jax.config import COPIES, Config, MeshConfig, dump_config, parse_config
from grit_jax.config.ranges import FINITE, NOT_NEGATIVE
from grit_jax.errors import InputError, install

_KEY = "GRIT_JAX_API_KEY"


@command(
    "answer embedding and chat requests over HTTP, as OpenAI's API does, with one copy of a model",
    MODEL,
    argument("--index", metavar="STORE", help="folder from grit-jax index, for search and answers from it"),
    number("--causal-mb", "N", "MiB for keys and values of documents, read causally in idle time", 0, NOT_NEGATIVE),
    argument("--name", help="what clients call the model (default: the folder's name)"),
    argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)"),
    number("--port", "PORT", "port to listen on", 8000, FINITE),
    repeated("--allow-host", "NAME", "another name that clients, such as a proxy, call this server by, * for any"),
    number("--max-length", "N", "tokens of prompt and completion, or of a text (default: the model's, up to 4096)"),
    number("--rows", "N", "completions of up to 512 tokens written at a time, fewer if longer", 16),
    number("--queue", "N", "requests that may wait", 256),
    number("--max-body", "BYTES", "largest request", 8 << 20),
    number("--timeout", "S", "seconds that a request may take", 300.0),
    number("--drain", "S", "seconds for requests to finish after SIGTERM", 30),
    argument(
        "--prompts", metavar="FILE",
        help='JSON {"name": "instruction"}; embedding requests may name one as prompt_name',
    ),
    argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of weights (%(default)s)"
    ),
    overrides="--mesh.",
    examples=f"""\
  grit-jax serve runs/mine
  grit-jax serve runs/mine --index stores/news --port 8080 --max-length 4096
  {_KEY}=$(cat key) grit-jax serve runs/mine --host 0.0.0.0 --mesh.tensor=4

The API key, if there is one, is the environment variable {_KEY}.
""",
)  # fmt: skip
def run(args: argparse.Namespace) -> int:
    """Serves until a signal stops it."""
    mesh = _mesh(args.overrides)
    instructions = _instructions(Path(args.prompts)) if args.prompts else {}
    try:
        import uvicorn

        from grit_jax.serve.app import Server
        from grit_jax.serve.guards import StrictProtocol, check_api_key, check_host
        from grit_jax.serve.service import Limits
    except ModuleNotFoundError as error:
        raise InputError(f"the server needs {error.name}; {install('serve')}") from error
    from grit_jax.inference.model import GritModel
    from grit_jax.retrieval.rag import Rag
    from grit_jax.retrieval.store import Store

    api_key = os.environ.get(_KEY)
    if api_key is not None:
        check_api_key(api_key, source=_KEY)
    for host in args.allow_host:
        check_host(host, source="--allow-host")
    listening = _bound(args.host, args.port)
    # Only errors of libraries; `force` because JAX has set up its own handler.
    logging.basicConfig(format="%(message)s", level=logging.ERROR, force=True)
    logging.getLogger("grit_jax").setLevel(logging.INFO)
    model = GritModel.load(args.model, mesh=mesh, dtype=args.dtype)
    limit = model.architecture.max_length
    if (args.max_length or 0) > limit:
        raise InputError(f"--max-length={args.max_length} is over the model's {limit}; choose at most that")
    name = args.name or Path(args.model).resolve().name
    limits = Limits(
        max_length=args.max_length or min(limit, 4096), rows=args.rows, queue=args.queue,
        body_bytes=args.max_body, seconds=args.timeout,
    )  # fmt: skip
    server = Server(
        model, name=name, limits=limits, instructions=instructions, api_key=api_key,
        rag=Rag(model, Store(args.index), name=args.model, causal_bytes=args.causal_mb << 20) if args.index else None,
        hosts=[args.host, *args.allow_host],
    )  # fmt: skip
    address = f"http://{args.host}:{listening.getsockname()[1]}"
    print(
        f"{name} at {address} once it is ready; weights {server.weights_bytes / 1e6:,.1f} MB, "
        f"KV caches {server.cache_bytes / 1e6:,.1f} MB",
        flush=True,
    )
    # Having finished its requests, uvicorn raises the signal again, for this handler: such a stop is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(
        server.app, http=StrictProtocol, log_config=None, access_log=False, timeout_graceful_shutdown=args.drain
    )
    uvicorn.Server(config).run([listening])
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds this address while the model is loaded."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: {error}; choose others") from error
    return bound


def _mesh(overrides: list[str]) -> MeshConfig:
    """The given settings on top of `COPIES`."""
    return parse_config(dump_config(Config(mesh=COPIES)), overrides).mesh


def _instructions(path: Path) -> dict[str, str]:
    from grit_jax.data.records import parse_json
    from grit_jax.data.text_files import read_text

    try:
        found = parse_json(read_text(path), str(path))
    except InputError as error:
        raise InputError(f"--prompts {error}") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise InputError(f'--prompts {path}: must be an object such as {{"query": "Find the answer"}}')
    return found
