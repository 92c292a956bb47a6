import dataclasses

import jax
import numpy as np
import pytest

from grit_jax.config import TransformerConfig
from grit_jax.train import metrics as module
from grit_jax.train.callbacks.callback import Callback, Run
from grit_jax.train.callbacks.details import Details
from grit_jax.train.callbacks.gradient_norms import GradientNorms
from grit_jax.train.metrics import model_flops
from tests.train.callbacks import made_up


def test_flops_of_a_model_by_hand():
    # Per token 2 layers of 8*8 query, 2 of 8*4 key and value, 8*8 out, 3 of 8*16 MLP: 576 weights each.
    config = TransformerConfig(embed_dim=8, mlp_dim=16, num_layers=2, num_heads=2, num_kv_heads=1).resolve(10)
    flops = model_flops(config, tokens=3, tokens_through_head=1, attention_pairs=5)
    assert flops == 6 * (2 * (576 * 3 + 2 * 8 * 5) + 10 * 8)


class Device:
    """Runs programs one after the other, in a time that passes only where somebody waits."""

    def __init__(self):
        self.now = self._free = 0.0

    def monotonic(self):
        return self.now

    time = monotonic

    def run(self, value, seconds):
        """Starts a program; its result is there when those before it and its own seconds are over."""
        self._free = max(self.now, self._free) + seconds
        return Result(self, np.asarray(value), self._free)

    def wait(self, tree):
        for result in jax.tree.leaves(tree):
            self.now = max(self.now, result.ready)
        return tree

    def fetch(self, tree):
        return jax.tree.map(lambda result: result.value, self.wait(tree))


@dataclasses.dataclass
class Result:
    device: Device
    value: np.ndarray
    ready: float

    @property
    def ndim(self):
        return self.value.ndim

    def is_ready(self):
        return self.ready <= self.device.now


class Pauses(Callback):
    """Takes its time between steps: 30 seconds to evaluate every 7th, 5 to save every 4th."""

    def __init__(self, device):
        self.device = device

    def due(self, run, step):
        return step % 7 == 0 or step % 4 == 0

    def step_ended(self, run, step, values):
        for every, phase, seconds in ((7, "evaluation", 30.0), (4, "checkpoint", 5.0)):
            if step % every == 0:
                with run.aside(phase):
                    self.device.now += seconds
                assert run.meter.step_began == self.device.now


@pytest.mark.parametrize("data_seconds", [0.0, 0.2])
def test_every_step_has_its_own_seconds_and_no_others(tmp_path, monkeypatch, data_seconds):
    """Details, evaluation, saving, compiling and gradient norms are left out, and do not shorten other steps."""
    device, seconds = Device(), 1.5
    monkeypatch.setattr(module, "time", device)
    monkeypatch.setattr(jax, "block_until_ready", device.wait)
    monkeypatch.setattr(jax, "device_get", device.fetch)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: lambda result: device.run(result.value, 1e-4))
    monkeypatch.setattr(module, "peak_flops", lambda _: 1e6)

    def batches():
        for step in range(1, 31):
            device.now += data_seconds
            yield made_up.batch(2 if step < 9 else 4)

    def measured(trainable, frozen, part):
        device.now += 7.0
        return 1.0

    collected, stream = made_up.Collected(), batches()
    callbacks = [GradientNorms(6, measured), Details(10), Pauses(device), collected]
    trainer = made_up.trainer(tmp_path, callbacks, steps=30)
    run = Run(trainer, proceed=lambda: True, confirm=lambda: None)
    with run.watched():
        for step in range(1, 31):
            with run.computing(run.next_batch(stream)):
                device.now += 20.0 * (step in (1, 9))  # where the shapes are new
                results = {name: device.run(value, 0.0) for name, value in made_up.metrics().items()}
                done = device.run(0.0, seconds)
                results = {name: dataclasses.replace(result, ready=done.ready) for name, result in results.items()}
            run.started(results)
    assert list(collected.lines) == list(range(1, 31))
    for line in collected.lines.values():
        # A step begins a little late where its batch is waited for, or where the one before left something to gather.
        assert line["step_seconds"] == pytest.approx(seconds, abs=data_seconds + 1e-3)
        assert line["tokens_per_second"] == pytest.approx(100 / line["step_seconds"])
        assert line["mfu"] * line["step_seconds"] == pytest.approx(
            collected.lines[1]["mfu"] * collected.lines[1]["step_seconds"]
        )
    assert run.meter.step_seconds == collected.lines[30]["step_seconds"]
