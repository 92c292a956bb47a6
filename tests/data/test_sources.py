import gzip
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax import files
from grit_jax.data import sources
from grit_jax.data.records import GenerativeRecord
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.text_files import read_lines
from grit_jax.errors import InputError
from tests.bucket import BUCKET, emulator
from tests.commands import ROOT

LINES = '{"text": "one"}\n\n   \n{"text": "two"}\n{"text": "three"}'


def write(path, text=LINES):
    """Writes lines in the format of the file's ending."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        half = len(text) // 2  # two frames, as tools that work in parallel write them
        path.write_bytes(b"".join(zstandard.compress(part.encode()) for part in (text[:half], text[half:])))
    elif path.suffix == ".array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in text.split("\n"):
            if line.strip():
                writer.write(line.encode())
        writer.close()
    else:
        path.write_text(text)
    return path


@pytest.fixture(params=["f.jsonl", "f.jsonl.gz", "f.jsonl.zst", "f.array_record"])
def path(request, tmp_path):
    return write(tmp_path / request.param)


def test_records_by_number_without_blank_lines(path):
    source = open_source(path)
    assert [record.turns for record in source] == ["one", "two", "three"]
    assert source[1] == GenerativeRecord("two")
    assert source.record_type is GenerativeRecord


def test_errors_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": 2}\n')
    with pytest.raises(InputError, match=r"f.jsonl:3: "):
        open_source(path)[1]


def test_errors_of_an_array_record_name_the_entry(tmp_path):
    source = open_source(write(tmp_path / "f.array_record", '{"text": "one"}\n{"text": 2}'))
    with pytest.raises(InputError, match=r"f.array_record:2: "):
        source[1]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_read_of_an_array_record_that_the_disk_fails_is_tried_again(tmp_path, recovers, monkeypatch):
    path = write(tmp_path / "f.array_record", "\n".join(f'{{"text": "{n}{"x" * 500}"}}' for n in range(200)))
    source = open_source(path)
    folder = "/proc/self/fd"
    (number,) = [int(fd) for fd in os.listdir(folder) if os.path.realpath(f"{folder}/{fd}") == str(path)]
    good, failing = os.dup(number), os.open("/proc/self/mem", os.O_RDONLY)  # whose first pages give EIO
    os.dup2(failing, number)
    monkeypatch.setattr(files.time, "sleep", lambda _: os.dup2(good, number) if recovers else None)
    try:
        if recovers:
            assert source[100].turns.startswith("100x")
        else:
            with pytest.raises(files.UnreachableError, match=r"f.array_record: cannot be reached.*Input/output"):
                source[100]
    finally:
        os.close(good)
        os.close(failing)


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl.zst"])
def test_a_packed_file_is_unpacked_once_and_mapped(tmp_path, name, monkeypatch):
    path = write(tmp_path / name)
    open_source(path)
    (copy,) = (tmp_path / ".grit_index").iterdir()
    assert copy.read_text() == LINES
    monkeypatch.setattr(sources.derived, "read_blocks", lambda _: pytest.fail("unpacked again"))
    assert len(open_source(path)) == 3
    assert find_files(str(tmp_path)) == [path]  # the copy is no data file


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl.zst", "f.array_record"])
def test_a_file_cut_short_is_refused(tmp_path, name):
    path = write(tmp_path / name, "".join(f'{{"text": "{i * 7919 % 10007}"}}\n' for i in range(5000)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    with pytest.raises(InputError, match=r"cannot be read|not a whole ArrayRecord file"):
        open_source(path)
    folder = tmp_path / ".grit_index"
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "f.jsonl.gz")
    tmp_path.chmod(0o500)
    assert len(open_source(path)) == 3
    assert not (tmp_path / ".grit_index").exists()


def test_where_the_data_cannot_be_written_the_users_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data/f.jsonl.gz")
    (tmp_path / "data/.grit_index").touch()  # no folder can be made there
    assert len(open_source(path)) == 3
    assert list((tmp_path / "cache").rglob("f.jsonl.gz-*.copy"))


def expected_places(data):
    offset, places = 0, []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip(b" \t\r\n\v\f"):
            places.append((offset, number))
        offset += len(line) + 1
    return places


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"\n", b" ", b"\r", b"{}", b"abc"]), max_size=40), st.integers(1, 12))
def test_lines_are_found_block_by_block(parts, scanned):
    data = b"".join(parts)
    before, sources._SCANNED = sources._SCANNED, scanned
    try:
        found = sources._line_offsets(data)
    finally:
        sources._SCANNED = before
    expected = expected_places(data)
    numbers = found[1] if len(found) > 1 else np.arange(len(expected)) + 1
    assert list(zip(found[0].tolist(), numbers.tolist(), strict=True)) == expected


def test_places_of_many_lines_are_kept(path, monkeypatch):
    monkeypatch.setattr(sources, "_KEPT_FROM", 1)
    assert [record.turns for record in open_source(path)] == ["one", "two", "three"]
    monkeypatch.setattr(sources, "_line_offsets", lambda _: pytest.fail("found again"))
    source = open_source(path)
    assert source[2].turns == "three"
    assert source.line_number(2) == (3 if path.suffix == ".array_record" else 5)


PROGRAM = """
import sys
import numpy as np
from etils import epath
from grit_jax.data import tokenizing
from grit_jax.data.sources import find_files, open_source
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import build_index
local, remote = map(epath.Path, sys.argv[1:3])
if sys.argv[3] == "first":
    (remote / "more").mkdir(parents=True, exist_ok=True)
    for file in local.iterdir():
        (remote / "more" / file.name).write_bytes(file.read_bytes())
else:
    tokenizing.tokenize_range = None  # another host has tokenized
for path in find_files(str(remote)):
    index = build_index(path, Tokenizer.load("bytes"))
    text = Tokenizer.load("bytes").decode(index.kept_tokens(np.arange(3), index.lengths[:]))
    print(path.name, [record.turns for record in open_source(path)], index.lengths.tolist(), text)
print(len({path.name for path in (remote / "more" / ".grit_index").iterdir()}))
"""


def test_every_format_is_read_from_a_bucket_and_its_hosts_share_their_counts(tmp_path):
    local = tmp_path / "data"
    local.mkdir()
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.array_record"]
    for name in names:
        write(local / name)
    done = []
    with emulator() as environment:
        for host in ("first", "second"):
            environment["XDG_CACHE_HOME"] = str(tmp_path / host)
            command = [sys.executable, "-c", PROGRAM, str(local), f"gs://{BUCKET}/data", host]
            done.append(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180))
    for run in done:
        expected = [f"{name} ['one', 'two', 'three'] [4, 4, 6] onetwothree" for name in names]
        assert run.stdout.splitlines() == [*expected, "4"], run.stderr


STALE = """
import os, sys
from pathlib import Path
from grit_jax import files
from grit_jax.data.sources import open_source
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import build_index
root = sys.argv[1]
tokenizer = Tokenizer.load("bytes")
cache = Path(os.environ["XDG_CACHE_HOME"]) / "grit_jax" / "index"
for folder in ("one", "two"):
    files.write_text(f"{root}/{folder}/a.jsonl", '{"text": "first"}\\n')
    source = open_source(f"{root}/{folder}/a.jsonl")
    build_index(source.path, tokenizer)
before = set(os.listdir(cache))
assert len(before) == 2, before  # the copies are gone
files.write_text(f"{root}/two/a.jsonl", '{"text": "second, which is longer"}\\n')
again = open_source(f"{root}/two/a.jsonl")
build_index(again.path, tokenizer)
after = set(os.listdir(cache))
assert len(after) == 2 and len(after & before) == 1, (before, after)
assert len(files.names(f"{root}/two/.grit_index")) == 1
assert (source[0].turns, again[0].turns) == ("first", "second, which is longer")
print("cleaned")
"""


def test_what_was_made_from_an_old_version_of_a_file_in_a_bucket_goes_and_its_readers_go_on(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        command = [sys.executable, "-c", STALE, f"gs://{BUCKET}"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout == "cleaned\n", done.stderr


def test_a_record_of_the_other_stream_is_refused(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\n{"query": "q", "pos": ["p"]}\n')
    with pytest.raises(InputError, match=r"f.jsonl:2: embedding record in a file of generative records"):
        open_source(path)[1]


def test_folders_are_searched_and_files_named_once(tmp_path):
    for name in ("b/x.jsonl", "a.jsonl.gz", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path), str(tmp_path / "b/x.jsonl")])
    assert [path.name for path in found] == ["a.jsonl.gz", "x.jsonl"]


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        find_files(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"notes.txt: not a .jsonl, .*or .arrayrecord file"):
        find_files(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match=r"folder: no .jsonl, .*or .arrayrecord file in this folder"):
        find_files(str(tmp_path / "folder"))
    with pytest.raises(InputError, match=r"empty.jsonl: the file is empty"):
        open_source(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match=r"broken.jsonl.gz: cannot be read"):
        open_source(tmp_path / "broken.jsonl.gz")


def test_the_published_formats_parse(shared):
    for path in find_files(str(shared / "data/train/embedding")) + find_files(str(shared / "data/tiny")):
        source = open_source(path)
        assert all(source[number] for number in range(0, len(source), 97))


def test_what_is_hidden_or_left_by_editors_is_no_data(tmp_path):
    names = [
        "x.jsonl", ".git/a.jsonl", ".ipynb_checkpoints/x-checkpoint.jsonl", ".cache/huggingface/b.jsonl", ".c.jsonl",
        ".#x.jsonl", "#x.jsonl#", "x.jsonl~", ".x.jsonl.swp", "._x.jsonl", "__MACOSX/._x.jsonl", "deep/.x/d.jsonl",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert find_files(str(tmp_path)) == [tmp_path / "x.jsonl"]
    assert find_files(str(tmp_path / ".cache")) == [tmp_path / ".cache/huggingface/b.jsonl"]  # it is asked for


def test_pipes_and_sockets_are_no_data_and_nothing_waits_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl.gz")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl"))
        (tmp_path / "null.jsonl").symlink_to("/dev/null")
        (tmp_path / "x.jsonl").write_text(LINES)
        assert find_files(str(tmp_path)) == [tmp_path / "x.jsonl"]
        for name in ("pipe.jsonl", "s.jsonl", "null.jsonl"):
            with pytest.raises(InputError, match=rf"{name}: a pipe, a socket or a device; put the data in a file"):
                find_files(str(tmp_path / name))
            with pytest.raises(InputError, match=rf"{name}: cannot be read: it is a pipe, a socket or a device"):
                open_source(tmp_path / name)
            with pytest.raises(InputError, match=rf"{name}: cannot be read: it is a pipe, a socket or a device"):
                list(read_lines(tmp_path / name))
        with pytest.raises(InputError, match=r"pipe.jsonl.gz: cannot be read: it is a pipe"):
            open_source(tmp_path / "pipe.jsonl.gz")


@pytest.mark.parametrize("other", ["x.jsonl.gz", "x.jsonl.zst", "x.array_record"])
def test_a_file_beside_its_packed_copy_is_refused(tmp_path, other):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep/x.jsonl")
    write(tmp_path / "deep" / other)
    first, second = sorted([tmp_path / "deep/x.jsonl", tmp_path / "deep" / other])
    for named in (str(tmp_path), [str(second), str(first)]):
        with pytest.raises(
            InputError, match=r"the same data twice, by their names; remove or rename one of them"
        ) as caught:
            find_files(named)
        assert str(first) in str(caught.value)
        assert str(second) in str(caught.value)
    (tmp_path / "deep" / other).rename(tmp_path / other)  # in another folder it is another file
    assert len(find_files(str(tmp_path))) == 2


def test_links_name_a_file_once_and_do_not_lead_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a/x.jsonl")
    (tmp_path / "a/again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/y.jsonl").symlink_to(tmp_path / "a/x.jsonl")
    assert find_files(str(tmp_path)) == [tmp_path / "a/x.jsonl"]


def append(path):
    with path.open("a") as file:
        file.write('\n{"text": "more"}')


CHANGES = {
    "appended": append,
    "rewritten": lambda path: path.write_text(LINES.replace("one", "ten")),
    "replaced": lambda path: (path.with_name("new").write_text(LINES), os.replace(path.with_name("new"), path)),
    "cut": lambda path: os.truncate(path, 20),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_says_that_its_file_has_changed(tmp_path, name, change):
    path = write(tmp_path / name)
    os.utime(path, (1, 1))
    source = open_source(path)
    source.refuse_changed()
    CHANGES[change](path)
    message = "cannot be read" if change == "removed" else "has changed since the file was indexed"
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        source.refuse_changed()
    with pytest.raises(InputError, match=rf"{name}: {message}"):  # and so does one that another process opens
        open_source(path, record_type=source.record_type, version=source.version)


REPLACED = """
import sys
from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.data.sources import open_source
path = sys.argv[1]
files.write_text(path, '{"text": "one"}\\n')
source = open_source(path)
source.refuse_changed()
source = open_source(path)
files.write_text(path, '{"text": "two"}\\n')
assert source[0].turns == "one"
try:
    source.refuse_changed()
except InputError as error:
    print(error)
"""


def test_another_generation_of_an_object_in_a_bucket_is_noticed(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        command = [sys.executable, "-c", REPLACED, f"gs://{BUCKET}/a.jsonl"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout.startswith(f"gs://{BUCKET}/a.jsonl: has changed since the file was indexed"), done.stderr
