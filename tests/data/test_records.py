import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.data.records import EmbeddingRecord, GenerativeRecord, RecordError, parse_record
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import record_prompts

BYTES = Tokenizer.load("bytes")


def parse(line):
    return parse_record(line, "f.jsonl:7")


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
        ("[1]", "found a JSON list; it must be an object"),
        ('{"prompt": "x"}', r'keys \["prompt"\] belong to neither stream'),
        ('{"query": "q"}', '"pos" is missing or empty'),
        ('{"query": "q", "pos": "p"}', '"pos" is "p"; it must be a list'),
        ('{"query": "q", "pos": ["p"], "neg": [1]}', '"neg" holds 1; a text is a string or'),
        ('{"query": ["i", "q", "x"], "pos": ["p"]}', '"query" holds .*; a text is a string or'),
        ('{"text": ["u"]}', '"text" has 1 turns; user and assistant turns come in pairs'),
        ('{"query": "a", "query": "b", "pos": ["p"]}', 'key "query" appears twice'),
        (b'{"text": "\xff"}', "byte 11 is not UTF-8"),
        (r'{"text": "\ud800"}', r"\\ud800 is half of a surrogate pair"),
        ('{"text": ' + 5000 * "[" + 5000 * "]" + "}", "nested too deeply"),
        ('{"text": ' + 5000 * "9" + "}", "not valid JSON"),
        ('{"text": {"a": 1}}', '"text" is .*; it must be a string or a list of strings'),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(line, message):
    with pytest.raises(InputError, match=f"f.jsonl:7: .*{message}"):
        parse(line)


# Mostly JSON, often of nearly the right shape.
_TEXT = st.text(max_size=8) | st.sampled_from(["\ud800", "\x00", "\u2028", "<s>", ""])
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_ROW = st.dictionaries(st.sampled_from(["query", "pos", "neg", "text", "id"]), _VALUE | st.lists(_TEXT, max_size=3))
_LINE = (
    st.binary(max_size=60)
    | _ROW.map(lambda row: json.dumps(row).encode())
    | _ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.tuples(_ROW, st.integers(0, 40), st.binary(max_size=3)).map(
        lambda parts: json.dumps(parts[0]).encode()[: parts[1]] + parts[2] + json.dumps(parts[0]).encode()[parts[1] :]
    )
    | st.tuples(st.sampled_from([b"[", b'{"a":']), st.integers(1, 3000)).map(lambda parts: parts[0] * parts[1])
    | st.integers(4000, 5000).map(lambda digits: b'{"text": ' + b"9" * digits + b"}")
)


@settings(max_examples=400, deadline=None)
@given(_LINE)
def test_any_line_is_a_record_that_can_be_tokenized_or_a_named_fault(line):
    try:
        record = parse(line)
    except RecordError as error:
        assert str(error).startswith("f.jsonl:7: ")
        assert error.fault
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    else:
        assert tokenize_records([record], record_prompts, BYTES)
