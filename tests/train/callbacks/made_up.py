"""Runs whose steps are made up, for what callbacks make of them."""

import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from grit_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, TransformerConfig
from grit_jax.data.pipeline import FileSamples
from grit_jax.parallel import sharding
from grit_jax.train.callbacks.callback import Callback, Run
from grit_jax.train.health import GRAM
from grit_jax.train.step import TOKEN_LOSSES

STREAMS = ["embedding", "generative"]
ARCHITECTURE = TransformerConfig(embed_dim=8, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=2).resolve(10)


class Collected(Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.lines, self.said_lines = {}, []

    def step_ended(self, run, step, values):
        self.lines[step] = dict(values)

    def said(self, run, text):
        self.said_lines.append(text)


def batch(rows):
    return {name: {"tokens": np.zeros((rows, 4))} for name in STREAMS}


def metrics(generative=3.0, skipped=0.0):
    values = {
        "loss": 1.0 + generative, "loss/embedding": 1.0, "loss/generative": generative, "grad_norm": 0.5,
        "learning_rate": 0.1, "skipped": skipped, "tokens": 100, "tokens_through_head": 50, "attention_pairs": 10,
    }  # fmt: skip
    return {name: jnp.asarray(value) for name, value in values.items()} | {
        GRAM: jnp.eye(4),
        f"{TOKEN_LOSSES}generative": jnp.ones((2, 1, 4)),
    }


def trainer(folder, callbacks, *, start=0, steps=12):
    """What a run asks of its trainer; records of step k (from 0) are number k, of files that alternate."""

    def losses_by_file(step, losses, of_tokens):
        cot = {f"{name}/cot": float(each.sum()) for name, each in of_tokens.items()}
        return {f"embedding/{('nli', 'quora')[step % 2]}": losses["embedding"]} | cot

    data = SimpleNamespace(
        samples=lambda step: [FileSamples("embedding", "nli", "nli.jsonl", [step], [step + 1])],
        losses_by_file=losses_by_file,
    )
    config = Config(model=ModelConfig(architecture=ARCHITECTURE), train=TrainConfig(steps=steps))
    return SimpleNamespace(
        config=config, folder=folder, mesh=sharding.make_mesh(MeshConfig()), data=data, step=start,
        state=SimpleNamespace(trainable=None, frozen=None), callbacks=callbacks, streams=STREAMS,
    )  # fmt: skip


def run(folder, *callbacks, make=lambda step: metrics(), rows=lambda step: 2, start=0, steps=12, seconds=0.0):
    """Does steps, each made by a function of its number, and gives what was handed out after the callbacks had it."""
    collected = Collected()
    told = Run(
        trainer(folder, [*callbacks, collected], start=start, steps=steps), proceed=lambda: True, confirm=lambda: None
    )
    with told.watched():
        for step in range(start + 1, steps + 1):
            given = told.next_batch(iter([batch(rows(step))]))
            with told.computing(given):
                time.sleep(seconds)
            told.started(make(step))
    return collected
