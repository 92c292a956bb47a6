"""What the recorder makes of steps, with steps that are made up."""

import dataclasses
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax import sharding
from grit_jax.batch import GritBatch
from grit_jax.config import Config, LoggingConfig, MeshConfig, ModelConfig, TrainConfig, TransformerConfig
from grit_jax.data.samples import FileSamples
from grit_jax.train import recorder as recorder_module
from grit_jax.train.health import GRAM
from grit_jax.train.recorder import Datasets, Recorder
from grit_jax.train.step import TOKEN_LOSSES
from grit_jax.watch.lines import read_lines

ARCHITECTURE = TransformerConfig(embed_dim=8, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=2).resolve(10)


class Collected:
    """A tracker and a display that keep what they are given."""

    def __init__(self):
        self.lines, self.said = {}, []

    def log(self, step, values):
        self.lines[step] = dict(values)

    def say(self, text):
        self.said.append(text)

    def step(self, step, values):
        pass


def batch(rows):
    stream = SimpleNamespace(tokens=np.zeros((rows, 4)))
    return GritBatch(stream, stream)


def metrics(generative=3.0, skipped=0.0):
    values = {
        "loss": 1.0 + generative, "loss/embedding": 1.0, "loss/generative": generative, "grad_norm": 0.5,
        "learning_rate": 0.1, "skipped": skipped, "tokens": 100, "tokens/generative": 50, "attention_pairs": 10,
    }  # fmt: skip
    return {name: jnp.asarray(value) for name, value in values.items()} | {
        GRAM: jnp.eye(4),
        TOKEN_LOSSES: jnp.ones((2, 1, 4)),
    }


@pytest.fixture
def run(tmp_path):
    """A function that records steps and gives what was collected; steps are made by a function of their number."""

    def record(
        make=lambda step: metrics(), steps=12, rows=lambda step: 2, start=0, prepare=None, seconds=0.0, **logging
    ):
        config = Config(
            model=ModelConfig(architecture=ARCHITECTURE),
            train=TrainConfig(max_skipped=3),
            logging=LoggingConfig(**logging),
        )
        data = Datasets(
            samples=lambda step: [FileSamples("embedding", "nli", "nli.jsonl", [step], [step + 1])],
            embedding=lambda step: ("nli", "quora")[step % 2],
            generative_losses=lambda step, losses: {"cot": float(losses.sum())},
        )
        collected = record.collected = Collected()
        mesh = sharding.make_mesh(MeshConfig())
        recorder = Recorder(
            config, mesh, tmp_path, data, [collected], collected, began=time.monotonic() - 5, start=start
        )
        with recorder:
            for step in range(start + 1, steps + 1):
                recorder.next_batch(iter([batch(rows(step))]))
                if prepare:
                    recorder.gradient_norms(prepare, batch(rows(step)))
                with recorder.step(batch(rows(step))):
                    time.sleep(seconds)
                recorder.add(make(step))
            recorder.log(recorder.read())
        return collected

    return record


def test_every_step_is_logged_once_with_its_own_numbers(run):
    collected = run(lambda step: metrics(generative=float(step)))
    assert list(collected.lines) == list(range(1, 13))
    assert all(line["loss/generative"] == step for step, line in collected.lines.items())
    # Batch `step` is number step - 1 of the schedule.
    assert [name for name in collected.lines[1] if name.startswith("loss/embedding/")] == ["loss/embedding/nli"]
    assert "loss/embedding/quora" in collected.lines[2]
    assert not {GRAM, TOKEN_LOSSES, "attention_pairs"} & collected.lines[10].keys()


def test_details_come_every_few_steps(run):
    collected = run(details_every=4)
    detailed = [step for step, line in collected.lines.items() if "embedding/effective_rank" in line]
    assert detailed == [1, 4, 8, 12]
    assert [step for step, line in collected.lines.items() if line.get("loss/generative/cot") == 8] == detailed
    assert not any("embedding/effective_rank" in line for line in run(details_every=None).lines.values())


def test_gradient_norms_belong_to_the_step_that_they_are_measured_for(run):
    seen = []

    def norm(part):
        seen.append((part, len(run.collected.lines)))
        return jnp.asarray(6.0 if part.generative is None else 2.0)

    collected = run(prepare=norm, gradient_ratio_every=5)
    assert [step for step, line in collected.lines.items() if "grad_norm/ratio" in line] == [5, 10]
    line = collected.lines[5]
    assert (line["grad_norm/embedding"], line["grad_norm/generative"], line["grad_norm/ratio"]) == (6, 2, 3)
    assert [(part.embedding is None, part.generative is None) for part, _ in seen] == [(False, True), (True, False)] * 2
    assert [logged for _, logged in seen] == [4, 4, 9, 9], "the step before is read first: its time is its own"


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


@pytest.mark.parametrize("data_seconds", [0.0, 0.2])
def test_every_step_has_its_own_seconds_and_no_others(tmp_path, monkeypatch, data_seconds):
    """Details, evaluation, saving, compiling and gradient norms are left out, and do not shorten other steps."""
    device, seconds = Device(), 1.5
    monkeypatch.setattr(recorder_module, "time", device)
    monkeypatch.setattr(jax, "block_until_ready", device.wait)
    monkeypatch.setattr(jax, "device_get", device.fetch)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: lambda result: device.run(result.value, 1e-4))
    monkeypatch.setattr(recorder_module, "peak_flops", lambda _: 1e6)

    def batches():
        for step in range(1, 31):
            device.now += data_seconds
            yield batch(2 if step < 9 else 4)

    def measured(part):
        device.now += 7.0
        return 1.0

    config = Config(
        model=ModelConfig(architecture=ARCHITECTURE), logging=LoggingConfig(details_every=10, gradient_ratio_every=6)
    )
    data = Datasets(lambda step: [], lambda step: None, lambda step, losses: {})
    collected, mesh, stream = Collected(), sharding.make_mesh(MeshConfig()), batches()
    with Recorder(config, mesh, tmp_path, data, [collected], collected, began=0.0, start=0) as recorder:
        for step in range(1, 31):
            given = recorder.next_batch(stream)
            recorder.gradient_norms(measured, given)
            began = device.now
            with recorder.step(given):
                device.now += 20.0 * (step in (1, 9))  # where the shapes are new
                results = {name: device.run(value, 0.0) for name, value in metrics().items()}
                done = device.run(0.0, seconds)
                results = {name: dataclasses.replace(result, ready=done.ready) for name, result in results.items()}
            recorder.add(results)
            if step % 7 == 0:
                values = recorder.read()
                assert recorder.step_began == pytest.approx(done.ready)
                with recorder.spent("evaluation", watched=False):
                    device.now += 30.0
                recorder.log(values)
            if step % 4 == 0:
                with recorder.spent("checkpoint"):
                    device.now += 5.0
                assert recorder.step_began == device.now > began
        if recorder._unread:
            recorder.log(recorder.read())
    assert list(collected.lines) == list(range(1, 31))
    for line in collected.lines.values():
        # A step begins a little late where its batch is waited for, or where the one before left something to gather.
        assert line["step_seconds"] == pytest.approx(seconds, abs=data_seconds + 1e-3)
        assert line["tokens_per_second"] == pytest.approx(100 / line["step_seconds"])
        assert line["mfu"] * line["step_seconds"] == pytest.approx(
            collected.lines[1]["mfu"] * collected.lines[1]["step_seconds"]
        )
    assert recorder.step_seconds == collected.lines[30]["step_seconds"]


def test_a_new_shape_is_a_compile_and_known_ones_are_useful_time(run, tmp_path):
    run(rows=lambda step: 2 + 2 * (step > 6), seconds=0.05)
    seconds = read_lines(tmp_path / "goodput.jsonl")[-1]["seconds"]
    assert 0.1 <= seconds["compile"] < 0.5 <= seconds["useful"], "two of twelve steps have a new shape"
    assert seconds["startup"] >= 5


def test_skipped_steps_are_counted_in_a_row(run, tmp_path):
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were skipped, up to step 8"):
        run(lambda step: metrics(skipped=float(step in (2, 3, 6, 7, 8)), generative=np.nan))
    bad = read_lines(tmp_path / "bad_batches.jsonl")
    assert [line["step"] for line in bad] == [2, 3, 6, 7, 8]
    assert bad[0]["samples"] == [
        {"stream": "embedding", "dataset": "nli", "file": "nli.jsonl", "records": [1], "lines": [2]}
    ]
    assert read_lines(tmp_path / "goodput.jsonl")[-1]["seconds"]["skipped"] > 0


def test_an_update_that_alone_is_not_finite_is_named(run, tmp_path):
    run(lambda step: metrics(skipped=float(step == 2)))
    (bad,) = read_lines(tmp_path / "bad_batches.jsonl")
    assert bad["text"].endswith("norm 0.5, but the optimizer's update is not finite; the update is skipped")


def test_a_spike_is_said_and_written_down_and_stops_nothing(run, tmp_path):
    collected = run(lambda step: metrics(generative=30.0 if step == 25 else 3.0), steps=30)
    assert len(collected.lines) == 30
    (spike,) = read_lines(tmp_path / "bad_batches.jsonl")
    assert (spike["step"], spike["reason"], spike["loss/generative"]) == (25, "spike", 30.0)
    assert spike["samples"][0]["records"] == [24]
    assert any("step 25: loss/generative is 30" in text for text in collected.said)
    assert run(lambda step: metrics(generative=30.0 if step == 25 else 3.0), steps=30, spike_threshold=None).said == []


def test_goodput_adds_up_over_sessions_and_bad_batches_are_cut_back_with_the_metrics(run, tmp_path):
    run(lambda step: metrics(skipped=float(step in (3, 8))), steps=9)
    collected = run(lambda step: metrics(), steps=12, start=5)
    assert [line["step"] for line in read_lines(tmp_path / "bad_batches.jsonl")] == [3]
    sessions = {line["session"]: line for line in read_lines(tmp_path / "goodput.jsonl")}
    assert [line["from_step"] for line in sessions.values()] == [0, 5]
    assert 0 < collected.lines[12]["goodput"] < 0.5, "ten seconds were spent starting"
