import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.config import DataConfig, InputError, LossConfig, TrainConfig
from grit_jax.data import counting, schedule
from grit_jax.data import index as index_module
from grit_jax.data.examples import record_prompts, tokenize_records
from grit_jax.data.index import build_index, num_targets
from grit_jax.data.records import parse_record
from grit_jax.data.sources import open_source
from grit_jax.tokenizer import Tokenizer
from tests.runs import ROOT

BYTES = Tokenizer.load("bytes")
ARRAYS = ("text_starts", "num_positives", "lengths", "hashes", "span_starts", "spans")
ROWS = [
    {"query": ["do", "question"], "pos": ["answer one", "two"], "neg": ["no"]},
    {"query": "", "pos": ["something"]},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return open_source(path)


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
    index = build_index(open_source(tmp_path / "f.jsonl"), Tokenizer.load(folder))
    assert index.spans.tolist() == [[0, 4]]
    assert num_targets(index, 100).tolist() == [3]


def same(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ARRAYS)


def fingerprint(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_index(open_source(path), BYTES).fingerprint


def test_the_fingerprint_names_texts_and_apart_from_them_what_they_are_in_their_records(tmp_path):
    first = fingerprint(tmp_path / "a.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "c"]})
    assert fingerprint(tmp_path / "same.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "c"], "other": 1}) == first
    moved = fingerprint(tmp_path / "moved.jsonl", {"query": "q", "pos": ["a", "b"], "neg": ["c"]})
    assert (moved.texts, moved.structure != first.structure) == (first.texts, True)
    other = fingerprint(tmp_path / "other.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "d"]})
    assert (other.texts != first.texts, other.structure) == (True, first.structure)
    turns = ["u", "a", "v", "b"]
    four = fingerprint(tmp_path / "four.jsonl", {"text": turns})
    (prompt,) = record_prompts(parse_record(json.dumps({"text": turns}), path="f", line_number=1), BYTES)
    answer = prompt.text.partition("<|assistant|>\n")[2].removesuffix("</s>")
    two = fingerprint(tmp_path / "two.jsonl", {"text": ["u", answer]})
    assert (two.texts, two.structure != four.structure) == (four.texts, True)


def not_counted(monkeypatch):
    monkeypatch.setattr(counting, "count_records", lambda *_: pytest.fail("counted again"))


def test_a_second_call_maps_what_the_first_counted(source, monkeypatch):
    first = build_index(source, BYTES)
    not_counted(monkeypatch)
    second = build_index(source, BYTES)
    assert same(first, second)
    assert isinstance(second.lengths, np.memmap)
    assert len(list((source.path.parent / ".grit_index").iterdir())) == 1  # the shards are gone


def test_an_index_is_sent_to_a_worker_by_its_place(source):
    index = build_index(source, BYTES)
    sent = pickle.loads(pickle.dumps(index))
    assert same(index, sent)
    assert isinstance(sent.lengths, np.memmap)


def many(path, count=50):
    """Conversations of different lengths."""
    path.write_text("".join(json.dumps({"text": ["u" * (i % 7 + 1), "a" * (i % 11 + 1)]}) + "\n" for i in range(count)))
    return open_source(path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(counting, "SHARD", 8)
    monkeypatch.setattr(index_module, "SHARD", 8)


def test_shards_make_the_index_of_the_whole(tmp_path, small_shards):
    index = build_index(many(tmp_path / "f.jsonl"), BYTES)
    whole = counting.count_records(many(tmp_path / "f.jsonl"), 0, 50, BYTES)
    assert index.num_records == 50
    assert np.array_equal(index.lengths, whole.lengths)
    assert np.array_equal(index.spans, whole.spans)
    assert np.array_equal(np.diff(index.text_starts), whole.text_counts)
    assert np.array_equal(np.diff(index.span_starts), whole.span_counts)
    in_memory = dataclasses.replace(index, folder=None)
    assert in_memory.fingerprint == index.fingerprint


def test_an_interrupted_count_goes_on_with_what_is_missing(tmp_path, small_shards, monkeypatch):
    source, counted = many(tmp_path / "f.jsonl"), []
    count = counting.count_records

    def interrupted(source, start, stop, tokenizer):
        counted.append(start)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return count(source, start, stop, tokenizer)

    monkeypatch.setattr(counting, "count_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(source, BYTES)
    build_index(source, BYTES)
    assert counted == [0, 8, 16, 24, 24, 32, 40, 48]


def test_a_damaged_shard_is_counted_anew(tmp_path, small_shards, monkeypatch):
    source = many(tmp_path / "f.jsonl")
    expected = build_index(source, BYTES)
    for folder in (tmp_path / ".grit_index").iterdir():
        shutil.rmtree(folder)
    monkeypatch.setattr(index_module._Store, "merge", lambda _: None)
    with pytest.raises(InputError, match="cannot be read"):
        build_index(source, BYTES)
    monkeypatch.undo()
    (shards,) = (tmp_path / ".grit_index").iterdir()
    for number, shard in enumerate(sorted(shards.iterdir())):
        shard.write_bytes(shard.read_bytes()[: 100 * number])
    monkeypatch.setattr(index_module, "SHARD", 8)
    assert same(build_index(source, BYTES), expected)


HOST = """
import sys
from grit_jax.data import counting, index
from grit_jax.data.sources import open_source
from grit_jax.tokenizer import Tokenizer
from tests.runs import ROOT
counting.SHARD = index.SHARD = 100
counting._TWO_PROCESSES_FROM = 500
count, counted = counting.count_records, []
made = index.build_indexes([open_source(path) for path in sys.argv[1:]], Tokenizer.load("bytes"))
print([int(one.lengths.sum()) for one in made], [one.fingerprint for one in made])
"""


def test_hosts_that_start_together_count_in_processes_and_agree(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    expected = []
    for path, count in zip(paths, (1500, 700), strict=True):
        counts = counting.count_records(many(path, count), 0, count, BYTES)
        expected.append(int(counts.lengths.sum()))
    command = [sys.executable, "-c", HOST, *map(str, paths)]
    hosts = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert outputs[0].startswith(str(expected))
    assert outputs[0] == outputs[1]
    assert len(list((tmp_path / ".grit_index").iterdir())) == 2  # no shards and nothing partial is left


def test_a_host_whose_shards_another_has_joined_and_removed_has_the_others_index(tmp_path, small_shards, monkeypatch):
    source, others, replace = many(tmp_path / "f.jsonl"), [], os.replace

    def late(partial, path):
        if not others and ".shards" in str(path):
            others.append(None)
            others[0] = build_index(source, BYTES)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", late)
    assert same(build_index(source, BYTES), others[0])
    assert len(list((tmp_path / ".grit_index").iterdir())) == 1


BAD = ['{"text": ["u", "a"]}', "{", '{"text": 1}', '{"query": "q", "pos": ["p"]}', "[", '{"text": ["u", "b"]}']


def test_malformed_records_stop_with_file_line_and_remedy(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(BAD))
    with pytest.raises(InputError, match=r"f.jsonl:2: not valid JSON .*data.skip_bad=true"):
        build_index(open_source(path), BYTES)
    build_index(open_source(path), BYTES, skip_bad=True)
    with pytest.raises(InputError, match=r"f.jsonl:2: not valid JSON .*data.skip_bad=true"):
        build_index(open_source(path), BYTES)  # also where they have been counted


def test_skipped_records_are_counted_by_kind_and_leave_the_others_their_numbers(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(["oops", *BAD]))
    source = open_source(path, skip_bad=True)
    index = build_index(source, BYTES, skip_bad=True)
    assert index.num_records == 2
    assert [source[index.number(record)].turns for record in range(2)] == [("u", "a"), ("u", "b")]
    found = {bad.kind: (bad.count, [message.split(":")[1] for message in bad.examples]) for bad in index.bad}
    assert found == {
        "not valid JSON": (3, ["1", "3", "6"]),
        '"text" is no text': (1, ["4"]),
        "of the other stream": (1, ["5"]),
    }
    sent = pickle.loads(pickle.dumps(index))
    assert sent.bad == index.bad
    assert sent.number(1) == 6


def test_a_file_without_a_good_record_is_refused(tmp_path):
    (tmp_path / "f.jsonl").write_text("{\n[")
    with pytest.raises(InputError, match="none of its 2 records is well formed"):
        open_source(tmp_path / "f.jsonl", skip_bad=True)


# Lines of all kinds, some of them good.
LINE = st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")) | st.sampled_from(
    [b'{"text": ["u", "a"]}', b'{"text": "plain"}', b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": 1e999}',
     b'{"query": "q", "pos": ["p"]}', b'{"text": "a", "text": "b"}', b"[" * 2000, b'\xef\xbb\xbf{"text": "mark"}']
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(LINE, max_size=12))
def test_no_line_is_lost_and_none_raises_but_with_file_and_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "f.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "good"}', *lines]))
    source = open_source(path, skip_bad=True)
    index = build_index(source, BYTES, skip_bad=True)
    blank = sum(not line.strip(b" \t\r\n\v\f") for line in lines)
    assert index.num_records + sum(bad.count for bad in index.bad) == 1 + len(lines) - blank
    plans = schedule.Schedule(
        [index], data=DataConfig(generative_batch=2), loss=LossConfig(), train=TrainConfig(mode="generative"),
        row_multiples=(1, 1),
    )  # fmt: skip
    report = "\n".join(plans.report())
    assert all(f"skipped {bad.count}" in report and bad.examples[0] in report for bad in index.bad)
    if index.bad:
        with pytest.raises(InputError, match=r"f.jsonl:\d+: "):
            build_index(open_source(path), BYTES)


def test_another_tokenizer_or_file_is_counted_anew(source):
    assert build_index(source, BYTES).num_records == 2
    with source.path.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert build_index(open_source(source.path), BYTES).num_records == 3


@pytest.mark.parametrize("damage", ["cut", "missing", "meta"])
def test_a_damaged_index_is_counted_anew(source, damage):
    first = build_index(source, BYTES)
    lengths, folder = first.lengths.tolist(), first.folder
    if damage == "cut":
        (folder / "lengths.npy").write_bytes((folder / "lengths.npy").read_bytes()[:130])
    elif damage == "missing":
        (folder / "spans.npy").unlink()
    else:
        (folder / "meta.json").write_text("{")
    assert build_index(source, BYTES).lengths.tolist() == lengths


@pytest.mark.parametrize("name", ["lengths.npy", "spans.npy", "meta.json"])
def test_a_flipped_bit_of_an_index_is_named_and_the_file_counted_anew(source, name, caplog):
    first = build_index(source, BYTES)
    expected, damaged = first.fingerprint, bytearray((first.folder / name).read_bytes())
    damaged[-3] ^= 1
    (first.folder / name).write_bytes(damaged)
    again = build_index(source, BYTES)
    assert again.fingerprint == expected
    assert f"{first.folder}: damaged ({name} differs from its checksum)" in caplog.text
    assert (first.folder / name).read_bytes() != damaged


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


def test_a_file_that_changes_between_opening_and_counting_is_not_indexed(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"text": "one"}\n')
    source = open_source(path)
    with path.open("a") as file:
        file.write('{"text": "two"}\n')
    with pytest.raises(InputError, match=r"g.jsonl: has changed since the file was indexed"):
        build_index(source, BYTES)
    assert build_index(open_source(path), BYTES).num_records == 2
