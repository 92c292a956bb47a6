import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.cli.main import main
from grit_jax.data.sources import find_files
from grit_jax.datatools import overlap
from grit_jax.datatools.overlap import EvaluationTexts, words_of
from grit_jax.datatools.validate import validate
from grit_jax.errors import InputError

LONG = "the quick brown fox jumps over the lazy dog while it rains in the old town"


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"query": "What is red?", "pos": ["red is a colour"], "neg": ["blue"]},
        {"query": "What is red?", "pos": ["another"]},
        {"query": "What is red?", "pos": ["red is a colour"], "neg": ["blue"]},
        {"query": "other", "pos": [f"Once {LONG.upper()}, they said"]},
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "g.jsonl").write_text('{"text": ["u", "a"]}\n\n{"text": ["u", "b"]}\n')
    return data


def test_sound_data_is_counted_and_repetitions_are_named(folder):
    report = validate(find_files(str(folder)))
    assert [(file.stream, file.records, file.bad) for file in report.files] == [
        ("embedding", 4, ()), ("generative", 2, ()),
    ]  # fmt: skip
    found = {duplicates.what: (duplicates.count, duplicates.examples) for duplicates in report.duplicates}
    e, g = folder / "e.jsonl", folder / "g.jsonl"
    assert found == {
        "records": (1, (f"{e}:3 repeats {e}:1",)),
        "queries": (2, (f"{e}:2 repeats {e}:1", f"{e}:3 repeats {e}:1")),
        "first user turns": (1, (f"{g}:3 repeats {g}:1",)),
    }


def test_malformed_records_exit_with_2_and_are_all_counted(folder, capsys):
    with (folder / "g.jsonl").open("a") as file:
        file.write('{"text": 1}\n{"text": \n{"text": 2}\n')
    (folder / "h.jsonl").touch()
    assert main(["data", "validate", str(folder)]) == 2
    out = capsys.readouterr().out
    assert f"{folder / 'g.jsonl'}: 2 generative records, 3 malformed" in out
    assert '2 "text" is not a text' in out
    assert "g.jsonl:4: " in out
    assert "g.jsonl:6: " in out
    assert "h.jsonl: the file is empty" in out
    assert main(["data", "validate", str(folder), "--skip-bad", "--report", str(folder / "r.json")]) == 0
    report = json.loads((folder / "r.json").read_text())
    assert [bad["count"] for bad in report["files"][1]["bad"]] == [2, 1]


def beir(folder):
    (folder / "qrels").mkdir(parents=True)
    queries = [
        {"_id": "1", "text": "WHAT IS... red"},
        {"_id": "2", "text": "what is new"},
        {"_id": "3", "text": "other"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    documents = [{"_id": "d", "title": "Red is", "text": "a colour"}, {"_id": "e", "title": "", "text": LONG}]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in documents).encode())
    (folder / "corpus.jsonl.gz").write_bytes(packed)
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td\t1\n2\te\t1\n")
    return folder


def test_test_queries_and_documents_of_a_beir_folder_are_found_in_the_training_data(folder, tmp_path, capsys):
    evaluation = beir(tmp_path / "eval")
    assert main(["data", "validate", str(folder), "--against", str(evaluation)]) == 1
    out = capsys.readouterr().out
    assert "queries.jsonl: 1 of 2 texts occur in the training data (1 whole, 0 by 13 words in a row)" in out
    assert f"{evaluation / 'queries.jsonl'}:1 in {folder / 'e.jsonl'}:1" in out
    assert "corpus.jsonl.gz: 1 of 2 texts occur" in out  # a part of a document says nothing


def test_shared_documents_alone_are_no_failure(folder, tmp_path):
    evaluation = beir(tmp_path / "eval")
    (evaluation / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n2\te\t1\n")
    assert main(["data", "validate", str(folder), "--against", str(evaluation)]) == 0


def test_words_in_a_row_are_found_in_text_jsonl_and_tables(folder, tmp_path):
    (tmp_path / "a.txt").write_text(f"short\n{LONG}\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"deep": [{"text": f"x {LONG} y"}], "label": "blue"}) + "\n")
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(f"5.0\t{LONG}\tnothing of that kind at all\n".encode()))
    against = EvaluationTexts([tmp_path / name for name in ("a.txt", "b.jsonl", "c.tsv.gz")], ngram=13)
    assert list(against.counts.values()) == [1, 1, 2]
    report = validate(find_files(str(folder)), against=against)
    assert [(match.evaluation.rpartition("/")[2], match.whole) for match in report.matches] == [
        ("a.txt:2", False), ("b.jsonl:1", False), ("c.tsv.gz:1", False),
    ]  # fmt: skip
    whole_only = EvaluationTexts([tmp_path / "a.txt"], ngram=0)
    assert not validate(find_files(str(folder)), against=whole_only).matches


def test_missing_evaluation_sets_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no such file"), ("empty", "no .jsonl"), ("x.csv", "must end in")):
        if name == "x.csv":
            (tmp_path / name).touch()
        with pytest.raises(InputError, match=message):
            EvaluationTexts([tmp_path / name], ngram=13)


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=9).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, min_size=1, max_size=5), st.integers(1, 5))
def test_matches_are_those_of_comparing_every_pair(tmp_path_factory, evaluation, training, ngram):
    path = tmp_path_factory.mktemp("fuzz") / "e.txt"
    path.write_text("\n".join(evaluation))
    before, overlap._FEWEST_WORDS = overlap._FEWEST_WORDS, 1
    try:
        against = EvaluationTexts([path], ngram=ngram)
    finally:
        overlap._FEWEST_WORDS = before
    against.look_up(training, range(len(training)), str)

    def grams(text):
        words = words_of(text)
        return {tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}

    expected = {
        number: text in training
        for number, text in enumerate(evaluation, start=1)
        if text in training or any(grams(text) & grams(other) for other in training)
    }
    assert {int(match.evaluation.rpartition(":")[2]): match.whole for match in against.matches()} == expected


@pytest.mark.parametrize(
    ("text", "around", "other"),
    [
        (
            "中华民族伟大复兴的关键在于科技创新与教育发展", "有人说：{}，这是很多学者的看法。",
            "今天的天气很好，我们一起去公园散步吧，晚上再回家。",
        ),
        (
            "東京の桜は三月の終わりから四月の初めに満開になります", "先生は{}と言いました。",
            "昨日は雨が降ったので家で本を読みました。",
        ),
        (
            "ภูเขาไฟฟูจิเป็นภูเขาที่สูงที่สุดในประเทศญี่ปุ่น", "เขาบอกว่า{}จริงๆ",
            "วันนี้อากาศดีมากเราไปเดินเล่นที่สวน",
        ),
    ],
)  # fmt: skip
def test_texts_without_spaces_are_found_by_their_characters(tmp_path, text, around, other):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(json.dumps({"q": q}, ensure_ascii=False) + "\n" for q in (text, other, "好")))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": ["u", around.format(text)]}) + "\n")
    against = EvaluationTexts([evaluation], ngram=13)
    assert list(against.counts.values()) == [2]  # a single word says nothing
    report = validate(find_files(str(tmp_path / "train.jsonl")), against=against)
    assert [(match.evaluation, match.whole) for match in report.matches] == [(f"{evaluation}:1", False)]


def test_the_same_characters_in_another_form_are_the_same_words():
    assert words_of("Cafe\u0301 ＡＢＣ１") == words_of("café abc1") == ["café", "abc1"]
    assert words_of("GPT-4は良い") == ["gpt", "4", "は", "良", "い"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.tsv", "1 0 d 1\n"), ("test.tsv", "1\t0\td\t1\n"), ("test.tsv", "1\td\t1\n"), ("test.trec", "1 Q0 d 2\n"),
        ("test.jsonl", '{"query-id": 1, "corpus-id": "d", "score": 1}\n'),
    ],
)  # fmt: skip
def test_test_queries_are_those_that_judgements_of_any_form_name(folder, tmp_path, name, content):
    evaluation = beir(tmp_path / "eval")
    (evaluation / "qrels/test.tsv").unlink()
    (evaluation / "qrels" / name).write_text(content)
    against = EvaluationTexts([evaluation], ngram=13)
    assert against.counts[str(evaluation / "queries.jsonl")] == 1
    assert any(
        match.whole and not match.document for match in validate(find_files(str(folder)), against=against).matches
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [("9\td\t1\n", "test.tsv: judges no query of "), ("1\td\n", "test.tsv:1: holds '1', 'd'; a judgement is")],
)
def test_judgements_that_cannot_be_used_are_refused(tmp_path, content, message):
    evaluation = beir(tmp_path / "eval")
    (evaluation / "qrels/test.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        EvaluationTexts([evaluation], ngram=13)


def test_what_is_hidden_in_an_evaluation_folder_is_no_test_set(tmp_path):
    for name in ("a.txt", ".git/b.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LONG)
    assert list(EvaluationTexts([tmp_path], ngram=13).counts) == [str(tmp_path / "a.txt")]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(LONG.encode()))
    with pytest.raises(InputError, match="the same data twice"):
        EvaluationTexts([tmp_path], ngram=13)
