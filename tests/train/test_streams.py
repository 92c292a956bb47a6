"""A third stream, defined here alone: plain texts whose logits are kept small."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import load_config
from grit_jax.data.batch import ONE_HOST, Array
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.records import Record, RecordError
from grit_jax.data.sources import find_files
from grit_jax.data.streams import all_streams
from grit_jax.data.streams.stream import Role, RowPlan, Stream
from grit_jax.datatools.stats import as_lines, measure
from grit_jax.datatools.validate import validate
from grit_jax.errors import InputError
from grit_jax.plan import outline
from grit_jax.plan.program import planned_config
from grit_jax.plan.topology import parse_topology
from grit_jax.plan.work import lengths_at_limits
from grit_jax.runs.logs import read_lines
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.loop import Trainer
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.objectives.objective import Losses, Objective, Parts
from tests.commands import ROOT, TINY, write_data

BYTES = Tokenizer.load("bytes")


@dataclasses.dataclass(frozen=True)
class PlainRecord(Record):
    name = "plain"
    keys = '"plain"'

    text: str

    @classmethod
    def reads(cls, row):
        return "plain" in row

    @classmethod
    def parse(cls, row):
        if not isinstance(row["plain"], str):
            raise RecordError('"plain" is no text', '"plain" is no text; it must be a string')
        return cls(row["plain"])

    def texts(self):
        return [self.text]


class PlainPlan(NamedTuple):
    rows: RowPlan
    weight: float


class PlainBatch(NamedTuple):
    per_row = ("tokens", "segment_ids", "positions", "weights")

    tokens: Array
    segment_ids: Array
    positions: Array
    weights: Array


class PlainStream(Stream):
    name = "plain"
    record = PlainRecord
    no_room = "nothing left"
    batch_size = 6
    row_length = 48
    num_chunks = 2

    def __init__(self):
        self.limits_by_key = {"plain_max_length": self.row_length}

    def prompts(self, record, tokenizer):
        return [prompts.plain(record.text, bos=tokenizer.bos)]

    def limits(self, text):
        return np.full(len(text), self.row_length, np.int32)

    def roles(self, text, positives):
        return [Role("text", np.ones(len(text), bool), self.row_length)]

    def plan(self, files, samples, ranks, *, summed):
        rows = files.rows(samples, np.zeros(len(samples.file), int))
        return PlainPlan(rows, 1.0 if summed else 1 / float(rows.length.sum()))

    def fill(self, plan, planned):
        tokens, segment_ids, positions, _ = planned.rows
        return PlainBatch(tokens, segment_ids, positions, np.where(segment_ids > 0, plan.weight, 0).astype(np.float32))

    def full_step(self):
        return np.full(self.batch_size, self.row_length)

    def empty(self, num_rows):
        ids, weights = (np.zeros((num_rows, self.row_length), dtype) for dtype in (np.int32, np.float32))
        return PlainBatch(ids, ids, ids, weights)


class SquaredLogits(Objective):
    """The mean squared logit of every token."""

    def __init__(self, weight=1.0):
        super().__init__(PlainStream())
        self.weight = weight

    def parts(self, model, kept, batch, dtype):
        squares = jnp.mean(jnp.square(model.logits(kept, model.output_weights(dtype))), axis=-1)
        return Parts((), jnp.sum(batch.weights * squares)[None])

    def losses(self, split, sums, batch):
        return Losses(sums)

    def total_weight(self, batch):
        return jnp.sum(batch.weights)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    rows = [
        {"plain": f"{word} {word} is plain"}
        for word in [letter * number for number, letter in enumerate("abcdefghi", 1)]
    ]
    (folder / "a-plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(data, output, *more):
    return load_config(
        ROOT / "configs/tiny.yaml",
        [*TINY, f"--data.train={data}", f"--data.validation={data}", f"--train.output={output}", *more],
    )


def three(settings, weight=1.0):
    return [*trained_objectives(settings), SquaredLogits(weight)]


def trained(settings, weight=1.0):
    """The metrics of a run of three streams."""
    trainer = Trainer(settings, streams=three(settings, weight))
    assert trainer.fit()
    return [
        {name: value for name, value in line.items() if name.startswith(("loss", "validation", "grad_norm"))}
        for line in read_lines(trainer.folder / "metrics.jsonl")
    ]


MESH = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return trained(config(data, tmp_path_factory.mktemp("runs") / "whole", "--train.steps=4", *MESH))


def test_it_trains_beside_the_two_on_eight_devices(whole):
    assert len(jax.devices()) == 8
    assert whole[-1].keys() >= {
        "loss/embedding", "loss/generative", "loss/plain", "validation/loss/plain", "validation/loss/embedding",
    }  # fmt: skip
    assert whole[-1]["loss/plain"] < whole[0]["loss/plain"]
    parts = whole[0]["loss/embedding"] + whole[0]["loss/generative"] + whole[0]["loss/plain"]
    assert np.isclose(whole[0]["loss"], parts, rtol=1e-6)


def test_it_resumes_bit_for_bit(data, whole, tmp_path):
    first = trained(config(data, tmp_path / "run", "--train.steps=2", *MESH))
    again = trained(config(data, tmp_path / "run", "--train.steps=4", *MESH))
    assert len(first) == 2
    for line, expected in zip(again, whole, strict=True):
        assert {name: value for name, value in line.items() if name.startswith("loss")} == {
            name: value for name, value in expected.items() if name.startswith("loss")
        }


@pytest.mark.long
def test_the_numbers_do_not_depend_on_the_mesh(data, whole, tmp_path):
    plain = trained(config(data, tmp_path / "run", "--train.steps=1", "--mesh.data=1", "--mesh.fsdp=8"))
    assert np.isclose(plain[0]["loss/plain"], whole[0]["loss/plain"], rtol=1e-5)


def test_the_other_streams_keep_their_batches_and_losses(data, tmp_path):
    """Bit for bit, though the third stream's file is the first of the folder."""
    settings = config(data, tmp_path / "two", "--train.steps=3")
    others = [str(data / name) for name in ("embedding.jsonl", "generative.jsonl")]
    alone = dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=others, validation=others))
    objectives = three(settings)
    streams = [objective.stream for objective in objectives]
    with_it = Pipeline(settings, BYTES, streams, host_share=ONE_HOST)
    without = Pipeline(alone, BYTES, streams[:2], host_share=ONE_HOST)
    for step in range(3):
        found, expected = with_it.batch(step), without.batch(step)
        assert found.keys() == {*expected, "plain"}
        for name in expected:
            assert all(map(np.array_equal, found[name], expected[name])), name
    assert with_it.fingerprint != without.fingerprint

    assert Trainer(alone).fit()
    expected = read_lines(tmp_path / "two/metrics.jsonl")
    found = trained(config(data, tmp_path / "three", "--train.steps=3"), weight=0.0)
    for line, other in zip(found, expected, strict=True):
        assert [line[f"loss/{name}"] for name in ("embedding", "generative")] == [
            other[f"loss/{name}"] for name in ("embedding", "generative")
        ]


def test_a_file_of_it_is_refused_where_nothing_reads_it(data, tmp_path):
    with pytest.raises(InputError, match=r'a-plain.jsonl:1: keys \["plain"\] belong to neither stream'):
        Trainer(config(data, tmp_path / "run"))


def test_its_texts_over_the_models_limit_are_refused(data, tmp_path):
    settings = config(data, tmp_path / "run", "--model.architecture.max_length=40", "--data.query_max_length=32",
                      "--data.passage_max_length=32", "--data.generative_max_length=32")  # fmt: skip
    with pytest.raises(InputError, match="plain_max_length=48 is over the model's 40 tokens"):
        Trainer(settings, streams=three(settings))


def test_it_is_planned():
    pytest.importorskip("libtpu", reason="libtpu, which knows the topologies of TPUs, is not installed")
    settings = planned_config(load_config(ROOT / "configs/tiny.yaml", ["--model.attention_kernel=dense"]))
    objectives = three(settings)
    lengths = lengths_at_limits([objective.stream for objective in objectives])
    found = outline.make_outline(settings, parse_topology("v5e-1"), lengths, streams=objectives)
    assert outline.as_json(found)["plain_rows"] == 6
    assert "6 plain rows" in "\n".join(outline.as_lines(found))


def test_the_data_tools_read_it(data):
    settings = load_config(ROOT / "configs/tiny.yaml", [*TINY, f"--data.train={data}"])
    streams = [*all_streams(settings), PlainStream()]
    stats = measure(settings, BYTES, streams)
    assert stats.total("text").texts == 9
    assert any("a-plain.jsonl" in line and " text " in line for line in as_lines(stats))
    report = validate(find_files(str(data)), streams=[type(stream) for stream in streams])
    assert [(file.stream, file.records) for file in report.files] == [
        ("plain", 9), ("embedding", 12), ("generative", 12)
    ]  # fmt: skip
