import pytest

from grit_jax.config import InputError
from grit_jax.data.records import EmbeddingRecord, GenerativeRecord, parse_record


def parse(line):
    return parse_record(line, path="f.jsonl", line_number=7)


def test_embedding_rows_with_and_without_instructions():
    record = parse('{"query": ["\\tFind: ", "q"], "pos": [["", "p"]], "neg": ["n1", ["i", "n2"]]}')
    assert record == EmbeddingRecord(("Find", "q"), (("", "p"),), (("", "n1"), ("i", "n2")))


def test_missing_negatives_are_none():
    assert parse('{"query": "q", "pos": ["p"]}').negatives == ()


def test_generative_rows_are_turns_or_one_text():
    assert parse('{"text": ["u", "a"]}') == GenerativeRecord(("u", "a"))
    assert parse('{"text": "words"}') == GenerativeRecord("words")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', "not valid JSON"),
        ("[1]", "found a JSON list; each line must be an object"),
        ('{"prompt": "x"}', r"keys \['prompt'\] are of neither stream"),
        ('{"query": "q"}', '"pos" is missing or empty'),
        ('{"query": "q", "pos": "p"}', '"pos" is "p"; it must be a list'),
        ('{"query": "q", "pos": ["p"], "neg": [1]}', '"neg" holds 1; a text is a string or'),
        ('{"query": ["i", "q", "x"], "pos": ["p"]}', '"query" holds .*; a text is a string or'),
        ('{"text": ["u"]}', '"text" has 1 turns; user and assistant turns come in pairs'),
        ('{"text": {"a": 1}}', '"text" is .*; it must be a string or a list of strings'),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(line, message):
    with pytest.raises(InputError, match=f"f.jsonl:7: .*{message}"):
        parse(line)
