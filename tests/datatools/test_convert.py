import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.cli.main import main
from grit_jax.data.records import RecordError
from grit_jax.data.sources import open_source
from grit_jax.datatools import convert
from grit_jax.datatools.record_writer import LeftOut, write_records
from grit_jax.errors import InputError


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def converted(tmp_path, rows, **options):
    written = write_records(tmp_path / "out.jsonl", rows, **options)
    return rows_of(tmp_path / "out.jsonl"), written


def counts(rows):
    return {kind: some.count for kind, some in rows.items()}


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": f"title {i}", "text": f"text {i}"} for i in range(4)]
    packed = "".join(json.dumps(row) + "\n" for row in documents)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    write(
        folder / "queries.jsonl",
        {"_id": "q1", "text": "one?"},
        {"_id": "q2", "text": "two?"},
        {"_id": "q3", "text": "?"},
    )
    judgements = "query-id\tcorpus-id\tscore\nq1\td0\t1\nq1\td2\t0\nq2\td1\t2\nq2\td3\t1\nq3\td3\t0\n"
    (folder / "qrels/train.tsv").write_text(judgements)
    return folder


def test_beir_queries_get_the_judged_documents(beir, tmp_path):
    rows, _ = converted(tmp_path, convert.beir(beir, instruction="Find", split="train"))
    assert rows == [
        {"query": ["Find", "one?"], "pos": [["", "title 0 text 0"]], "neg": [["", "title 2 text 2"]]},
        {"query": ["Find", "two?"], "pos": [["", "title 1 text 1"], ["", "title 3 text 3"]], "neg": []},
    ]


def test_a_judgement_of_no_document_is_named_with_its_line(beir, tmp_path):
    with (beir / "qrels/train.tsv").open("a") as file:
        file.write("q1\td9\t1\nq3\td1\tmany\n")
    with pytest.raises(InputError, match=r"qrels/train.tsv:8: holds .*'many'"):
        converted(tmp_path, convert.beir(beir, instruction="", split="train"))
    rows, written = converted(tmp_path, convert.beir(beir, instruction="", split="train"), skip_bad=True)
    assert len(rows) == 1
    assert counts(written.bad) == {"no judgement": 1, "no such document": 1}
    assert counts(written.left_out) == {"queries for which no document is judged relevant": 1}
    assert "train.tsv:7: document 'd9' is not in" in written.bad["no such document"].examples[0]
    with pytest.raises(InputError, match=r"qrels/dev.tsv: cannot be read"):
        list(convert.beir(beir, instruction="", split="dev"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", 'a "quote"\tp\tn\n'),
        ("t.tsv", 'query\tpositive\tnegative\na "quote"\tp\tn\n'),
        ("t.csv", 'anchor,positive,negative\n"a ""quote""",p,n\n'),
        ("t.jsonl", '{"anchor": "a \\"quote\\"", "positive": "p", "negative": "n"}\n'),
        ("t.jsonl", '{"query": "a \\"quote\\"", "positive": ["p"], "negative_1": "n"}\n'),
        ("t.jsonl", '["a \\"quote\\"", "p", "n"]\n'),
        ("t.json", '[["a \\"quote\\"", "p", "n"]]'),
        (
            "t.jsonl",
            '{"query": "a \\"quote\\"", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}]}',
        ),
    ],
)  # fmt: skip
def test_triples_of_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows, _ = converted(tmp_path, convert.triples(tmp_path / name, instruction="", min_score=None))
    assert rows == [{"query": ["", 'a "quote"'], "pos": [["", "p"]], "neg": [["", "n"]]}]


def test_pairs_with_scores_need_a_bound(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\na,b,0.9\nc,d,0.1\n")
    with pytest.raises(InputError, match="give --min-score"):
        converted(tmp_path, convert.triples(path, instruction="", min_score=None))
    rows, _ = converted(tmp_path, convert.triples(path, instruction="", min_score=0.5))
    assert [row["query"][1] for row in rows] == ["a"]


def test_a_quoted_cell_over_many_lines_keeps_errors_on_the_right_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('query,positive\n"a\nb",p\nonly one\n')
    entries = list(convert.triples(path, instruction="", min_score=None))
    assert entries[0][1]["query"] == ["", "a\nb"]
    assert isinstance(entries[1], RecordError)
    assert str(entries[1]).startswith(f"{path}:4: has 1 cells; the header has 2")


def test_alpaca(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([
        {"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say hi", "input": "", "output": "hi"},
    ]))  # fmt: skip
    rows, _ = converted(tmp_path, convert.alpaca(path))
    assert rows == [{"text": ["Add\n1 2", "3"]}, {"text": ["Say hi", "hi"]}]


def test_sharegpt_and_openai_messages(tmp_path):
    turns = [("system", "Be kind."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    path = write(tmp_path / "s.jsonl", {"conversations": [{"from": who, "value": text} for who, text in turns]})
    expected = [{"text": ["Be kind.\n\na", "b", "c", "d"]}]
    assert converted(tmp_path, convert.sharegpt(path))[0] == expected
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles.get(who, who), "content": text} for who, text in turns]
    messages[1]["content"] = [{"type": "text", "text": "a"}]
    assert converted(tmp_path, convert.openai(write(tmp_path / "o.jsonl", {"messages": messages})))[0] == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("user", "a")], "the roles are user; they must be user and assistant in turn"),
        ([("assistant", "a"), ("user", "b")], "the roles are assistant, user"),
        ([], "the roles are none"),
        ([("user", "a"), ("assistant", None)], "message 2 holds no text"),
        ([("user", "a"), ("assistant", " ")], "message 2 holds no text"),
        ([("user", "a"), ("tool", "b")], "the roles are user, tool"),
    ],
)
def test_conversations_that_cannot_be_trained_on_are_named(tmp_path, messages, message):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": role, "content": text} for role, text in messages]}
    path = write(tmp_path / "o.jsonl", good, bad)
    with pytest.raises(InputError, match=rf"o.jsonl:2: {message}.*--skip-bad"):
        converted(tmp_path, convert.openai(path))
    assert not (tmp_path / "out.jsonl").exists()
    rows, written = converted(tmp_path, convert.openai(path), skip_bad=True)
    assert len(rows) == 1
    assert sum(counts(written.bad).values()) == 1


def test_grit_rows_survive_the_way_to_array_record_and_back(tmp_path):
    rows = [{"query": ["i", f"q{i}"], "pos": [["", "p\u2028é"]], "neg": [], "id": i} for i in range(20)]
    path = write(tmp_path / "a.jsonl", *rows)
    assert main(["data", "convert", str(path), str(tmp_path / "a.array_record"), "--from", "grit"]) == 0
    assert list(open_source(path)) == list(open_source(tmp_path / "a.array_record"))
    arguments = [str(tmp_path / "a.array_record"), str(tmp_path / "b.jsonl.gz"), "--from", "grit"]
    assert main(["data", "convert", *arguments]) == 0
    lines = gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()).decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows


_VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "title"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_KEYS = ["query", "positive", "negative", "pos", "score", "instruction", "output", "conversations", "messages"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(_KEYS), _VALUE, max_size=4) | _VALUE, max_size=4), st.binary(max_size=9)
)
def test_no_row_of_any_shape_is_lost_or_raises(tmp_path_factory, values, line):
    path = tmp_path_factory.mktemp("fuzz") / "in.jsonl"
    lines = [json.dumps(value).encode() for value in values] + [line.replace(b"\n", b"")]
    path.write_bytes(b"\n".join(lines))
    good = {
        "triples": {"query": "q", "positive": "p", "score": 1}, "alpaca": {"instruction": "i", "output": "o"},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "openai": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }  # fmt: skip
    for name, row in good.items():
        path.write_bytes(b"\n".join([json.dumps(row).encode(), *lines]))
        options = {"instruction": "", "min_score": -1e300} if name == "triples" else {}
        entries = list(getattr(convert, name)(path, **options))
        written = write_records(path.with_name("out.jsonl"), entries, skip_bad=True)
        assert written.count + sum(counts(written.bad | written.left_out).values()) == len(entries)
        blank = sum(not line.strip() for line in lines)
        assert len(entries) >= 1 + len(lines) - blank - (len(values) if name == "triples" else 0)
        assert len(list(open_source(path.with_name("out.jsonl")))) == written.count


def faults(beir, **options):
    entries = list(convert.beir(beir, instruction="", split="train", **options))
    rows = [entry for entry in entries if not isinstance(entry, RecordError)]
    return rows, [entry for entry in entries if isinstance(entry, RecordError)]


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("qrels/train.tsv", "q9\td1\t1", "train.tsv:7: query 'q9' is not in "),
        ("qrels/train.tsv", "q1\td2\t1", "train.tsv:7: judges document 'd2' a second time, with another score"),
        ("qrels/train.tsv", "q3\td1\tnan", "train.tsv:7: holds 'q3', 'd1', 'nan'; a judgement is"),
        ("queries.jsonl", '{"_id": "q1", "text": "other"}', "queries.jsonl:4: '_id' 'q1' is another query's already"),
        ("queries.jsonl", '{"text": "other"}', "queries.jsonl:4: '_id' is None; it must be a text"),
        ("corpus.jsonl", '{"_id": "d1", "text": "other"}', "corpus.jsonl:5: '_id' 'd1' is another text's already"),
        ("corpus.jsonl", '{"_id": "d1", "text": "\\ud83d"}', "corpus.jsonl:5: \\ud83d is half of a surrogate pair"),
    ],
)
def test_ids_and_judgements_of_beir_that_contradict_are_named(beir, file, line, message):
    (beir / "corpus.jsonl").write_bytes(gzip.decompress((beir / "corpus.jsonl.gz").read_bytes()))
    (beir / "corpus.jsonl.gz").unlink()
    with (beir / file).open("a") as out:
        out.write(f"{line}\n")
    assert [fault for fault in faults(beir)[1] if not isinstance(fault, LeftOut) and message in str(fault)]


def test_repeated_judgements_count_once_and_every_form_of_them_is_read(beir):
    rows, _ = faults(beir)
    qrels = (beir / "qrels/train.tsv").read_text()
    (beir / "qrels/train.tsv").write_text(qrels + "q1\td0\t1\n")
    again, left_out = faults(beir)
    assert again == rows
    repeats = [fault.where for fault in left_out if fault.fault == "judgements that repeat an earlier one"]
    assert repeats == [f"{beir / 'qrels/train.tsv'}:7"]
    (beir / "qrels/train.tsv").unlink()
    trec = [f"{query} 0 {document} {score}\n" for query, document, score in map(str.split, qrels.splitlines()[1:])]
    (beir / "qrels/train.qrels").write_text("".join(trec))
    assert faults(beir)[0] == rows


def test_a_document_without_a_text_is_no_positive(beir):
    (beir / "qrels/train.tsv").write_text("q1\tempty\t1\n")
    write(beir / "corpus.jsonl", {"_id": "empty", "title": None, "text": None})
    assert [str(fault).partition("jsonl:")[2] for fault in faults(beir)[1]] == ["1: the positive has no text"]
