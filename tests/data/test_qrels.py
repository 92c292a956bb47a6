import json

import pytest

from grit_jax.data.qrels import find_qrels, read_qrels
from grit_jax.data.records import RecordError
from grit_jax.errors import InputError

ROWS = [("q1", "d 1", 1), ("q1", "d2", 0), ("q2", "d3", -1)]
FORMS = {
    "beir.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in ROWS),
    "other order.tsv": "\ufeffScore\tQuery-ID\tcorpus-id\r\n" + "".join(f"{s}\t{q}\t{d}\r\n" for q, d, s in ROWS),
    "bare.tsv": "".join(f"{q}\t{d}\t{s}\n\n" for q, d, s in ROWS),
    "trec.tsv": "".join(f"{q}\t0\t{d}\t{s}\n" for q, d, s in ROWS),
    "rows.jsonl": "".join(json.dumps({"query-id": q, "corpus-id": d, "score": s}) + "\n" for q, d, s in ROWS),
    "rows of mteb.jsonl": "".join(
        json.dumps({"query_id": q, "corpus_id": d, "score": str(s)}) + "\n" for q, d, s in ROWS
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_judgements_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_text(FORMS[name])
    assert [found for _, found in read_qrels(path)] == ROWS


def test_columns_of_trec_may_be_parted_by_spaces(tmp_path):
    path = tmp_path / "test.qrels"
    path.write_text("1 0 doc-3 2\n20  Q0   doc-4  0\n")
    assert [found for _, found in read_qrels(path)] == [("1", "doc-3", 2), ("20", "doc-4", 0)]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("x.tsv", b"q1\td1\tmany"), ("x.tsv", b"q1\td1\tnan"), ("x.tsv", b"q1\td1"), ("x.tsv", b"q1\t\t1"),
        ("x.tsv", b"q1\tQ0\td1\t1\t0.5\trun"), ("x.tsv", b"q\xff\td1\t1"), ("x.jsonl", b"[1]"),
        ("x.jsonl", b'{"query-id": "q", "corpus-id": "d"}'),
        ("x.jsonl", b'{"query-id": "q", "corpus-id": "d", "score": true}'),
        ("x.jsonl", b'{"query-id": null, "corpus-id": "d", "score": 1}'),
    ],
)  # fmt: skip
def test_what_is_no_judgement_is_named_with_its_line(tmp_path, name, line):
    good = b"q\td\t1" if name == "x.tsv" else b'{"query-id": "q", "corpus-id": 7, "score": 1}'
    (tmp_path / name).write_bytes(b"\n".join([good, line, good]))
    first, bad, last = read_qrels(tmp_path / name)
    assert isinstance(bad, RecordError)
    assert str(bad).startswith(f"{tmp_path / name}:2: ")
    assert (first[1].score, last[0]) == (1, f"{tmp_path / name}:3")


def test_a_header_without_a_column_is_refused(tmp_path):
    (tmp_path / "x.tsv").write_text("query-id\tdoc\tscore\n")
    with pytest.raises(InputError, match=r"x.tsv:1: the header has no 'corpus-id'"):
        list(read_qrels(tmp_path / "x.tsv"))


def test_the_judgements_of_a_split_are_found_whatever_their_form(tmp_path):
    assert find_qrels(tmp_path, "test") is None
    (tmp_path / "qrels").mkdir()
    for name in ("test.trec", "test.jsonl.gz", "test.tsv"):
        (tmp_path / "qrels" / name).touch()
        assert find_qrels(tmp_path, "test") == tmp_path / "qrels" / name
