import json

import numpy as np
import pytest
import safetensors.numpy

from grit_jax.data import index as index_module
from grit_jax.data.examples import tokenize_records
from grit_jax.data.index import build_index, num_targets
from grit_jax.data.records import parse_record
from grit_jax.data.sources import JsonlSource
from grit_jax.tokenizer import Tokenizer

BYTES = Tokenizer.load("bytes")
ROWS = [
    {"query": ["do", "question"], "pos": ["answer one", "two"], "neg": ["no"]},
    {"query": "", "pos": ["something"]},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return JsonlSource(path)


def test_counts_are_those_of_the_tokens(source):
    index = build_index(source, BYTES)
    tokenized = [text for record in tokenize_records(list(source), BYTES) for text in record]
    assert index.text_starts.tolist() == [0, 4, 6]
    assert index.num_positives.tolist() == [2, 1]
    assert index.lengths.tolist() == [len(text.tokens) for text in tokenized]
    assert index.spans.tolist() == [span for text in tokenized for span in text.spans.tolist()]
    assert np.diff(index.span_starts).tolist() == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("limit", [5, 12, 25, 1000])
def test_targets_are_span_tokens_within_the_limit(source, limit):
    tokenized = [text for record in tokenize_records(list(source), BYTES) for text in record]
    expected = [sum(max(0, min(end, limit) - min(start, limit)) for start, end in text.spans) for text in tokenized]
    assert num_targets(build_index(source, BYTES), limit).tolist() == expected


def test_the_first_token_of_a_text_is_never_a_target(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    settings = {"bos_token": None, "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(BYTES.files()["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "f.jsonl").write_text('{"text": "abcd"}\n')
    index = build_index(JsonlSource(tmp_path / "f.jsonl"), Tokenizer.load(folder))
    assert index.spans.tolist() == [[0, 4]]
    assert num_targets(index, 100).tolist() == [3]


def test_a_second_call_reads_what_the_first_counted(source, monkeypatch):
    first = build_index(source, BYTES)
    monkeypatch.setattr(index_module, "_count", lambda *_: pytest.fail("counted again"))
    second = build_index(source, BYTES)
    assert np.array_equal(first.lengths, second.lengths)
    assert np.array_equal(first.hashes, second.hashes)


def test_another_tokenizer_or_file_is_counted_anew(source):
    assert build_index(source, BYTES).num_records == 2
    with source.path.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert build_index(JsonlSource(source.path), BYTES).num_records == 3


def test_a_damaged_cache_is_counted_anew(source):
    first = build_index(source, BYTES)
    (cache,) = (source.path.parent / ".grit_index").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert np.array_equal(build_index(source, BYTES).lengths, first.lengths)


def test_tokens_and_pooled_spans_equal_the_recorded_ones_of_the_reference(shared):
    tokenizer = Tokenizer.load(shared / "golden/tokenizer")
    recorded = json.loads((shared / "golden/collator/instruct.json").read_text())
    arrays = safetensors.numpy.load_file(shared / "golden/collator/instruct.safetensors")

    def real(name, row):
        return arrays[f"{name}.input_ids"][row][arrays[f"{name}.attention_mask"][row] == 1]

    for row, (query, passages, turns) in enumerate(recorded["features"]):
        lines = {"query": query, "pos": passages[:1], "neg": passages[1:]}, {"text": turns}
        records = [parse_record(json.dumps(line), path="f", line_number=1) for line in lines]
        (query, *passages), (conversation,) = tokenize_records(records, tokenizer)
        assert np.array_equal(query.tokens[:96], real("query", row))
        assert query.spans[0, 0] == arrays["query.instruction_lens"][row]
        for number, passage in enumerate(passages):
            assert np.array_equal(passage.tokens[:96], real("passage", 2 * row + number))
        assert np.array_equal(conversation.tokens[:160], real("generative", row))
        if len(turns) == 2:  # the reference's labels of later turns drift; ours are proved in test_prompts
            labels = arrays["generative.labels"][row]
            scored = np.flatnonzero(labels != -100)
            assert scored.tolist() == list(range(conversation.spans[0, 0], min(conversation.spans[0, 1], 160)))
