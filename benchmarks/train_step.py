"""A unified training step: useful tokens per second here and in PyTorch.

    python benchmarks/train_step.py              # lengths of real texts
    python benchmarks/train_step.py --at-limits  # every text at its limit

32 queries, 64 passages and 8 conversations a step, at most 256, 512 and 512 tokens long, AdamW, float32. Each step's
queries are drawn from one of the largest files of --data, its conversations from all. PyTorch pads queries, passages
and conversations each to the longest of their batch. Both sides take the same texts through the same steps;
`loss_difference` is the largest relative difference of their losses. At the limits PyTorch recomputes layers in the
backward pass (activation checkpointing), because their activations alone take about 17 GB.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from grit_jax.checkpoints.opening import load_params, open_model
from grit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from grit_jax.data.batch import ONE_HOST, Batch, EmbeddingBatch, GenerativeBatch, max_segments
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.streams import trained_streams
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import execution
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.optimizer import learning_rate, make_optimizer
from grit_jax.train.state import TrainState, abstract_state, new_state, shardings_of
from grit_jax.train.step import JointObjective, make_train_step

QUERIES, CONVERSATIONS, LIMIT = 32, 8, 512
Text = tuple[np.ndarray, np.ndarray]  # tokens, and the weight of each in pooling or in the loss


def write_data(folder: Path, source: Path, *, steps: int, at_limits: bool) -> None:
    """Writes the records of `steps` steps, with texts beyond the limits if `at_limits`.

    An embedding batch comes from one file, so each of the `steps` largest files gives one.
    """

    def lengthened(text: str) -> str:
        return f"{text} " * (1 + 8 * LIMIT // len(text)) if at_limits else text

    def embedding(record: dict[str, Any]) -> dict[str, Any]:
        query, positive, negative = (
            [instruction, lengthened(text)]
            for instruction, text in (record["query"], record["pos"][0], record["neg"][0])
        )
        return {"query": query, "pos": [positive], "neg": [negative]}

    def generative(record: dict[str, Any]) -> dict[str, Any]:
        *turns, last = record["text"]
        return {"text": [*turns, lengthened(last)]}

    largest = list(common.read_lines(source, "embedding").items())[:steps]
    files = {name: map(embedding, common.draw(lines, QUERIES)) for name, lines in largest}
    conversations = common.sample_records(source, "generative", CONVERSATIONS * steps)
    for name, records in (files | {"generative.jsonl": map(generative, conversations)}).items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def embedding_texts(batch: EmbeddingBatch) -> tuple[list[Text], list[Text]]:
    """The queries and the passages of a packed batch, in order."""

    def text(slot: int) -> Text:
        row, segment = divmod(int(slot), max_segments(batch.tokens.shape[1]))
        here = batch.segment_ids[row] == segment + 1
        return batch.tokens[row, here], batch.pool_weights[row, here]

    return [text(slot) for slot in batch.query_slots], [text(slot) for slot in batch.passage_slots]


def conversations(batch: GenerativeBatch) -> list[Text]:
    """The conversations of a packed batch; each weight is that of the next token."""
    places = [(row, segment) for row, ids in enumerate(batch.segment_ids) for segment in range(1, ids.max() + 1)]
    found = [(row, batch.segment_ids[row] == segment) for row, segment in places]
    return [(batch.tokens[row, here], batch.loss_weights[row, here]) for row, here in found]


def useful(batches: Iterable[Batch]) -> tuple[int, dict[str, float]]:
    """Real tokens of all batches, and their share of what each side computes for each stream."""
    real, ours, torch = Counter(), Counter(), Counter()
    for batch in batches:
        padded = {"embedding": embedding_texts(batch["embedding"]), "generative": (conversations(batch["generative"]),)}
        for stream, groups in padded.items():
            lengths = [[len(tokens) for tokens, _ in group] for group in groups]
            real[stream] += sum(map(sum, lengths))
            ours[stream] += batch[stream].tokens.size
            torch[stream] += sum(max(group) * len(group) for group in lengths)
    shares = {f"ours_useful_{stream}": round(count / ours[stream], 3) for stream, count in real.items()}
    return real.total(), shares | {f"torch_useful_{stream}": round(real[stream] / torch[stream], 3) for stream in real}


def ours(config: Config, pretrained: Pretrained, batches: list[Batch]) -> Callable[[], list[float]]:
    """A function that takes one step on every batch and gives their losses."""
    mesh = sharding.make_mesh(MeshConfig())
    model = abstract_model(pretrained.architecture)
    optimizer = make_optimizer(config.optimizer, config.train.steps, param_axes(model))
    placed = shardings_of(abstract_state(model, optimizer, mesh))
    rate = learning_rate(config.optimizer, config.train.steps)
    step = make_train_step(
        JointObjective(model, trained_objectives(config), execution(config.model, "cpu")), optimizer, rate, placed
    )
    with jax.set_mesh(mesh):
        params = load_params(pretrained, mesh)
        state: TrainState = jax.jit(new_state, static_argnums=1, out_shardings=placed)(params, optimizer)

    def run() -> list[float]:
        nonlocal state
        losses = []
        with jax.set_mesh(mesh):
            for batch in batches:
                state, metrics = step(state, sharding.place_batch(mesh, batch))
                losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    return run


def in_torch(model: Any, config: Config, batches: list[Batch], *, checkpointing: bool) -> Callable[[], list[float]]:
    """The same in PyTorch."""
    import torch
    from torch.nn import functional

    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (settings.b1, settings.b2), settings.epsilon,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip

    def padded(texts: Iterable[Text]) -> Iterator[Any]:
        parts = [[torch.from_numpy(part) for part in text] for text in texts]
        for which in range(2):
            yield torch.nn.utils.rnn.pad_sequence([text[which] for text in parts], batch_first=True)
        lengths = torch.tensor([len(tokens) for tokens, _ in parts])
        yield (torch.arange(int(lengths.max())) < lengths[:, None]).long()

    def vectors(texts: Iterable[Text]) -> Any:
        tokens, weights, mask = padded(texts)
        hidden = model.model(tokens, attention_mask=mask, is_causal=False, use_cache=False).last_hidden_state
        return functional.normalize((weights[:, None] @ hidden)[:, 0], dim=-1)

    def step(batch: Batch) -> float:
        queries, passages = map(vectors, embedding_texts(batch["embedding"]))
        scores = queries @ passages.T / config.loss.temperature
        embedding_loss = functional.cross_entropy(scores, torch.arange(QUERIES) * (len(passages) // QUERIES))
        embedding_loss.backward()  # frees its activations before those of the other stream are made
        tokens, weights, mask = padded(conversations(batch["generative"]))
        scored = functional.pad(weights, (1, 0))[:, :-1] > 0
        labels = torch.where(scored, tokens, -100).long()
        generative_loss = model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        generative_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return embedding_loss.item() + generative_loss.item()

    return lambda: [step(batch) for batch in batches]


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--at-limits", action="store_true", help="texts at their limits instead of real lengths")
    parser.add_argument("--steps", type=int, help="different batches (4, at the limits 1)")
    parser.add_argument("--remat", help="what our layers recompute (dots, at the limits full)")
    args = parser.parse_args()
    steps = args.steps or (1 if args.at_limits else 4)
    remat = args.remat or ("full" if args.at_limits else "dots")
    with common.model_folder(args.tokenizer) as folder, tempfile.TemporaryDirectory() as data:
        pretrained = open_model(folder)
        write_data(Path(data), args.data, steps=steps, at_limits=args.at_limits)
        config = Config(
            model=ModelConfig(architecture=pretrained.architecture, remat=remat),
            data=DataConfig(
                train=data, query_max_length=256, passage_max_length=LIMIT, generative_max_length=LIMIT,
                embedding_batch=QUERIES, generative_batch=CONVERSATIONS,
            ),
            optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
            train=TrainConfig(steps=steps),
        )  # fmt: skip
        pipeline = Pipeline(config, pretrained.tokenizer, trained_streams(config), host_share=ONE_HOST)
        batches = list(map(pipeline.batch, range(steps)))
        sides = {"ours": ours(config, pretrained, batches)}
        if not args.no_torch and common.has_torch():
            sides["torch"] = in_torch(common.load_torch(folder), config, batches, checkpointing=args.at_limits)
        seconds, losses = common.alternate(sides, args.repeats)
    tokens, shares = useful(batches)
    values = {"tokens_per_step": tokens / steps, **shares, **common.speeds(seconds, tokens)}
    if "torch" in sides:
        values["loss_difference"] = float(np.max(np.abs(np.divide(losses["ours"], losses["torch"]) - 1)))
    common.report(values)


if __name__ == "__main__":
    main()
