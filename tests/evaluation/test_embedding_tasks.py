import sys

import numpy as np
import pytest
import sklearn.metrics

from grit_jax.errors import InputError
from grit_jax.evaluation.learning import Classification, Clustering
from grit_jax.evaluation.reranking import Reranking, permutation
from grit_jax.evaluation.similarity import STS, PairClassification, Summarization
from grit_jax.evaluation.task import undersample
from tests.evaluation.fake import session
from tests.evaluation.tasks import write_classification, write_jsonl


def random_vectors(seed=0, width=6):
    """A vector for each text, neither of unit length nor the same twice."""
    generator, known = np.random.default_rng(seed), {}
    return lambda text: known.setdefault(text, generator.normal(size=width))


def test_pairs_are_classified_by_the_best_of_four_similarities(tmp_path):
    generator, embed = np.random.default_rng(1), random_vectors()
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": int(generator.integers(2))} for n in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = PairClassification("x", str(tmp_path / "pairs.jsonl")).evaluate(session(embed=embed))
    a, b = (np.array([embed(row[key]) for row in rows]) for key in ("sentence1", "sentence2"))
    similarities = [
        np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1),
        np.sum(a * b, axis=1),
        -np.linalg.norm(a - b, axis=1),
        -np.abs(a - b).sum(axis=1),
    ]
    labels = [row["label"] for row in rows]
    expected = [sklearn.metrics.average_precision_score(labels, similarity) for similarity in similarities]
    assert np.allclose(list(found.scores.values()), expected)
    assert np.isclose(found.score(found.examples), max(expected))


def test_summaries_are_ranked_by_their_nearest_human_one(tmp_path):
    directions = {"h1": [1, 0], "h2": [0, 1], "m1": [1, 0.1], "m2": [1, 1], "m3": [-1, -1], "m4": [0.3, 1]}
    row = {"human_summaries": ["h1", "h2"], "machine_summaries": ["m1", "m2", "m3", "m4"]}
    rows = [row | {"relevance": relevance} for relevance in ([4, 2, 1, 3], [1, 3, 4, 2], [2, 2, 2, 2])]
    write_jsonl(tmp_path / "s.jsonl", rows)
    found = Summarization("x", str(tmp_path / "s.jsonl")).evaluate(session(embed=directions.__getitem__))
    assert np.allclose(found.examples, [1, -1])  # the constant one is left out


def test_labels_that_embeddings_separate_are_found_and_others_are_not(tmp_path):
    write_classification(tmp_path)
    generator = np.random.default_rng(0)

    groups = {"red": 0, "green": 0, "blue": 0, "one": 1, "two": 1, "three": 1, "four": 1}

    def separated(text):
        return 5 * np.eye(3)[groups.get(text.split()[0], 2)]

    found = Classification("x", str(tmp_path)).evaluate(session(embed=separated))
    assert np.all(found.examples == 1)
    assert found.scores == {"f1": 1}
    chance = Classification("x", str(tmp_path)).evaluate(session(embed=lambda _: generator.normal(size=4)))
    assert np.mean(chance.examples) < 0.6
    found = Clustering("x", str(tmp_path / "test.jsonl")).evaluate(session(embed=separated))
    assert np.isclose(found.score(found.examples), 1)


def test_sets_are_clustered_each_by_itself(tmp_path):
    sets = [
        {"sentences": ["a1", "a2", "b1", "b2"], "labels": [0, 0, 1, 1]},
        {"sentences": ["a1", "b1"], "labels": [0, 1]},
    ]
    write_jsonl(tmp_path / "sets.jsonl", sets)
    found = Clustering("x", str(tmp_path / "sets.jsonl")).evaluate(session(embed=lambda t: [float(t[0] == "a"), 1.0]))
    assert np.allclose(found.examples, [1, 1])


def test_every_draw_takes_as_many_of_each_label():
    labels = np.array(["a"] * 50 + ["b"] * 9 + ["c"] * 3)
    chosen = undersample(labels, 8, np.random.default_rng(0))
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() == [8, 8, 3]
    assert len(set(chosen.tolist())) == len(chosen)
    assert not np.array_equal(chosen, undersample(labels, 8, np.random.default_rng(1)))


CANDIDATES = {"query": "q", "positive": ["p1", "p2"], "negative": ["n1", "n2", "n3"]}
COSINES = {"q": [1, 0], "n1": [1, 0.1], "p1": [1, 0.2], "n2": [1, 0.3], "p2": [1, 0.4], "n3": [1, 0.5]}


def reranked(tmp_path, method="embedding", **behaviour):
    write_jsonl(tmp_path / "c.jsonl", [CANDIDATES, {"query": "left out", "positive": [], "negative": ["n1"]}])
    task = Reranking("x", str(tmp_path / "c.jsonl"), method=method, candidates=4)
    found = task.evaluate(session(embed=COSINES.__getitem__, **behaviour))
    (precision,) = found.examples
    return precision, found.scores["mrr_at_10"]


def test_documents_are_ordered_by_cosine_or_by_what_the_model_says(tmp_path):
    # n1 p1 n2 p2 n3 by embedding
    assert np.allclose(reranked(tmp_path), ((1 / 2 + 2 / 4) / 2, 1 / 2))
    # p2 p1 n1 n2 by generation, n3 stays behind
    assert np.allclose(reranked(tmp_path, "permutation", answer=lambda _: "[4] > [2]"), (1, 1))
    # "Yes" is likelier for what has a 2: p2 or n2, in the order of embeddings n2 p2 and then n1 p1
    yes = {"score": lambda context, said: float(said == "Yes") * ("2\n" in context.split("Query")[0])}
    assert np.allclose(reranked(tmp_path, "pointwise", **yes), ((1 / 2 + 2 / 4) / 2, 1 / 2))
    assert np.allclose(reranked(tmp_path, "permutation", answer=lambda _: "no idea"), reranked(tmp_path))


def test_an_order_holds_everything_once():
    assert permutation("[3] > [1] > [3] > [9] > [0]", 4).tolist() == [2, 0, 1, 3]


def test_instructions_go_to_queries_and_blank_texts_are_zero(tmp_path):
    one = session(embed=lambda _: [1.0, 0.0])
    assert one.embed(["a", " ", "a"], "find").tolist() == [[1, 0], [0, 0], [1, 0]]
    assert one.model.asked == [("find", "a")]


def test_bad_rows_are_named(tmp_path):
    one, path = session(embed=lambda _: [1.0]), tmp_path / "x.tsv"
    task = STS("x", str(path))
    for score in ("high", "nan", "inf"):
        path.write_text(f"score\tsentence1\tsentence2\n1\ta\tb\n{score}\ta\tb\n")
        with pytest.raises(InputError, match=rf"x\.tsv:3: 'score' is '{score}'; it must be a finite number"):
            task.evaluate(one)
    path.write_text("score\tsentence1\n1\ta\n")
    with pytest.raises(InputError, match=r"x\.tsv:2: 'sentence2' is missing; there are score, sentence1"):
        task.evaluate(one)
    path.write_text("")
    with pytest.raises(InputError, match=r"x\.tsv: the file is empty"):
        task.evaluate(one)
    rows = tmp_path / "x.jsonl"
    for bad in ("x", True, float("inf")):
        write_jsonl(rows, [{"machine_summaries": ["a"], "human_summaries": ["b"], "relevance": [bad]}])
        with pytest.raises(InputError, match=r"x\.jsonl:1: 'relevance' is \[.*\]; it must be a list of finite numbers"):
            Summarization("x", str(rows)).evaluate(one)
    write_jsonl(rows, [{"sentence1": "a", "sentence2": "b", "label": 2}])
    with pytest.raises(InputError, match=r"x\.jsonl:1: 'label' is 2; it must be 1 or 0"):
        PairClassification("x", str(rows)).evaluate(one)
    with pytest.raises(InputError, match=r"must end in \.jsonl, \.json or \.tsv"):
        (tmp_path / "x.csv").touch()
        STS("x", str(tmp_path / "x.csv")).evaluate(one)


@pytest.mark.parametrize("kind", [Classification, Clustering])
def test_without_scikit_learn_the_extra_is_named_before_anything_runs(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(InputError, match=r"need scikit-learn; pip install .*-e '\.\[evaluate\]'"):
        kind("x", "data")
