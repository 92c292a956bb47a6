import gzip
import pickle

import pytest

from grit_jax.config import InputError
from grit_jax.data.records import GenerativeRecord
from grit_jax.data.sources import JsonlSource, find_files

LINES = '{"text": "one"}\n\n   \n{"text": "two"}\n{"text": "three"}'


@pytest.fixture(params=["f.jsonl", "f.jsonl.gz"])
def path(request, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(LINES.encode()) if path.suffix == ".gz" else LINES.encode())
    return path


def test_records_by_number_without_blank_lines(path):
    source = JsonlSource(path)
    assert [record.turns for record in source] == ["one", "two", "three"]
    assert source[1] == GenerativeRecord("two")
    assert source.stream == "generative"


def test_errors_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": 2}\n')
    with pytest.raises(InputError, match=r"f.jsonl:3: "):
        JsonlSource(path)[1]


def test_a_source_can_be_sent_to_a_worker(path):
    assert pickle.loads(pickle.dumps(JsonlSource(path)))[2].turns == "three"


def test_a_record_of_the_other_stream_is_refused(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\n{"query": "q", "pos": ["p"]}\n')
    with pytest.raises(InputError, match=r"f.jsonl:2: embedding record in a file of generative records"):
        JsonlSource(path)[1]


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
    with pytest.raises(InputError, match=r"notes.txt: not a .jsonl or .jsonl.gz file"):
        find_files(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match=r"folder: no .jsonl or .jsonl.gz file in this folder"):
        find_files(str(tmp_path / "folder"))
    with pytest.raises(InputError, match=r"empty.jsonl: the file is empty"):
        JsonlSource(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match=r"broken.jsonl.gz: cannot be read"):
        JsonlSource(tmp_path / "broken.jsonl.gz")


def test_the_published_formats_parse(shared):
    for path in find_files(str(shared / "data/train/embedding")) + find_files(str(shared / "data/tiny")):
        source = JsonlSource(path)
        assert all(source[number] for number in range(0, len(source), 97))
