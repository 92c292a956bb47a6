"""Embedding 512 real passages: useful tokens per second here and in PyTorch.

    python benchmarks/encode.py

Passages are drawn from the positives and negatives of all files of --data, tokenizing included. PyTorch sorts them by
length and pads each batch of --torch-batch to its longest. `vector_difference` is the largest difference between
numbers of both sides' unit vectors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from grit_jax.inference.model import GritModel
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

LIMIT = 512


def passages(data: Path, count: int) -> list[str]:
    """The distinct passages of `count` records."""
    records = common.sample_records(data, "embedding", count)
    draw = random.Random(0)
    return [draw.choice(record["pos"] + record["neg"])[1] for record in records]


def in_torch(model: Any, tokenizer: Tokenizer, texts: list[str], batch: int) -> Callable[[], np.ndarray]:
    """A function that embeds the texts in PyTorch."""
    import torch
    from torch.nn import functional
    from torch.nn.utils.rnn import pad_sequence

    model.eval()

    def vectors(tokenized: list[prompts.TokenizedPrompt]) -> Any:
        tokens = pad_sequence([torch.from_numpy(text.tokens[:LIMIT]) for text in tokenized], batch_first=True)
        starts, ends = (
            torch.tensor(values)[:, None]
            for values in ([text.spans[0, 0] for text in tokenized], [len(text.tokens[:LIMIT]) for text in tokenized])
        )
        places = torch.arange(tokens.shape[1])
        mask = (places < ends).long()
        hidden = model.model(tokens, attention_mask=mask, is_causal=False, use_cache=False).last_hidden_state
        pooled = ((places >= starts) & (places < ends)).float()
        return functional.normalize((pooled[:, None] @ hidden)[:, 0], dim=-1)

    @torch.inference_mode()
    def run() -> np.ndarray:
        tokenized = prompts.tokenize([prompts.embedding(text, bos=tokenizer.bos) for text in texts], tokenizer)
        order = np.argsort([len(text.tokens) for text in tokenized])
        result = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for members in np.split(order, range(batch, len(order), batch)):
            result[members] = vectors([tokenized[i] for i in members]).numpy()
        return result

    return run


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--texts", type=int, default=512, help="passages (%(default)s)")
    parser.add_argument("--torch-batch", type=int, default=32, help="texts of a batch in PyTorch (%(default)s)")
    args = parser.parse_args()
    texts = passages(args.data, args.texts)
    with common.model_folder(args.tokenizer) as folder:
        model = GritModel.load(folder, dtype="float32")
        sides: dict[str, Callable[[], np.ndarray]] = {"ours": lambda: model.encode(texts, max_length=LIMIT)}
        if not args.no_torch and common.has_torch():
            sides["torch"] = in_torch(common.load_torch(folder), model.tokenizer, texts, args.torch_batch)
        seconds, vectors = common.alternate(sides, args.repeats)
        tokens = model.encode_with_counts(texts, max_length=LIMIT).num_tokens
    values = {"texts": len(texts), "tokens": tokens, **common.speeds(seconds, tokens)}
    if "torch" in sides:
        values["vector_difference"] = float(np.max(np.abs(vectors["ours"] - vectors["torch"])))
    common.report(values)


if __name__ == "__main__":
    main()
