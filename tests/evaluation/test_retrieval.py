import zlib
from pathlib import Path

import numpy as np
import pytest

from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.evaluation.retrieval import (
    Collection,
    Ranking,
    Retrieval,
    outcome,
    read_collection,
    without_own_ids,
)
from grit_jax.retrieval.quantization import pack, unpack
from tests.data.test_qrels import FORMS as QRELS_FORMS
from tests.evaluation.fake import session
from tests.evaluation.tasks import write_jsonl, write_retrieval


def test_bm25_finds_shared_words_and_says_nothing(caplog):
    documents = ["the cat sat on the mat", "a dog barked", "fish swim in water"]
    scores = Bm25(documents).scores(["dog barked loudly", "where do fish swim", "of"])
    assert scores[:2].argmax(axis=1).tolist() == [1, 2]
    assert not scores[2].any()
    assert [record.message for record in caplog.records if record.name == "bm25s"] == []


def test_only_judged_queries_are_read_and_larger_ids_come_first(tmp_path):
    write_retrieval(tmp_path)
    collection = read_collection(tmp_path, "test")
    assert list(collection.queries) == list(collection.judgements) == [f"q{number}" for number in range(10)]
    assert list(collection.documents)[:3] == ["d9", "d8", "d7"]
    assert collection.documents["d0"] == "RED red is a word"
    assert collection.judgements["q2"] == {"d2": 2, "d5": 1}


def test_bad_judgements_and_ids_are_named(tmp_path):
    write_retrieval(tmp_path)
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: no such file, nor dev\.tsv\.gz"):
        read_collection(tmp_path, "dev")
    judgements = tmp_path / "qrels/test.tsv"
    judgements.write_text("query-id\tcorpus-id\tscore\nq99\td1\t1\n")
    with pytest.raises(InputError, match=r"test\.tsv:2: query 'q99' is not in .*queries\.jsonl"):
        read_collection(tmp_path, "test")
    judgements.write_text("query-id\tcorpus-id\tscore\nq1\td1\tgood\n")
    with pytest.raises(InputError, match=r"test\.tsv:2: holds 'q1', 'd1', 'good'; a judgement is query-id"):
        read_collection(tmp_path, "test")
    judgements.write_text("q1\td1\t1\nq1\td1\t2\n")
    with pytest.raises(InputError, match=r"test\.tsv:2: judges document 'd1' a second time, with another score"):
        read_collection(tmp_path, "test")
    judgements.write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(InputError, match=r"test\.tsv: judges nothing"):
        read_collection(tmp_path, "test")
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "a"}, {"_id": "q1", "text": "b"}])
    with pytest.raises(InputError, match=r"queries\.jsonl:2: '_id' 'q1' appears a second time"):
        read_collection(tmp_path, "test")
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "txt": "a"}])
    with pytest.raises(
        InputError, match=r"queries\.jsonl:1: 'text' is missing; there are _id, txt; it must be a string"
    ):
        read_collection(tmp_path, "test")


@pytest.mark.parametrize("form", QRELS_FORMS)
def test_judgements_of_every_form_are_the_same(tmp_path, form):
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": name, "text": name} for name in ("q1", "q2")])
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": name, "text": name} for name in ("d 1", "d2", "d3")])
    file = tmp_path / f"qrels/test{Path(form).suffix}"
    file.parent.mkdir()
    file.write_text(QRELS_FORMS[form])
    assert read_collection(tmp_path, "test").judgements == {"q1": {"d 1": 1, "d2": 0}, "q2": {"d3": -1}}
    assert Retrieval("t", str(tmp_path)).files()[-1] == file


def test_an_id_that_comes_twice_names_two_documents_unless_it_is_judged(tmp_path):
    write_retrieval(tmp_path)
    before = read_collection(tmp_path, "test")
    rows = [{"_id": name, "text": text} for name, text in before.documents.items()]
    unjudged = ({f"d{n}" for n in range(12)} - {name for some in before.judgements.values() for name in some}).pop()
    write_jsonl(tmp_path / "corpus.jsonl.gz", [*rows, {"_id": unjudged, "text": "another"}])
    after = read_collection(tmp_path, "test")
    assert sorted(after.documents.values()) == sorted([*before.documents.values(), "another"])
    write_jsonl(tmp_path / "corpus.jsonl.gz", [*rows, {"_id": "d1", "text": "another"}])
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:13: '_id' 'd1' appears a second time"):
        read_collection(tmp_path, "test")


def test_a_query_does_not_find_itself_where_it_is_a_document():
    documents = dict.fromkeys(["c", "b", "a"], "")
    collection = Collection({"a": "", "x": ""}, documents, {"a": {"b": 1.0}, "x": {"c": 1.0}})
    ranking = Ranking(np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]], np.float32), np.array([[2, 1, 0], [1, 0, 2]]))
    assert np.allclose(outcome(ranking, collection).examples, 1 / np.log2(3))
    alone = without_own_ids(ranking, collection)
    assert np.allclose(outcome(alone, collection).examples, [1, 1 / np.log2(3)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_documents_are_compared_as_they_are_stored(dtype, tmp_path):
    write_retrieval(tmp_path)
    collection = read_collection(tmp_path, "test")

    def embed(text):
        return np.random.default_rng(zlib.crc32(text.encode())).normal(size=8)

    task = Retrieval("t", str(tmp_path), stored_dtype=dtype)
    found = task.evaluate(session(embed=embed))
    queries, documents = (
        np.array([embed(text) / np.linalg.norm(embed(text)) for text in texts.values()], np.float32)
        for texts in (collection.queries, collection.documents)
    )
    scores = queries @ unpack(**pack(documents, dtype)).T
    best = np.argsort(-scores, axis=1, kind="stable")
    expected = outcome(Ranking(np.take_along_axis(scores, best, axis=1), best), collection)
    assert np.allclose(found.examples, expected.examples)
