"""Which records a step takes, by file."""

import json

import numpy as np
import pytest

from grit_jax.data.pipeline import dataset_names, file_losses, file_samples
from grit_jax.data.streams.stream import RowPlan, Samples
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import build_index
from tests.data.test_schedule import embedding_index, generative_index, schedule


def test_samples_are_those_of_the_planned_step():
    embedding = embedding_index(20), embedding_index(13, "f.jsonl", seed=1)
    generative = generative_index(11), generative_index(5, "h.jsonl")
    plan = schedule(*embedding, *generative, mode="unified", embedding_batch=8, generative_batch=6)
    for k in range(6):
        planned = plan.step(k)
        for stream in ("embedding", "generative"):
            rows = planned[stream].rows
            expected = set(zip(rows.file.tolist(), rows.record.tolist(), strict=True))
            samples = plan.samples(k, stream)
            assert set(zip(samples.file.tolist(), samples.record.tolist(), strict=True)) == expected
        for mine, theirs in zip(plan.stream_plan(k, "generative").rows, planned["generative"].rows, strict=True):
            assert np.array_equal(mine, theirs)


def test_records_come_with_their_lines_blank_ones_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + "\n".join(json.dumps({"text": f"t {i}"}) + ("\n" if i == 1 else "") for i in range(4)))
    indexes = [None, build_index(path, Tokenizer.load("bytes"))]
    (found,) = file_samples("generative", Samples(np.array([1, 1]), np.array([3, 0])), indexes, "ab")
    assert found == ("generative", "b", str(path), [3, 0], [7, 3])


def test_records_after_malformed_ones_come_with_their_own_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", *(json.dumps({"text": f"t {i}"}) for i in range(2)), "[]", '{"text": "t 2"}']))
    index = build_index(path, Tokenizer.load("bytes"), skip_bad=True)
    (found,) = file_samples("generative", Samples(np.zeros(3, int), np.array([2, 0, 1])), [index], "a")
    assert (found.records, found.lines) == ([2, 0, 1], [5, 2, 3])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/medi/nli.jsonl", "/data/tulu/cot.jsonl.gz"], ["medi/nli", "tulu/cot"]),
        (["data/a.jsonl", "data/b.jsonl"], ["a", "b"]),
        (["gs://bucket/x/train.jsonl", "gs://bucket/y/train.jsonl"], ["x/train", "y/train"]),
        (["/data/a.jsonl", "/data/more/b.jsonl"], ["a", "more/b"]),
        (["one.jsonl"], ["one"]),
    ],
)
def test_files_have_short_names_that_tell_them_apart(paths, names):
    assert dataset_names(paths) == names


def test_a_files_loss_is_the_weighted_mean_of_its_tokens():
    numbers = {"file": [2, 0, 2], "record": [0, 0, 1], "text": [0, 0, 0], "length": [3, 2, 4]}
    numbers |= {"row": [0, 0, 1], "offset": [0, 3, 1], "segment": [1, 2, 1]}
    rows = RowPlan(2, **{name: np.array(values, np.int32) for name, values in numbers.items()})
    rng = np.random.default_rng(0)
    nll, weights = rng.random((2, 6)), rng.random((2, 6))
    found = file_losses(rows, np.stack([nll * weights, weights]), ["a", "b", "c"])
    of_a, of_c = ([(0, 3), (0, 4)], [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)])
    expected = {
        name: sum(nll[i] * weights[i] for i in places) / sum(weights[i] for i in places)
        for name, places in (("a", of_a), ("c", of_c))
    }
    assert found == pytest.approx(expected)
