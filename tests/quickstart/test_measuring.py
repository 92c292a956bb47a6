import json

import numpy as np

from grit_jax.quickstart.measuring import ranks_of, read_task, retrieval_scores, unigram_loss
from grit_jax.text.tokenizer import Tokenizer


def test_figures_of_known_ranks():
    figures = retrieval_scores(np.array([1, 3, 10, 11]))
    assert np.isclose(figures["ndcg_at_10"], (1 + 1 / 2 + 1 / np.log2(11)) / 4)
    assert figures["recall_at_10"] == 0.75


def test_ties_count_against_the_relevant_document():
    scores = np.array([[0.1, 0.5, 0.5], [0.9, 0.1, 0.2]])
    assert ranks_of(scores, np.array([1, 0])).tolist() == [2, 1]


def test_unigram_loss_is_the_cross_entropy_of_smoothed_counts(tmp_path):
    tokenizer = Tokenizer.load("bytes")
    for split, answers in (("train", ["aab"]), ("held_out", ["ac"])):
        (tmp_path / split).mkdir()
        rows = "".join(json.dumps({"text": ["x", answer]}) + "\n" for answer in answers)
        (tmp_path / split / "f.jsonl").write_text(rows)
    # Counts are a 2, b 1, </s> 1, plus one for each of 258 tokens.
    total = 4 + 258
    expected = -np.mean(np.log([3 / total, 1 / total, 2 / total]))
    actual = unigram_loss(tmp_path / "train", tmp_path / "held_out", tokenizer, max_length=64)
    assert np.isclose(actual, expected)


def test_a_task_is_read_whatever_the_order_of_its_documents(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "x", "text": "pears"}\n{"_id": "y", "text": "apples"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "apple"}\n{"_id": "2", "text": "pear"}\n')
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n2\tx\t1\n1\ty\t1\n")
    task = read_task(tmp_path)
    assert [task.documents[place] for place in task.relevant] == ["apples", "pears"]
