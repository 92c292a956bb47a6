import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.cli.main import main
from grit_jax.data.records import EmbeddingText
from grit_jax.data.sources import open_source
from grit_jax.datatools.negatives import KeywordSearcher, Mining, Passages, choose, mine
from grit_jax.errors import InputError
from grit_jax.retrieval.exact_search import Searchable

ROWS = [
    {"query": ["find", "red apple fruit"], "pos": [["", "an apple is a red fruit"]], "neg": [["", "stones are hard"]]},
    {"query": ["find", "red apple fruit"], "pos": [["", "red apple fruit of a tree"]], "neg": []},
    {"query": ["find", "green pear"], "pos": [["", "a pear is a green fruit"]], "neg": [["", "green pear"]]},
    {"query": ["find", "red car"], "pos": [["", "a red car drives fast on the road"]], "neg": [["", "a red road"]]},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def mined(path, mining, **options):
    source = open_source(path)
    passages = Passages(source, **options)
    return [row for _, row in mine(source, passages, KeywordSearcher(passages), mining)]


def test_negatives_are_never_the_query_nor_a_positive_of_an_equal_query(path):
    rows = mined(path, Mining(count=3, ceiling=None))
    assert [row["query"] for row in rows] == [row["query"] for row in ROWS]
    assert [row["pos"] for row in rows] == [row["pos"] for row in ROWS]
    for row, forbidden in zip(rows, (ROWS[0]["pos"] + ROWS[1]["pos"],) * 2 + (ROWS[2]["pos"] + [["", "green pear"]],)):
        assert not [text for text in row["neg"] if text in forbidden]


def test_a_passage_without_a_word_of_the_query_is_no_hard_negative(path):
    rows = mined(path, Mining(count=7, ceiling=None))
    assert sorted(text for _, text in rows[0]["neg"]) == [
        "a pear is a green fruit",
        "a red car drives fast on the road",
        "a red road",
    ]
    assert not any("stones are hard" in text for row in rows for text in row["neg"])


def test_the_same_call_gives_the_same_rows(path):
    for mining in (Mining(count=2), Mining(count=2, ceiling=None, draw=True, seed=3)):
        assert mined(path, mining) == mined(path, mining)


def test_own_negatives_are_replaced_or_kept(path):
    assert ["", "stones are hard"] in mined(path, Mining(count=1, ceiling=None, keep=True))[0]["neg"]
    kept = mined(path, Mining(count=2, ceiling=None, keep=True))[0]["neg"]
    assert len(kept) == 3
    assert len({tuple(text) for text in kept}) == 3


def test_a_corpus_adds_passages(path, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "1", "title": "Red apple", "text": "fruit salad"}\n')
    assert ["", "Red apple fruit salad"] in mined(path, Mining(count=1, ceiling=None), corpus=corpus)[0]["neg"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=2, max_size=30), st.data(), st.integers(1, 5), st.integers(1, 6),
    st.integers(0, 12), st.none() | st.sampled_from([0.5, 0.95, 1.0]), st.booleans(),
)  # fmt: skip
def test_choices_are_those_of_sorting_everything(scores, data, count, first, more, ceiling, draw):
    scores = np.array(scores, np.float32)
    own = [data.draw(st.integers(0, len(scores) - 1))]
    excluded = {*own, *data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=3))}
    mining = Mining(count, first, first + more, ceiling, draw)
    chosen, above = choose(scores, mining, own=own, excluded=excluded, number=3)
    positive = float(scores[own[0]])
    limit = np.inf if ceiling is None else positive - abs(positive) * (1 - ceiling)
    allowed = [i for i in range(len(scores)) if i not in excluded and scores[i] <= limit]
    ranked = sorted(allowed, key=lambda i: (-scores[i], i))[first - 1 : first + more]
    assert above == len([i for i in range(len(scores)) if i not in excluded]) - len(allowed)
    if draw:
        assert len(chosen) == min(count, len(ranked))
        assert chosen == [i for i in ranked if i in set(chosen)]
    else:
        assert chosen == ranked[:count]


def test_scores_of_devices_are_those_of_numpy():
    rng = np.random.default_rng(0)
    passages, queries = (rng.standard_normal((size, 16)).astype(np.float32) for size in (37, 5))
    assert np.allclose(Searchable(passages).scores(queries), queries @ passages.T, atol=1e-5)


def test_a_model_mines_what_it_ranks_high(path):
    from grit_jax.datatools.negatives import ModelSearcher

    class Letters:
        """Counts of letters, of unit length."""

        def encode(self, texts, *, instruction, max_length):
            counts = np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    source = open_source(path)
    passages = Passages(source)
    searcher = ModelSearcher(Letters(), passages, max_lengths=(8, 8))  # ty: ignore
    query = EmbeddingText("find", "green pear")
    best = int(np.argmax(searcher.scores([query])[0]))
    assert passages[best].text == "green pear"
    rows = [row for _, row in mine(source, passages, searcher, Mining(count=2, ceiling=None))]
    assert all(len(row["neg"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--range", "5"], "--range=5 is not a range of ranks; write it as 10-100"),
        (["--range", "9-3"], "--range=9-3 is not a range"),
        (["--range", "1-2", "--count", "3"], "holds fewer ranks than --count=3"),
        (["--count", "0"], "--count=0 must be positive"),
        (["--ceiling", "-1"], "--ceiling=-1.0 must be 0 or more"),
        (["--data.train=x"], "data mine-negatives does not know --data.train=x"),
    ],
)
def test_wrong_options_are_refused(path, tmp_path, arguments, message, capsys):
    assert main(["data", "mine-negatives", str(path), str(tmp_path / "out.jsonl"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_writes_grit_rows(path, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["data", "mine-negatives", str(path), str(out), "--count", "1", "--ceiling", "0"]) == 0
    assert "4 records over 7 passages; 1 got fewer than 1 negatives" in capsys.readouterr().out
    assert sum(len(record.negatives) for record in open_source(out)) == 3
    (tmp_path / "g.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="negatives are those of embedding records"):
        Passages(open_source(tmp_path / "g.jsonl"))


@pytest.mark.parametrize(
    ("texts", "negatives"),
    [
        (["😀", "!!!", "…", "a"], [[], [], [], []]),
        (["的", "。", "--", "😀"], [[], [], [], []]),
        (["!?", "red apple", "😀 😀", "red"], [[], [["", "red "]], [], [["", "red apple "]]]),
    ],
)
def test_texts_without_a_word_are_found_by_nothing_and_find_nothing(tmp_path, texts, negatives):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": text, "pos": [f"{text} "], "neg": ["?"]}) + "\n" for text in texts))
    assert [row["neg"] for row in mined(path, Mining(count=2, ceiling=None))] == negatives


def test_passages_that_are_all_blank_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "pos": [" "]}\n')
    with pytest.raises(InputError, match=r"pairs.jsonl: every passage is blank"):
        mined(path, Mining())
