"""The same figures by NumPy and scikit-learn alone, from embeddings that `grit-jax encode` wrote."""

import csv
import gzip
import json
import warnings

import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score

from grit_jax.cli.main import main


@pytest.fixture
def one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


def test_an_independent_scorer_agrees(one_device, checkpoint, suite, tmp_path):
    folder = suite.parent

    def encode(texts, *more):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.npy"))
        assert main(["encode", str(checkpoint), *paths, "--max-length", "512", *more]) == 0
        return np.load(tmp_path / "out.npy").astype(np.float64)

    def rows(path):
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        return [json.loads(line) for line in text.splitlines()]

    def table(path):
        return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))

    output = tmp_path / "report.json"
    three = tmp_path / "suite.yaml"
    lines = [
        f"{{name: {name}, type: {kind}, path: {path}, instruction: find}}"
        for name, kind, path in (
            ("search", "retrieval", folder / "retrieval"),
            ("similar", "sts", folder / "sts.tsv"),
            ("classes", "classification", folder / "classification"),
        )
    ]
    three.write_text("tasks:\n" + "".join(f"- {line}\n" for line in lines))
    assert main(["evaluate", str(checkpoint), "--suite", str(three), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["tasks"]

    corpus, queries = rows(folder / "retrieval/corpus.jsonl.gz"), rows(folder / "retrieval/queries.jsonl")[:10]
    gains = np.zeros((len(queries), len(corpus)))
    for row in table(folder / "retrieval/qrels/test.tsv"):
        gains[int(row["query-id"][1:]), int(row["corpus-id"][1:])] = int(row["score"])
    sts = table(folder / "sts.tsv")
    train, test = (rows(folder / f"classification/{split}.jsonl") for split in ("train", "test"))
    documents = encode([f"{row['title']} {row['text']}" for row in corpus])
    texts = [row["text"] for row in (*queries, *train, *test)]
    texts += [row[key] for key in ("sentence1", "sentence2") for row in sts]
    vectors = encode(texts, "--instruction", "find")
    asked, learnt, held_out, first, second = np.split(
        vectors, np.cumsum([len(queries), len(train), len(test), len(sts)])
    )

    assert abs(found["search"]["main_score"] - ndcg_score(gains, asked @ documents.T, k=10)) < 1e-3
    best = np.argsort(-(asked @ documents.T), axis=1)[:, :10]
    recall = np.mean((np.take_along_axis(gains, best, axis=1) > 0).sum(axis=1) / (gains > 0).sum(axis=1))
    assert abs(found["search"]["recall_at_10"] - recall) < 1e-3
    correlation = scipy.stats.spearmanr((first * second).sum(axis=1), [float(row["score"]) for row in sts]).statistic
    assert abs(found["similar"]["main_score"] - correlation) < 1e-3

    labels, right = np.array([row["label"] for row in train]), []
    for experiment in range(10):
        order = np.random.default_rng([0, experiment]).permutation(len(labels))
        chosen = sorted(
            (place for label in set(labels) for place in order[labels[order] == label][:8]),
            key=order.tolist().index,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression = LogisticRegression(max_iter=100).fit(learnt[chosen], labels[chosen])
        right.append(np.mean(regression.predict(held_out) == [row["label"] for row in test]))
    assert abs(found["classes"]["main_score"] - np.mean(right)) < 1e-3
