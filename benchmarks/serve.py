"""Load on the server: clients that embed and chat at once, and the same work done by the library.

    python benchmarks/serve.py                          64 clients for two minutes
    python benchmarks/serve.py --clients 8 --seconds 20

Half of the clients embed 1 to 4 passages of --data at a time, half ask for completions of 16 to 64 tokens to its
instructions; each sends its next request on the response to the last. `grit-jax serve` runs in its own process, the
clients in this one on the same cores. Afterwards the library does the same work, by one call of `encode` and then by
`generate`'s engine with as many rows as the server has, and every response is compared: vectors to 1e-4, completions by
their text; a difference, or a program compiled under load, is an error at the end. `overhead` is the server's time over
the library's, less 1.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import httpx2
import numpy as np
import openai

from grit_jax.inference.engine import Continuation
from grit_jax.inference.model import GritModel

ROWS, MAX_LENGTH = 16, 512


class Done(NamedTuple):
    """A request and its response.

    Attributes:
      texts: The embedded texts, or the one message.
      max_tokens: Most tokens of the completion; 0 for embeddings.
      result: Vectors, or the completion.
      tokens: Tokens embedded or written.
      first: Seconds to the first text of a completion.
      seconds: Seconds to the whole response.
    """

    texts: list[str]
    max_tokens: int
    result: Any
    tokens: int
    first: float
    seconds: float


class Process:
    """`grit-jax serve` on a free port for the duration of the block."""

    def __init__(self, model: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        run = "import sys; from grit_jax.cli.main import main; sys.exit(main())"
        options = ["--port", self.port, "--max-length", MAX_LENGTH, "--rows", ROWS, "--dtype", "float32"]
        self._process = subprocess.Popen([sys.executable, "-c", run, "serve", str(model), *map(str, options)])
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Process:
        while self._process.poll() is None:
            try:
                if httpx2.get(f"{self.address}/ready").status_code == 200:
                    return self
            except httpx2.ConnectError:
                pass
            time.sleep(0.2)
        raise SystemExit("the server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def memory(self, field: str) -> float:
        """A figure of the process in MB: VmRSS, its present memory, or VmHWM, its largest."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))

    def metric(self, name: str) -> float:
        """A figure of /metrics, by name and labels."""
        lines = httpx2.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f"grit_jax_{name} "))


async def load(address: str, model: str, passages: Sequence[str], questions: Sequence[str], args: Any) -> list[Done]:
    """The responses to all clients."""
    deadline, done = time.perf_counter() + args.seconds, []

    async def embed(client: openai.AsyncOpenAI, draw: random.Random) -> Done:
        texts, started = draw.sample(passages, draw.randint(1, 4)), time.perf_counter()
        response = await client.embeddings.create(model=model, input=texts)
        vectors = np.array([one.embedding for one in response.data])
        seconds = time.perf_counter() - started
        return Done(texts, 0, vectors, response.usage.prompt_tokens, seconds, seconds)

    async def chat(client: openai.AsyncOpenAI, draw: random.Random) -> Done:
        question, most, started = draw.choice(questions), draw.randint(16, 64), time.perf_counter()
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=most, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        pieces, first, tokens = [], 0.0, 0
        async for event in stream:
            first = first or time.perf_counter() - started
            pieces += [choice.delta.content or "" for choice in event.choices]
            tokens = event.usage.completion_tokens if event.usage else tokens
        return Done([question], most, "".join(pieces), tokens, first, time.perf_counter() - started)

    async def client_loop(number: int, client: openai.AsyncOpenAI) -> None:
        draw = random.Random(number)
        while time.perf_counter() < deadline:
            done.append(await (chat if number % 2 else embed)(client, draw))

    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(client_loop(number, client) for number in range(args.clients)))
    return done


def texts(data: Path, limit: int) -> tuple[list[str], list[str]]:
    """Passages and instructions that are not longer than `limit` characters."""
    passages = [record["pos"][0][1] for record in common.sample_records(data, "embedding", 2000)]
    questions = [record["text"][0] for record in common.sample_records(data, "generative", 2000)]
    return [text for text in passages if 0 < len(text) <= limit], [text for text in questions if len(text) <= limit]


def by_library(model: GritModel, done: Sequence[Done]) -> tuple[Iterator[np.ndarray], list[str]]:
    """The same results by the library: vectors of each embedding request, and the completions."""
    embedded, asked = [one for one in done if not one.max_tokens], [one for one in done if one.max_tokens]
    vectors = model.encode([text for one in embedded for text in one.texts])
    ends = itertools.accumulate(len(one.texts) for one in embedded)
    prompts = model.prompt_tokens([one.texts[0] for one in asked])
    continuations = [Continuation(tokens, one.max_tokens) for tokens, one in zip(prompts, asked, strict=True)]
    answers: list[str] = []
    for first in range(0, len(continuations), ROWS):
        some = continuations[first : first + ROWS]
        written = [""] * len(some)
        for pieces in model.write(some):
            written = [text + piece for text, piece in zip(written, pieces, strict=True)]
        answers += written
    return iter(np.split(vectors, list(ends))), answers


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--clients", type=int, default=64, help="how many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of load (%(default)s)")
    args = parser.parse_args()
    passages, questions = texts(args.data, 600)
    with common.model_folder(args.tokenizer) as folder:
        with Process(folder) as server:
            before, compiled = server.memory("VmRSS"), server.metric("compilations_total")
            started = time.perf_counter()
            done = asyncio.run(load(server.address, folder.name, passages, questions, args))
            seconds = time.perf_counter() - started
            after, peak = server.memory("VmRSS"), server.memory("VmHWM")
            compiled = server.metric("compilations_total") - compiled
            device = {work: server.metric(f'device_seconds_total{{work="{work}"}}') for work in ("embed", "write")}
            weights, caches = server.metric("weights_bytes") / 1e6, server.metric("cache_bytes") / 1e6
        model = GritModel.load(folder, dtype="float32")
        by_library(model, done)  # compiles
        started = time.perf_counter()
        vectors, answers = by_library(model, done)
        alone = time.perf_counter() - started
    embedded, asked = [one for one in done if not one.max_tokens], [one for one in done if one.max_tokens]
    wrong = sum(not np.allclose(one.result, expected, atol=1e-4) for one, expected in zip(embedded, vectors))
    different = sum(one.result != expected for one, expected in zip(asked, answers, strict=True))
    figures: dict[str, Any] = {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "library_seconds": round(alone, 1),
    }
    figures["overhead"] = round(seconds / alone - 1, 3)
    figures["device_seconds"] = {work: round(value, 1) for work, value in device.items()}
    for name, some in (("embeddings", embedded), ("answers", asked)):
        waits = np.array([one.seconds for one in some])
        figures[name] = {
            "requests": len(some),
            "tokens_per_second": round(sum(one.tokens for one in some) / seconds, 1),
            "p50_seconds": round(float(np.quantile(waits, 0.5)), 3),
            "p95_seconds": round(float(np.quantile(waits, 0.95)), 3),
        }
    firsts = np.array([one.first for one in asked])
    figures["answers"] |= {
        "p50_first_text_seconds": round(float(np.quantile(firsts, 0.5)), 3),
        "p95_first_text_seconds": round(float(np.quantile(firsts, 0.95)), 3),
    }
    figures |= {"wrong_embeddings": wrong, "different_answers": different, "programs_compiled_under_load": compiled}
    figures["megabytes"] = {
        "weights": round(weights, 1), "caches": round(caches, 1), "process_before": before, "process_after": after,
        "process_peak": peak,
    }  # fmt: skip
    common.report(figures)
    if wrong or different or compiled:
        raise SystemExit("the server did not answer as the library does, or compiled a program under load")


if __name__ == "__main__":
    main()
