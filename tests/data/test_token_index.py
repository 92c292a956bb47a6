import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax import files
from grit_jax.config import Config, DataConfig, TrainConfig
from grit_jax.data import derived, index_builder, schedule, sources, tokenizing
from grit_jax.data.records import parse_record
from grit_jax.data.sources import open_source
from grit_jax.data.streams import trained_streams
from grit_jax.data.token_index import num_targets
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer
from tests.commands import ROOT
from tests.data.reading import build_index, build_indexes, read_by, reading, record_prompts
from tests.data.test_sources import write

BYTES = Tokenizer.load("bytes")
ARRAYS = ("text_starts", "num_positives", "lengths", "hashes", "span_starts", "spans", "lines")
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
    index = build_index(source.path, BYTES)
    tokenized = [text for record in tokenize_records(list(source), record_prompts, BYTES) for text in record]
    assert index.text_starts.tolist() == [0, 4, 6]
    assert index.num_positives.tolist() == [2, 1]
    assert index.lengths.tolist() == [len(text.tokens) for text in tokenized]
    assert index.spans.tolist() == [span for text in tokenized for span in text.spans.tolist()]
    assert index.tokens.tolist() == [token for text in tokenized for token in text.tokens.tolist()]
    assert index.token_starts.tolist() == [0, *np.cumsum(index.lengths)]
    assert index.endings.tolist() == [0] * 6
    assert index.tokens.dtype == np.uint16
    assert index.lines is None
    assert np.diff(index.span_starts).tolist() == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("limit", [5, 12, 25, 1000])
def test_targets_are_span_tokens_within_the_limit(source, limit):
    tokenized = [text for record in tokenize_records(list(source), record_prompts, BYTES) for text in record]
    expected = [sum(max(0, min(end, limit) - min(start, limit)) for start, end in text.spans) for text in tokenized]
    assert num_targets(build_index(source.path, BYTES), limit, first=0).tolist() == expected


def test_the_first_token_of_a_text_is_never_a_target(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    settings = {"bos_token": None, "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(BYTES.files()["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "f.jsonl").write_text('{"text": "abcd"}\n')
    index = build_index(tmp_path / "f.jsonl", Tokenizer.load(folder))
    assert index.spans.tolist() == [[0, 4]]
    assert num_targets(index, 100, first=1).tolist() == [3]


def same(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ARRAYS)


def fingerprint(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_index(path, BYTES).fingerprint


def test_the_fingerprint_names_texts_and_apart_from_them_what_they_are_in_their_records(tmp_path):
    first = fingerprint(tmp_path / "a.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "c"]})
    assert fingerprint(tmp_path / "same.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "c"], "other": 1}) == first
    moved = fingerprint(tmp_path / "moved.jsonl", {"query": "q", "pos": ["a", "b"], "neg": ["c"]})
    assert (moved.texts, moved.structure != first.structure) == (first.texts, True)
    other = fingerprint(tmp_path / "other.jsonl", {"query": "q", "pos": ["a"], "neg": ["b", "d"]})
    assert (other.texts != first.texts, other.structure) == (True, first.structure)
    turns = ["u", "a", "v", "b"]
    four = fingerprint(tmp_path / "four.jsonl", {"text": turns})
    (prompt,) = record_prompts(parse_record(json.dumps({"text": turns}), "f:1"), BYTES)
    answer = prompt.text.partition("<|assistant|>\n")[2].removesuffix("</s>")
    two = fingerprint(tmp_path / "two.jsonl", {"text": ["u", answer]})
    assert (two.texts, two.structure != four.structure) == (four.texts, True)


def test_the_fingerprint_names_the_tokens_and_their_endings_apart_from_all_else(source):
    index = dataclasses.replace(build_index(source.path, BYTES), folder=None)
    for change in ({"tokens": index.tokens[::-1].copy()}, {"endings": index.endings + np.uint8(1)}):
        other = dataclasses.replace(index, **change).fingerprint
        assert other[:2] == index.fingerprint[:2]
        assert other.tokens != index.fingerprint.tokens


def not_counted(monkeypatch):
    monkeypatch.setattr(tokenizing, "tokenize_range", lambda *_, **__: pytest.fail("tokenized again"))


def test_a_second_call_maps_what_the_first_counted(source, monkeypatch):
    first = build_index(source.path, BYTES)
    not_counted(monkeypatch)
    second = build_index(source.path, BYTES)
    assert same(first, second)
    assert isinstance(second.lengths, np.memmap)
    assert isinstance(second.tokens, np.memmap)
    assert len(list((source.path.parent / ".grit_index").iterdir())) == 1  # the shards are gone


def many(path, count=50):
    """Conversations of different lengths."""
    path.write_text("".join(json.dumps({"text": ["u" * (i % 7 + 1), "a" * (i % 11 + 1)]}) + "\n" for i in range(count)))
    return open_source(path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokenizing, "SHARD", 8)
    monkeypatch.setattr(index_builder, "SHARD", 8)


def test_shards_make_the_index_of_the_whole(tmp_path, small_shards):
    index = build_index(many(tmp_path / "f.jsonl").path, BYTES)
    whole = tokenizing.tokenize_range(reading(many(tmp_path / "f.jsonl")), 0, 50, BYTES)
    assert index.num_records == 50
    assert np.array_equal(index.lengths, whole.lengths)
    assert np.array_equal(index.spans, whole.spans)
    assert np.array_equal(np.diff(index.text_starts), whole.text_counts)
    assert np.array_equal(np.diff(index.span_starts), whole.span_counts)
    in_memory = dataclasses.replace(index, folder=None)
    assert in_memory.fingerprint == index.fingerprint


def test_an_interrupted_count_goes_on_with_what_is_missing(tmp_path, small_shards, monkeypatch):
    source, counted = many(tmp_path / "f.jsonl"), []
    count = tokenizing.tokenize_range

    def interrupted(reading, start, stop, tokenizer, *, tokens):
        counted.append(start)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return count(reading, start, stop, tokenizer, tokens=tokens)

    monkeypatch.setattr(tokenizing, "tokenize_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(source.path, BYTES)
    build_index(source.path, BYTES)
    assert counted == [0, 8, 16, 24, 24, 32, 40, 48]


def test_a_damaged_shard_is_counted_anew(tmp_path, small_shards, monkeypatch):
    source = many(tmp_path / "f.jsonl")
    expected = build_index(source.path, BYTES)
    for folder in (tmp_path / ".grit_index").iterdir():
        shutil.rmtree(folder)
    monkeypatch.setattr(index_builder._Builder, "merge", lambda _: None)
    with pytest.raises(InputError, match="cannot be read"):
        build_index(source.path, BYTES)
    monkeypatch.undo()
    (folder,) = (tmp_path / ".grit_index").iterdir()
    for number, shard in enumerate(sorted(folder.iterdir())):
        shard.write_bytes(shard.read_bytes()[: 100 * number])
    monkeypatch.setattr(index_builder, "SHARD", 8)
    assert same(build_index(source.path, BYTES), expected)


HOST = """
import sys
from grit_jax.data import index_builder, tokenizing
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import build_indexes
tokenizing.SHARD = index_builder.SHARD = 100
tokenizing._TWO_PROCESSES_FROM = 500
made = build_indexes(sys.argv[1:], Tokenizer.load("bytes"))
print([int(one.lengths.sum()) for one in made], [one.fingerprint for one in made])
"""


def test_hosts_that_start_together_count_in_processes_and_agree(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    expected = []
    for path, count in zip(paths, (1500, 700), strict=True):
        counts = tokenizing.tokenize_range(reading(many(path, count)), 0, count, BYTES)
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
            others[0] = build_index(source.path, BYTES)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", late)
    assert same(build_index(source.path, BYTES), others[0])
    assert len(list((tmp_path / ".grit_index").iterdir())) == 1


BAD = ['{"text": ["u", "a"]}', "{", '{"text": 1}', '{"query": "q", "pos": ["p"]}', "[", '{"text": ["u", "b"]}']


def test_malformed_records_stop_with_file_line_and_remedy(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(BAD))
    with pytest.raises(InputError, match=r"f.jsonl:2: not valid JSON .*data.skip_bad=true"):
        build_index(path, BYTES)
    build_index(path, BYTES, skip_bad=True)
    with pytest.raises(InputError, match=r"f.jsonl:2: not valid JSON .*data.skip_bad=true"):
        build_index(path, BYTES)  # also where they have been counted


def test_skipped_records_are_counted_by_kind_and_leave_the_others_their_numbers(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(["oops", *BAD]))
    source = open_source(path, skip_bad=True)
    index = build_index(source.path, BYTES, skip_bad=True)
    assert index.num_records == 2
    assert index.line_numbers(np.arange(2)).tolist() == [2, 7]
    found = {bad.fault: (bad.count, [message.split(":")[1] for message in bad.examples]) for bad in index.bad}
    assert found == {
        "not valid JSON": (3, ["1", "3", "6"]),
        '"text" is not a text': (1, ["4"]),
        "of the other stream": (1, ["5"]),
    }
    assert build_index(path, BYTES, skip_bad=True).bad == index.bad


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
    index = build_index(source.path, BYTES, skip_bad=True)
    blank = sum(not line.strip(b" \t\r\n\v\f") for line in lines)
    assert index.num_records + sum(bad.count for bad in index.bad) == 1 + len(lines) - blank
    config = Config(data=DataConfig(generative_batch=2), train=TrainConfig(mode="generative"))
    streams = trained_streams(config)
    read = read_by([index], config, streams)
    plans = schedule.Schedule(read, streams, data=config.data, train=config.train, num_shards=1)
    report = "\n".join(plans.summary())
    assert all(f"skipped {bad.count}" in report and bad.examples[0] in report for bad in index.bad)
    if index.bad:
        with pytest.raises(InputError, match=r"f.jsonl:\d+: "):
            build_index(path, BYTES)


def test_another_tokenizer_or_file_is_counted_anew(source):
    assert build_index(source.path, BYTES).num_records == 2
    with source.path.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert build_index(source.path, BYTES).num_records == 3


@pytest.mark.parametrize("damage", ["cut", "cut tokens", "missing", "meta"])
def test_a_damaged_index_is_counted_anew(source, damage):
    first = build_index(source.path, BYTES)
    lengths, folder = first.lengths.tolist(), first.folder
    if damage == "cut":
        (folder / "lengths.npy").write_bytes((folder / "lengths.npy").read_bytes()[:130])
    elif damage == "cut tokens":
        (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-1])
    elif damage == "missing":
        (folder / "spans.npy").unlink()
    else:
        (folder / "meta.json").write_text("{")
    assert build_index(source.path, BYTES).lengths.tolist() == lengths


@pytest.mark.parametrize("name", ["lengths.npy", "spans.npy", "token_starts.npy", "checksums.npy", "meta.json"])
def test_a_flipped_bit_of_an_index_is_named_and_the_file_counted_anew(source, name, caplog):
    first = build_index(source.path, BYTES)
    expected, damaged = first.fingerprint, bytearray((first.folder / name).read_bytes())
    damaged[-3] ^= 1
    (first.folder / name).write_bytes(damaged)
    again = build_index(source.path, BYTES)
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
        records = [parse_record(json.dumps(line), "f:1") for line in lines]
        (query, *passages), (conversation,) = tokenize_records(records, record_prompts, tokenizer)
        assert np.array_equal(query.tokens[:96], real("query", row))
        assert query.spans[0, 0] == arrays["query.instruction_lens"][row]
        for number, passage in enumerate(passages):
            assert np.array_equal(passage.tokens[:96], real("passage", 2 * row + number))
        assert np.array_equal(conversation.tokens[:160], real("generative", row))
        if len(turns) == 2:  # the reference's labels of later turns drift; ours are proved in test_prompts
            labels = arrays["generative.labels"][row]
            scored = np.flatnonzero(labels != -100)
            assert scored.tolist() == list(range(conversation.spans[0, 0], min(conversation.spans[0, 1], 160)))


def test_a_file_that_changes_while_it_is_tokenized_is_not_indexed(tmp_path, monkeypatch):
    path = tmp_path / "g.jsonl"
    path.write_text('{"text": "one"}\n')
    tokenize_range = tokenizing.tokenize_range

    def changing(*args, **options):
        with path.open("a") as file:
            file.write('{"text": "two"}\n')
        return tokenize_range(*args, **options)

    monkeypatch.setattr(tokenizing, "tokenize_range", changing)
    with pytest.raises(InputError, match=r"g.jsonl: has changed since the file was indexed"):
        build_index(path, BYTES)
    monkeypatch.undo()
    assert build_index(path, BYTES).num_records == 2


def kept(folder):
    """The names of what is kept beside a file."""
    return {path.name for path in (folder / ".grit_index").iterdir()}


def test_lengths_alone_are_those_of_an_index_with_tokens_which_replaces_them(source, monkeypatch):
    folder = source.path.parent
    lengths = build_index(source.path, BYTES, tokens=False)
    (name,) = kept(folder)
    assert lengths.tokens is lengths.token_starts is lengths.endings is None
    assert lengths.fingerprint.tokens == ""
    whole = build_index(source.path, BYTES)
    assert same(lengths, whole)
    assert lengths.fingerprint[:2] == whole.fingerprint[:2]
    assert len(kept(folder)) == 1
    assert name not in kept(folder)
    not_counted(monkeypatch)
    assert build_index(source.path, BYTES, tokens=False).folder == whole.folder


def test_a_model_with_fewer_rows_has_an_index_of_its_own_and_refuses_later_tokens_by_line(source):
    build_index(source.path, BYTES)
    fewer = Tokenizer(BYTES._backend, bos=BYTES.bos, eos=BYTES.eos, rows=200)
    assert fewer.fingerprint == BYTES.fingerprint
    with pytest.raises(InputError, match=r"f.jsonl:1: text 0: '<s>' is token 256, and .* table has 200 rows"):
        build_index(source.path, fewer)


def test_what_other_versions_and_formats_of_a_file_have_left_goes_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, users = derived.local_folders(epath.Path(tmp_path / "f.jsonl"))
    many(tmp_path / "f.jsonl")
    with monkeypatch.context() as earlier:
        earlier.setattr(derived, "_FORMAT", 4)
        build_index(tmp_path / "f.jsonl", BYTES)
    (first,) = beside.iterdir()
    shutil.copytree(first, users / first.name)
    shutil.copytree(first, beside / f".{first.name}.0123.partial")  # of a process that was killed
    others = {build_index(many(tmp_path / name).path, BYTES).folder for name in ("g.jsonl", "ff.jsonl")}
    second = build_index(tmp_path / "f.jsonl", BYTES)
    second.folder.rename(beside / f".{second.folder.name}.0123.partial")
    second = build_index(tmp_path / "f.jsonl", BYTES)
    assert {*beside.iterdir(), *users.iterdir()} == {second.folder, *others}
    third = build_index(many(tmp_path / "f.jsonl", 51).path, BYTES)
    assert {*beside.iterdir(), *users.iterdir()} == {third.folder, *others}
    assert second.kept_tokens(np.arange(50), second.lengths[:]).tolist()[:3] == [256, 27, 91]  # whoever has it mapped


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.array_record", "f.jsonl"])
def test_once_there_is_an_index_nothing_else_is_kept_and_the_file_is_not_opened(tmp_path, name, monkeypatch):
    path = write(tmp_path / name)
    monkeypatch.setattr(sources, "_KEPT_FROM", 1)
    index = build_index(path, BYTES)
    assert kept(tmp_path) == {index.folder.name}
    monkeypatch.setattr(index_builder, "open_source", lambda *_, **__: pytest.fail("opened again"))
    assert same(build_index(path, BYTES), index)


def test_tokens_have_the_smallest_type_that_holds_the_vocabulary():
    class Sized:
        def __init__(self, vocab_size):
            self.vocab_size = vocab_size

    sizes = {256: np.uint8, 257: np.uint16, 1 << 16: np.uint16, (1 << 16) + 1: np.uint32}
    assert {size: tokenizing.token_type(Sized(size)) for size in sizes} == sizes


def disks(monkeypatch, **free):
    """Makes the folders whose paths end in these names lie on disks with so many bytes free."""
    usage = shutil.disk_usage

    def looked(folder):
        return usage(folder)._replace(free=next(size for name, size in free.items() if str(folder).endswith(name)))

    monkeypatch.setattr(shutil, "disk_usage", looked)


def test_without_room_nothing_is_made_and_folder_need_and_remedy_are_named(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disks(monkeypatch, grit_index=100, index=200)
    with pytest.raises(InputError) as error:
        build_index(source.path, BYTES)
    assert re.fullmatch(
        rf"{source.path}: its tokens need about 0.00 GiB on a disk while they are made, and {tmp_path}/.grit_index has "
        rf"0.00 GiB and {tmp_path}/cache/grit_jax/index has 0.00 GiB left; make room there, or set XDG_CACHE_HOME to a "
        r"folder with room",
        str(error.value),
    )
    assert not kept(tmp_path)
    assert build_index(source.path, BYTES, tokens=False).num_records == 2


def test_tokens_go_where_there_is_room_and_files_do_not_count_on_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [many(tmp_path / name).path for name in ("a.jsonl", "b.jsonl")]
    need = 4 * os.stat(paths[0]).st_size  # two copies of two bytes a token
    disks(monkeypatch, grit_index=need * 3 // 2, index=need * 3)
    monkeypatch.setattr(index_builder, "_estimated_tokens", index_builder._most_tokens)
    folders = [index.folder.parent for index in build_indexes(paths, BYTES)]
    assert folders == [tmp_path / ".grit_index", tmp_path / "cache/grit_jax/index"]
    assert kept(tmp_path) == {build_index(paths[0], BYTES).folder.name}


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_the_data_cannot_be_written_to_tokens_go_to_the_users_cache(source, tmp_path, monkeypatch):
    (tmp_path / ".grit_index").touch()  # no folder can be made there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = build_index(source.path, BYTES)
    assert [*(tmp_path / "cache/grit_jax/index").iterdir()] == [index.folder]
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.path))
    with pytest.raises(InputError, match=r"neither .*/.grit_index nor .*/f.jsonl/grit_jax/index can be written to"):
        build_index(source.path, BYTES)


@pytest.mark.parametrize("when", ["a shard is written", "shards are joined"])
def test_a_disk_that_fills_up_all_the_same_ends_with_its_name_and_the_remedy(source, when, monkeypatch):
    if when == "shards are joined":
        monkeypatch.setattr(index_builder._ArrayFile, "add", full)
    else:
        write_bytes = files.write_bytes
        monkeypatch.setattr(
            files, "write_bytes", lambda path, content: (full if path.suffix == ".npz" else write_bytes)(path, content)
        )
    with pytest.raises(InputError, match=r".grit_index.*: cannot be written .*No space left.*; make room there, or "):
        build_index(source.path, BYTES)
