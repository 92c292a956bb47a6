"""Greedy generation after prompts of 32 tokens: new tokens per second here and in PyTorch.

    python benchmarks/generate.py --batch 1
    python benchmarks/generate.py --batch 8

Prompts are the beginnings of passages of --data; no completion ends early; PyTorch uses `generate` with its default
cache. `same_answers` counts the prompts that both sides complete alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from grit_jax.inference.model import GritModel
from grit_jax.text.tokenizer import Tokenizer

PROMPT_TOKENS = 32


def prompts(data: Path, tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts that are `PROMPT_TOKENS` tokens long with the BOS before them."""
    found = []
    for record in common.sample_records(data, "embedding", 100 * count):
        text = tokenizer.decode(tokenizer.encode(tokenizer.bos + record["pos"][0][1]).ids[:PROMPT_TOKENS])
        if len(tokenizer.encode(tokenizer.bos + text).ids) == PROMPT_TOKENS:
            found.append(text)
    if len(found) < count:
        raise SystemExit(f"{data}: {len(found)} passages are {PROMPT_TOKENS} tokens long; {count} are needed")
    return found[:count]


def in_torch(model: Any, tokenizer: Tokenizer, texts: list[str], new_tokens: int) -> Callable[[], list[str]]:
    """A function that completes the prompts in PyTorch."""
    import torch

    model.eval()

    @torch.inference_mode()
    def run() -> list[str]:
        ids = torch.tensor(np.stack([tokenizer.encode(tokenizer.bos + text).ids for text in texts]))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
        answers = []
        for row in out.tolist():
            prompt = tokenizer.decode(row[:PROMPT_TOKENS])
            answers.append(tokenizer.decode(row)[len(prompt) :])
        return answers

    return run


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=1, help="prompts answered together (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    args = parser.parse_args()
    with common.model_folder(args.tokenizer) as folder:
        model = GritModel.load(folder, dtype="float32")
        texts = prompts(args.data, model.tokenizer, args.batch)
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda: model.generate(texts, max_new_tokens=args.new_tokens, raw=True)
        }
        if not args.no_torch and common.has_torch():
            sides["torch"] = in_torch(common.load_torch(folder), model.tokenizer, texts, args.new_tokens)
        seconds, answers = common.alternate(sides, args.repeats)
    values = {"batch": args.batch, **common.speeds(seconds, args.batch * args.new_tokens)}
    if "torch" in sides:
        values["same_answers"] = sum(map(str.__eq__, answers["ours"], answers["torch"]))
    common.report(values)


if __name__ == "__main__":
    main()
