import gzip
import json

import pytest
import zstandard

from grit_jax.cli.main import main
from grit_jax.data.records import RecordError
from grit_jax.datatools import convert
from grit_jax.datatools.record_writer import LeftOut
from grit_jax.errors import InputError

NAN = float("nan")


def outcome(tmp_path, content, *, name="x.tsv", min_score=None):
    """What becomes of each row: its texts, or why it is left out or refused."""
    (tmp_path / name).write_text(content)
    found = []
    for entry in convert.triples(tmp_path / name, instruction="", min_score=min_score):
        if isinstance(entry, RecordError):
            assert str(entry).startswith(f"{tmp_path / name}:")
            found.append(("left out" if isinstance(entry, LeftOut) else "refused", entry.fault))
        else:
            found.append((entry[1]["query"][1], *(text for _, text in entry[1]["pos"])))
    return found


def table(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_duplicates_of_quora_are_positives_and_the_others_are_counted(tmp_path):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    rows = [("0", "1", "2", "a?", "b?", "1"), ("1", "3", "4", "c?", "d?", "0"), ("2", "5", "6", "e?", "f?", "")]
    expected = [("a?", "b?"), ("left out", "labelled as not the same"), ("refused", "no score")]
    assert outcome(tmp_path, table(header, *rows)) == expected
    assert outcome(tmp_path, table(header, *rows), min_score=0.5) == expected  # which says the same
    # As on the Hugging Face Hub, where rows of the test set have -1.
    hub = [{"question1": "a?", "question2": "b?", "label": label, "idx": 0} for label in (1, 0, -1, 2, None)]
    assert outcome(tmp_path, lines(*hub), name="x.jsonl") == [
        ("a?", "b?"), ("left out", "labelled as not the same"), ("left out", "there is no label"),
        ("refused", "no label"), ("refused", "no score"),
    ]  # fmt: skip


NLI_KINDS = [
    ("p", "h"), ("left out", "labelled neutral"), ("left out", "labelled contradiction"),
    ("left out", "there is no label"),
]  # fmt: skip


def test_entailed_sentences_are_positives_whatever_the_labels_are_called(tmp_path):
    words = ("entailment", "neutral", "contradiction", "-")
    snli = ("gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "captionID", "pairID", "label1")
    rows = [(word, "( p )", "p", "h", "1.jpg#0", "1", "neutral") for word in words]
    assert outcome(tmp_path, table(snli, *rows)) == NLI_KINDS
    mnli = ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label")
    assert (
        outcome(tmp_path, table(mnli, *(("0", "1", "fiction", "p", "h", "neutral", word) for word in words)))
        == NLI_KINDS
    )
    official = [{"annotator_labels": [], "gold_label": word, "sentence1": "p", "sentence2": "h"} for word in words]
    assert outcome(tmp_path, lines(*official), name="x.jsonl") == NLI_KINDS
    sick = ("pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
    related = [(str(number), "p", "h", f"{number}.5", word.upper()) for number, word in enumerate(words[:3])]
    assert outcome(tmp_path, table(sick, *related)) == NLI_KINDS[:3]
    assert outcome(tmp_path, table(sick, *related), min_score=1.5) == [
        ("left out", "relatedness_score under 1.5"),
        ("p", "h"),
        ("p", "h"),
    ]
    qnli = table(
        ("index", "question", "sentence", "label"), ("0", "p", "h", "entailment"), ("1", "p", "h", "not_entailment")
    )
    assert outcome(tmp_path, qnli) == [("p", "h"), ("left out", "labelled not_entailment")]


def test_numbers_of_a_premise_and_a_hypothesis_are_entailment_neutral_and_contradiction(tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, 1, 2, -1, 3, 0.5, NAN, None, True)]
    bad = ["no label", "no label", "no score", "no score"]
    expected = [*NLI_KINDS, *(("refused", kind) for kind in bad), ("left out", "labelled neutral")]
    assert outcome(tmp_path, lines(*rows), name="x.jsonl") == expected
    (tmp_path / "x.csv").write_text("premise,hypothesis,label\np,h,0\np,h,1.0\np,h,2\np,h,-1\n")
    assert outcome(tmp_path, (tmp_path / "x.csv").read_text(), name="x.csv") == NLI_KINDS
    with pytest.raises(InputError, match='"label" holds labels of known meaning, not scores; leave --min-score'):
        outcome(tmp_path, lines(*rows), name="x.jsonl", min_score=0.5)


@pytest.mark.parametrize("key", ["score", "label", "similarity_score"])
def test_a_score_that_is_none_is_refused_and_one_that_is_small_is_counted(tmp_path, key):
    values = [4.5, "4.5", 1, NAN, float("inf"), None, "", "high", [5]]
    rows = [{"sentence1": "a", "sentence2": "b", key: value} for value in values]
    rows.append({"sentence1": "a", "sentence2": "b"})
    assert outcome(tmp_path, lines(*rows), name="x.jsonl", min_score=4) == [
        ("a", "b"), ("a", "b"), ("left out", f"{key} under 4"), *[("refused", "no score")] * 7,
    ]  # fmt: skip
    with pytest.raises(InputError, match="give --min-score"):
        outcome(tmp_path, lines(*rows), name="x.jsonl")


def test_the_official_headers_of_sts_and_paraphrases(tmp_path):
    stsb = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
    rows = [("0", "main", "MSR", "2012", "1", "none", "none", "a", "b", score) for score in ("5.000", "0.200", "nan")]
    assert outcome(tmp_path, table(stsb, *rows), min_score=4) == [
        ("a", "b"), ("left out", "score under 4"), ("refused", "no score"),
    ]  # fmt: skip
    mrpc = table(
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "a", "b"), ("0", "7", "8", "a", "b")
    )
    assert outcome(tmp_path, "\ufeff" + mrpc) == [("a", "b"), ("left out", "labelled as not the same")]


def test_a_packed_table_is_read_as_a_plain_one(tmp_path):
    content = b"anchor,positive\na,b\n"
    for name, pack in (("x.csv.gz", gzip.compress), ("x.csv.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(content))
        ((where, row),) = convert.triples(tmp_path / name, instruction="", min_score=None)
        assert (where, row["query"], row["pos"]) == (f"{tmp_path / name}:2", ["", "a"], [["", "b"]])


def test_tables_without_names_hold_texts_alone(tmp_path):
    assert outcome(tmp_path, table(("7", "12", "13"), ("a", "b", "0.5"), ("a?", "42"))) == [
        ("refused", "a number for a text"), ("refused", "a number for a text"), ("a?", "42"),
    ]  # fmt: skip
    stsb = "main-captions\tMSRvid\t2012test\t0001\t5.000\tA plane, red.\tAn air plane.\n"
    assert outcome(tmp_path, stsb, name="x.csv") == [("refused", "tabs in a .csv")]
    assert outcome(tmp_path, stsb, min_score=4) == [("refused", "a number for a text")]
    with pytest.raises(InputError, match=r"x.tsv:1: looks like a header, but only 'query' is known"):
        outcome(tmp_path, table(("query", "document"), ("a", "b")))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"query": "", "positive": "p"}, "no text"),
        ({"query": "q", "positive": " \n"}, "no text"),
        ({"query": "q", "pos": ["p", None]}, "no text"),
        ({"query": "q", "positive": "p", "negative": "p "}, "a negative is a positive"),
        ({"query": "q", "pos": ["a", {"title": "t", "text": "p"}], "neg": ["x", "t p"]}, "a negative is a positive"),
        ({"query": "q", "positive": "p", "Query": "other"}, "a key twice"),
        ({"query": "q", "pos": [{"title": 7, "text": "p"}]}, "no title"),
    ],
)
def test_rows_that_would_teach_something_else_are_refused(tmp_path, row, kind):
    assert outcome(tmp_path, lines(row), name="x.jsonl") == [("refused", kind)]


def test_negatives_that_are_null_or_blank_are_none(tmp_path):
    row = {"query": "q", "positive": "p", "negative_1": None, "negative_2": " ", "negative_3": "n", "neg": ["", None]}
    (tmp_path / "x.jsonl").write_text(lines(row))
    ((_, made),) = convert.triples(tmp_path / "x.jsonl", instruction="", min_score=None)
    assert made["neg"] == [["", "n"]]


def test_what_is_left_out_is_said(tmp_path, capsys):
    path, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, 1, 1, -1, None)]
    path.write_text(lines(*rows))
    assert main(["data", "convert", str(path), str(out), "--from", "triples", "--skip-bad"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 records",
        f'left out 1 records: no score; for example {path}:5: "label" is None; it must be a finite number or a known '
        "label",
        f"left out 2 records: labelled neutral; for example {path}:2",
        f"left out 1 records: there is no label; for example {path}:4",
    ]
    path.write_text(lines(*rows[1:4]))
    assert main(["data", "convert", str(path), str(tmp_path / "none.jsonl"), "--from", "triples"]) == 2
    assert f"no record to write; left out 2 records: labelled neutral, as {path}:1" in capsys.readouterr().err
