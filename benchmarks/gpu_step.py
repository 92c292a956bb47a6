"""What one GPU does: numerics and time of the attention kernels, a training step here and in PyTorch, and a profile.

    python benchmarks/gpu_step.py                       # ten minutes on one H200
    python benchmarks/gpu_step.py --only numerics,step
    python benchmarks/gpu_step.py --toy                 # what a CPU can run of it, in small

Needs JAX, flax and optax, and PyTorch for its section, but neither grain nor jsonargparse. On a bare machine, from the
repository's root: `PYTHONPATH=$PWD python3 benchmarks/gpu_step.py`; the profile goes to the folder $OUT.

Each section is a process of its own, as JAX and PyTorch would fill the same memory, and ends after its share of the
ten minutes (with --toy, when it is done). Every result is one JSON line, printed at once; a section that fails says so
in a line, the others go on, and the exit code is 1. The model is as wide as Mistral 7B, with 8 layers: 1.75 billion
parameters and the tables. `limits` are rows of one text each, `tenth` as many rows of texts a tenth as long. Times are
medians.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gzip
import inspect
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config import Config, MeshConfig, ModelConfig, TransformerConfig
from grit_jax.data.batch import Batch
from grit_jax.data.packing import pack
from grit_jax.doctor.batches import embedding_batch, generative_batch


class Size(NamedTuple):
    """What is measured: the model, rows and length of both streams, the side of a square product, timed runs."""

    architecture: TransformerConfig
    embedding: tuple[int, int]
    generative: tuple[int, int]
    product: int
    repeats: int


def _architecture(**sizes: Any) -> TransformerConfig:
    return TransformerConfig(family="mistral", tie_embeddings=False, **sizes).resolve(sizes["vocab_size"])


FULL = Size(
    _architecture(
        vocab_size=32000, embed_dim=4096, mlp_dim=14336, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=128
    ),
    embedding=(48, 512), generative=(8, 2048), product=8192, repeats=7,
)  # fmt: skip
TOY = Size(
    _architecture(vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8),
    embedding=(3, 64), generative=(2, 64), product=64, repeats=1,
)  # fmt: skip
_BOUND = 2e-2  # of ||a - b|| / ||b||; bfloat16 rounds by 2**-9, and an offset that is wrong gives about 1
_RATE = 1e-5
_TEMPERATURE = 0.02


def say(section: str, **values: Any) -> None:
    """Prints one result."""
    print(json.dumps({"section": section, **values}), flush=True)


def texts_of(rows: int, length: int, *, tenth: bool, vocab: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """Random texts that fill about `rows` rows, three times as many as there are queries, and the texts of each row."""
    rng = np.random.default_rng(0)
    count = (10 * rows if tenth else rows) // 3 * 3 or 3
    lengths = np.full(count, length)
    if tenth:
        lengths = np.clip(rng.exponential(length / 10, count).astype(int), min(8, length), length)
    texts = [rng.integers(1, vocab, size).astype(np.int32) for size in lengths]
    packing = pack(lengths, row_length=length, max_segments=max(1, length // 8))
    order = np.argsort(packing.offset, kind="stable")
    return texts, [[int(i) for i in order if packing.row[i] == row] for row in range(packing.num_rows)]


def batch_of(size: Size, *, tenth: bool) -> tuple[Batch, dict[str, list[np.ndarray]]]:
    """A packed batch of both streams, and the texts in it; the first third of those to embed are queries."""
    vocab = size.architecture.vocab_size
    embedded, embedded_rows = texts_of(*size.embedding, tenth=tenth, vocab=vocab)
    written, written_rows = texts_of(*size.generative, tenth=tenth, vocab=vocab)
    batch: Batch = {
        "embedding": embedding_batch(embedded, embedded_rows, size.embedding[1], num_queries=len(embedded) // 3),
        "generative": generative_batch(written, written_rows, size.generative[1]),
    }
    return batch, {"embedding": embedded, "generative": written}


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of timed runs, each of which waits for its result, after two others."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _waited(run: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    """A call of a compiled JAX function that waits for its result."""
    import jax

    return lambda: jax.block_until_ready(run(*arrays))


def _kernels() -> tuple[str, ...]:
    """The attention kernels to compare, the reference first."""
    import jax

    return ("dense", "cudnn", "cudnn_packed") if jax.default_backend() == "gpu" else ("dense", "blockwise")


def _attention(size: Size, rows: int, length: int, *, tenth: bool) -> tuple[list[Any], Any, Any]:
    """Queries, keys, values and cotangents in bfloat16, segments and positions; the last row is padding."""
    import jax
    import jax.numpy as jnp

    texts, members = texts_of(rows, length, tenth=tenth, vocab=2)
    batch = generative_batch(texts, [*members, []], length)
    heads, kv_heads = size.architecture.num_heads, size.architecture.num_kv_heads
    arrays = [
        jax.random.normal(key, (*batch.tokens.shape, count, size.architecture.head_dim), jnp.bfloat16)
        for key, count in zip(jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads), strict=True)
    ]
    return arrays, jnp.asarray(batch.segment_ids), jnp.asarray(batch.positions)


def _passes(kernel: str, segments: Any, positions: Any, dtype: str, *, causal: bool) -> tuple[Callable, Callable]:
    """Compiled attention, and attention with gradients, of queries, keys, values and cotangents."""
    import jax
    import jax.numpy as jnp

    from grit_jax.model.attention import AttentionMask, attention
    from grit_jax.parallel.execution import Execution

    mask = AttentionMask.of_rows(segments, positions, causal=causal, window=None)
    execution = Execution(jnp.dtype(dtype), attention=kernel)  # ty: ignore[invalid-argument-type]

    def forward(query, key, value):
        out = attention(query, key, value, mask, scale=query.shape[-1] ** -0.5, soft_cap=None, execution=execution)
        return jnp.where((segments > 0)[..., None, None], out, 0)

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(forward, query, key, value)
        return out, *pull(cotangent)

    return jax.jit(lambda query, key, value, _: forward(query, key, value)), jax.jit(both)


def numerics(size: Size) -> None:
    """Attention and its gradients in bfloat16 beside the dense ones in float32."""
    import jax
    import jax.numpy as jnp

    failed = []
    for (_, length), causal in ((size.embedding, False), (size.generative, True)):
        arrays, segments, positions = _attention(size, 3, length, tenth=True)
        with jax.default_matmul_precision("highest"):
            reference = _passes("dense", segments, positions, "float32", causal=causal)[1]
            expected = reference(*(x.astype(jnp.float32) for x in arrays))
        for kernel in _kernels():
            actual = _passes(kernel, segments, positions, "bfloat16", causal=causal)[1](*arrays)
            errors = {
                name: float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
                for name, x, y in zip(("out", "query", "key", "value"), actual, expected, strict=True)
            }
            passed = all(error < _BOUND for error in errors.values())  # NaN is not
            failed += [] if passed else [f"{kernel}, causal={causal}"]
            say("numerics", kernel=kernel, causal=causal, length=length, bound=_BOUND, passed=passed,
                errors={name: float(f"{error:.3g}") for name, error in errors.items()})  # fmt: skip
    if failed:
        raise ArithmeticError(f"errors of {_BOUND} and more: {'; '.join(failed)}")


def matmul(size: Size) -> None:
    """The rate of matrix products in bfloat16, which bounds that of a step."""
    import jax
    import jax.numpy as jnp

    side, tokens = size.product, 2 * size.product
    for shape in ((side, side, side), (tokens, size.architecture.embed_dim, size.architecture.mlp_dim)):
        left, right = (
            jax.random.normal(key, dims, jnp.bfloat16)
            for key, dims in zip(jax.random.split(jax.random.key(0)), (shape[:2], shape[1:]), strict=True)
        )
        product = jax.jit(jnp.matmul)
        seconds = median_seconds(_waited(product, left, right), 3 * size.repeats)
        say("matmul", shape=shape, tflops=round(2 * np.prod(shape) / seconds / 1e12, 3))


def attention_alone(size: Size) -> None:
    """Milliseconds of one layer's attention, forward, and forward and backward."""
    for tenth, ((rows, length), causal) in itertools.product(
        (True, False), ((size.embedding, False), (size.generative, True))
    ):
        arrays, segments, positions = _attention(size, rows, length, tenth=tenth)
        for kernel in _kernels()[1:]:
            passes = _passes(kernel, segments, positions, "bfloat16", causal=causal)
            forward, both = (median_seconds(_waited(run, *arrays), 3 * size.repeats) for run in passes)
            say("attention", kernel=kernel, causal=causal, rows=len(segments), length=length,
                texts="tenth" if tenth else "limits", forward_ms=round(1e3 * forward, 3),
                forward_backward_ms=round(1e3 * both, 3))  # fmt: skip


def _jax_step(size: Size, kernel: str, *, tenth: bool) -> Callable[[], dict[str, Any]]:
    """A function that takes one step and gives its metrics, waited for."""
    import jax

    from grit_jax.model.transformer import abstract_model, init_params, param_axes
    from grit_jax.parallel import sharding
    from grit_jax.parallel.execution import execution
    from grit_jax.train.objectives import trained_objectives
    from grit_jax.train.optimizer import learning_rate, make_optimizer
    from grit_jax.train.state import abstract_state, new_state, shardings_of
    from grit_jax.train.step import JointObjective, make_train_step

    settings = ModelConfig(
        architecture=size.architecture,
        compute_dtype="bfloat16",
        attention_kernel=kernel,  # ty: ignore[invalid-argument-type]
        remat="dots",
    )
    config = Config(model=settings)
    mesh = sharding.make_mesh(MeshConfig())
    model = abstract_model(size.architecture)
    optimizer = make_optimizer(config.optimizer, config.train.steps, param_axes(model))
    placed = shardings_of(abstract_state(model, optimizer, mesh))
    objective = JointObjective(model, trained_objectives(config), execution(settings, sharding.platform(mesh)))
    step = make_train_step(objective, optimizer, learning_rate(config.optimizer, config.train.steps), placed)
    batch, _ = batch_of(size, tenth=tenth)
    with jax.set_mesh(mesh):
        state = jax.jit(
            lambda key: new_state(init_params(size.architecture, key), optimizer), out_shardings=placed
        )(jax.random.key(0))  # fmt: skip
        on_mesh = sharding.place_batch(mesh, batch)

    def run() -> dict[str, Any]:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, on_mesh)
        return jax.block_until_ready(metrics)

    return run


def _say_step(section: str, size: Size, seconds: float, work: dict[str, float], device: str, **values: Any) -> None:
    from grit_jax.parallel.chips import peak_flops
    from grit_jax.train.metrics import model_flops

    flops, peak = model_flops(size.architecture, **work), peak_flops(device)
    say(section, **values, seconds=round(seconds, 4), tokens_per_second=round(work["tokens"] / seconds, 1),
        tflops=round(flops / seconds / 1e12, 3), mfu=round(flops / seconds / peak, 4) if peak else None)  # fmt: skip


def _each(section: str, variants: Iterator[dict[str, Any]], run: Callable[..., None]) -> None:
    """Runs all variants; those that fail say so, and fail the section at its end."""
    failed = 0
    for variant in variants:
        try:
            run(**variant)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            say(section, **variant, error=f"{type(error).__name__}: {error}"[:500])
    if failed:
        raise RuntimeError(f"{failed} variants failed")


def step(size: Size) -> None:
    """A training step of both streams."""
    import jax

    def run(kernel: str, texts: str) -> None:
        take = _jax_step(size, kernel, tenth=texts == "tenth")
        metrics = take()
        seconds = median_seconds(take, size.repeats)
        work = {name: float(metrics[name]) for name in ("tokens", "tokens_through_head", "attention_pairs")}
        _say_step("step", size, seconds, work, jax.devices()[0].device_kind, kernel=kernel, texts=texts,
                  loss=float(metrics["loss"]), skipped=float(metrics["skipped"]))  # fmt: skip

    _each("step", ({"texts": t, "kernel": k} for k in _kernels()[1:] for t in ("tenth", "limits")), run)


def profile(size: Size) -> None:
    """A profile of two steps, and the operations that take longest."""
    import jax

    take = _jax_step(size, _kernels()[-1], tenth=True)
    take()
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take()
            take()
        traces = list(Path(folder).rglob("*.trace.json.gz"))
        for file in [*traces, *Path(folder).rglob("*.xplane.pb")]:
            shutil.copy(file, out / f"profile{''.join(file.suffixes[-3:])}")
        with gzip.open(traces[0], "rt") as file:
            events = json.load(file)["traceEvents"]
    busy = _busiest(events)
    say("profile", folder=str(out), milliseconds=dict(busy.most_common(25)), sum_milliseconds=round(busy.total(), 3))


def _busiest(events: list[dict[str, Any]]) -> collections.Counter[str]:
    """Milliseconds by operation: on a GPU of its streams, elsewhere of all threads."""
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    streams = {thread for thread, name in names.items() if name.startswith("Stream")}
    busy = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (not streams or (event["pid"], event.get("tid")) in streams):
            busy[event["name"][:80]] += event.get("dur", 0) / 1e3
    return collections.Counter({name: round(value, 3) for name, value in busy.items()})


def _torch_model(size: Size, device: str) -> Any:
    """The same architecture; a call takes what attends: [..., tokens, heads, width], keys and queries rotated."""
    import torch
    from torch import nn
    from torch.nn import functional

    a = size.architecture
    widths = {"query": a.num_heads, "key": a.num_kv_heads, "value": a.num_kv_heads}

    def rotated(x, positions):
        rates = a.rope_theta ** (-torch.arange(0, a.head_dim, 2, device=x.device) / a.head_dim)
        angles = (positions[..., None] * rates)[..., None, :]
        first, second = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    class Norm(nn.RMSNorm):
        def forward(self, x):  # by its fused kernel, which takes weights of the input's type only
            return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name, heads in widths.items():
                setattr(self, name, nn.Linear(a.embed_dim, heads * a.head_dim, bias=False))
            self.out = nn.Linear(a.num_heads * a.head_dim, a.embed_dim, bias=False)
            self.gate, self.up = (nn.Linear(a.embed_dim, a.mlp_dim, bias=False) for _ in range(2))
            self.down = nn.Linear(a.mlp_dim, a.embed_dim, bias=False)
            self.norms = nn.ModuleList([Norm(a.embed_dim, eps=a.norm_epsilon) for _ in range(2)])

        def forward(self, x, positions, attend):
            y = self.norms[0](x)
            query, key, value = (getattr(self, name)(y).unflatten(-1, (-1, a.head_dim)) for name in widths)
            x = x + self.out(attend(rotated(query, positions), rotated(key, positions), value).flatten(-2))
            y = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(a.vocab_size, a.embed_dim)
            self.layers = nn.ModuleList([Layer() for _ in range(a.num_layers)])
            self.norm = Norm(a.embed_dim, eps=a.norm_epsilon)
            self.head = nn.Linear(a.embed_dim, a.vocab_size, bias=False)

        def forward(self, tokens, positions, attend):
            x = self.table(tokens).to(torch.bfloat16)
            for layer in self.layers:
                x = layer(x, positions, attend)
            return self.norm(x)

    with torch.device(device):
        return Model()


def _packed_attention(lengths: Any, *, causal: bool) -> Callable[..., Any]:
    """PyTorch's attention of texts laid end to end."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    longest, known = int(lengths.max()), inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": causal}
    if "is_causal" not in known:
        options = {"window_size": (-1, 0) if causal else (-1, -1)}

    def attend(query, key, value):
        group = query.shape[1] // key.shape[1]
        grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
        if not grouped:
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        return varlen_attn(query, key, value, ends, ends, longest, longest, **options, **grouped)

    return attend


def _padded_attention(lengths: Any, *, causal: bool) -> Callable[..., Any]:
    """PyTorch's attention of texts padded to the longest; without padding it reads no mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    longest = int(lengths.max())
    mask = None
    if not causal and int(lengths.min()) < longest:  # a causal token sees no padding, which comes after it
        mask = (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None]

    def attend(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def _torch_step(size: Size, device: str, model: Any, texts: dict[str, list[np.ndarray]], *, packed: bool) -> Callable:
    """A function that takes one step, with the same losses as ours, and gives them, waited for."""
    import torch
    from torch.nn import functional
    from torch.nn.utils.rnn import pad_sequence

    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.0, fused=device == "cuda")

    def inputs(group: list[np.ndarray], *, causal: bool) -> tuple[Any, ...]:
        parts = [torch.from_numpy(text).long().to(device) for text in group]
        lengths = torch.tensor([len(part) for part in parts], device=device)
        places = [torch.arange(len(part), device=device) for part in parts]
        join = torch.cat if packed else functools.partial(pad_sequence, batch_first=True)
        attend = (_packed_attention if packed else _padded_attention)(lengths, causal=causal)
        text = [torch.full_like(part, number) for number, part in enumerate(parts)]
        owner = torch.cat(text) if packed else pad_sequence(text, batch_first=True, padding_value=-1)
        return join(parts), join(places), attend, owner, lengths

    queries = len(texts["embedding"]) // 3
    groups = [
        inputs(group, causal=False) for group in (texts["embedding"][:queries], texts["embedding"][queries:])
    ]  # fmt: skip
    written = inputs(texts["generative"], causal=True)

    def vectors(group: tuple[Any, ...]) -> Any:
        tokens, positions, attend, owner, lengths = group
        hidden, real = model(tokens, positions, attend).float(), owner >= 0
        sums = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, owner[real], hidden[real])
        return functional.normalize(sums, dim=-1)

    def run() -> list[float]:
        with torch.autocast(device, torch.bfloat16):
            query, passage = map(vectors, groups)
        scores = query @ passage.T / _TEMPERATURE
        embedding = functional.cross_entropy(scores, 2 * torch.arange(queries, device=device))
        embedding.backward()  # frees its activations before the other stream's are made
        tokens, positions, attend, owner, _ = written
        scored = (owner[..., :-1] == owner[..., 1:]) & (owner[..., 1:] >= 0)
        with torch.autocast(device, torch.bfloat16):
            logits = model.head(model(tokens, positions, attend)[..., :-1, :][scored])
        generative = functional.cross_entropy(logits.float(), tokens[..., 1:][scored])
        generative.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [embedding.item(), generative.item()]

    return run


def in_torch(size: Size) -> None:
    """The step in PyTorch: texts padded, with sdpa, or laid end to end; with and without `torch.compile`."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    name = torch.cuda.get_device_name() if on_gpu else "cpu"

    def run(texts: str, packed: bool, compiled: bool) -> None:
        torch._dynamo.reset()
        model = _torch_model(size, device)
        if compiled:
            for layer in model.layers:
                layer.compile(dynamic=False)
        _, groups = batch_of(size, tenth=texts == "tenth")
        lengths = {stream: np.array([len(text) for text in group], float) for stream, group in groups.items()}
        take = _torch_step(size, device, model, groups, packed=packed)
        losses = take()
        seconds = median_seconds(take, size.repeats)
        written, embedded = lengths["generative"], lengths["embedding"]
        work = {
            "tokens": float(written.sum() + embedded.sum()),
            "tokens_through_head": float(written.sum()),
            "attention_pairs": float((written * (written + 1) / 2).sum() + (embedded**2).sum()),
        }
        gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        _say_step("torch", size, seconds, work, name, texts=texts, packed=packed, compiled=compiled,
                  losses=losses, peak_gib=round(gib, 1))  # fmt: skip

    # Nothing is padded at the limits. Varying lengths padded or not, and compilation of the faster form.
    cases = [("tenth", True, False), ("limits", False, False), ("tenth", False, False), ("tenth", True, True),
             ("limits", False, True)]  # fmt: skip
    here = [case for case in cases if on_gpu or not (case[1] or case[2])]  # flash attention of texts needs a GPU
    keys = ("texts", "packed", "compiled")
    _each("torch", (dict(zip(keys, case, strict=True)) for case in here), run)


# Each with its seconds.
SECTIONS: dict[str, tuple[Callable[[Size], None], int]] = {
    "numerics": (numerics, 70),
    "matmul": (matmul, 25),
    "attention": (attention_alone, 70),
    "step": (step, 190),
    "torch": (in_torch, 150),
    "profile": (profile, 70),
}


def main() -> None:
    """Runs the sections, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--here", action="store_true", help="run in this process, without a time limit")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only={args.only}: no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if args.here:
        for name in names:
            SECTIONS[name][0](TOY if args.toy else FULL)
        return
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        # The profile's program is that of a step before it.
        environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        for name in names:
            command = [sys.executable, __file__, "--here", "--only", name, *(["--toy"] if args.toy else [])]
            limit = None if args.toy else SECTIONS[name][1]
            began, error = time.monotonic(), None
            try:
                code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
                error = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                error = f"not done after {limit} s"
            failed |= error is not None
            say(name, done=error is None, error=error, wall_seconds=round(time.monotonic() - began, 1))
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
