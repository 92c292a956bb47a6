import json

import matplotlib.image
import numpy as np
import pytest

from grit_jax.cli.main import main
from grit_jax.config import Config, DataConfig
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams import STREAMS
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.datatools.stats import measure
from grit_jax.text.tokenizer import Tokenizer
from tests.commands import write_data

BYTES = Tokenizer.load("bytes")


@pytest.fixture
def folder(tmp_path):
    folder = write_data(tmp_path / "data")
    rows = [{"query": "q" * n, "pos": ["p" * 3 * n, "p"], "neg": ["n" * n]} for n in range(1, 40)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_figures_are_those_of_the_tokenized_texts(folder):
    stats = measure(Config(data=DataConfig(train=[str(folder)], query_max_length=30, passage_max_length=64)), BYTES)
    for file in stats.files:
        (path,) = [path for path in find_files(str(folder)) if path.name == file.name]
        lengths = {}
        for record, texts in zip(
            open_source(path),
            tokenize_records(list(open_source(path)), STREAMS[file.stream].prompts, BYTES),
            strict=True,
        ):
            for number, text in enumerate(texts):
                if file.stream == "generative":
                    kind = "conversation"
                else:
                    kind = "query" if not number else "positive" if number <= len(record.positives) else "negative"
                lengths.setdefault(kind, []).append(len(text.tokens))
        assert file.lengths.keys() == lengths.keys()
        for kind, expected in lengths.items():
            found = file.lengths[kind]
            assert (found.texts, found.tokens, found.longest) == (len(expected), sum(expected), max(expected))
            assert found.percentile(50) == np.quantile(expected, 0.5, method="inverted_cdf")
            assert found.cut == sum(length > found.limit for length in expected)
    assert stats.total("query").texts == 12 + 39


def test_the_fill_is_that_of_the_batches(folder):
    data = DataConfig(
        train=[str(folder)], query_max_length=64, passage_max_length=64, generative_max_length=64, embedding_batch=8,
        generative_batch=6,
    )  # fmt: skip
    fills = measure(Config(data=data), BYTES).fills
    for fill in fills.values():
        assert fill.unpacked <= fill.packed <= 1
        assert fill.row_length == 64
    assert fills["embedding"].unpacked < fills["embedding"].packed
    assert fills["generative"].texts == 6


def test_limits_that_leave_nothing_are_explained(folder):
    stats = measure(Config(data=DataConfig(train=[str(folder)], generative_max_length=16)), BYTES)
    assert not stats.fills
    assert "prompt leaves no room for a completion" in stats.notes[0]
    assert stats.total("conversation").cut == 12


def test_the_command_prints_a_table_and_draws(folder, tmp_path, capsys):
    arguments = ["data", "stats", str(folder), "--data.generative_max_length=64", "--plot", str(tmp_path / "s.png")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "more.jsonl" in out
    assert "all files" in out
    assert "are not padding" in out
    picture = matplotlib.image.imread(tmp_path / "s.png")
    assert picture.shape[1] > 1000
    assert 0.02 < np.mean(picture[..., :3].min(-1) < 0.9) < 0.6  # something is drawn, most is paper
