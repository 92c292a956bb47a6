import gzip
import json

import pytest
import zstandard
from etils import epath

from grit_jax.cli.encode import read_texts
from grit_jax.data.records import RecordError
from grit_jax.data.sources import open_source
from grit_jax.data.text_files import is_blank, read_cells, read_lines, read_objects, read_text, read_text_lines
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import read_corpus

BOM = "\ufeff"
# What other readers take for the end of a line, what may be before it, and what says nothing.
TEXTS = ["a\u2028b", "c\u0085d\x1ce", "f\x0cg\x0bh", f"{BOM}i", "j"]
LINES = [
    f'{BOM}{{"text": "%s"}}',
    '{"text": "%s"}',
    "",
    '{"text": "%s"}\r',
    " \t\x0c\r",
    BOM,
    '{"text": "%s"}',
    '{"text": "%s"}',
]
NUMBERS = [1, 2, 4, 7, 8]


@pytest.fixture
def path(tmp_path):
    escaped = iter(json.dumps(text, ensure_ascii=False)[1:-1] for text in TEXTS)
    lines = [line % next(escaped) if "%s" in line else line for line in LINES]
    path = tmp_path / "texts.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return path


def as_training(path):
    source = open_source(path)
    return [(source.line_number(number), record.turns) for number, record in enumerate(source)]


def as_rows(path):
    return [(int(where.rpartition(":")[2]), row["text"]) for where, row in read_objects(path)]


def as_corpus(path):
    return [(int(where.rpartition(":")[2]), document.text) for where, document in read_corpus(epath.Path(path))]


def as_input(path):
    return list(zip(NUMBERS, read_texts(path), strict=True))


@pytest.mark.parametrize("read", [as_training, as_rows, as_corpus, as_input])
def test_every_reader_finds_the_same_lines(path, read):
    assert read(path) == list(zip(NUMBERS, TEXTS, strict=True))


def test_plain_texts_have_the_same_lines_and_keep_what_is_no_ending(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(f"{BOM}a\u2028b\r\n\n \r\nc\rd\x0c\x1c\u0085 \n\u2028".encode())
    assert list(read_text_lines(path)) == [
        (f"{path}:1", "a\u2028b"), (f"{path}:4", "c\rd\x0c\x1c\u0085 "), (f"{path}:5", "\u2028"),
    ]  # fmt: skip
    assert read_texts(path) == ["a\u2028b", "c\rd\x0c\x1c\u0085 ", "\u2028"]
    assert read_text(path) == "a\u2028b\n\n \nc\rd\x0c\x1c\u0085 \n\u2028"
    with path.open("ab") as file:
        file.write(b"\nx\xe9y\n")
    with pytest.raises(InputError, match=r"texts.txt:6: byte 2 is not UTF-8"):
        read_texts(path)


@pytest.mark.parametrize(("name", "pack"), [("x.gz", gzip.compress), ("x.zst", zstandard.compress), ("x", bytes)])
def test_lines_do_not_depend_on_blocks_or_packing(tmp_path, name, pack, monkeypatch):
    content = b"one\n\ntwo\r\n" + b"three" * 9 + b"\r\n\n\rfour"
    (tmp_path / name).write_bytes(pack(content))
    expected = [(1, b"one"), (2, b""), (3, b"two"), (4, b"three" * 9), (5, b""), (6, b"\rfour")]
    for size in (1, 3, 7, 1 << 20):
        monkeypatch.setattr("grit_jax.data.text_files._BLOCK", size)
        assert list(read_lines(tmp_path / name)) == expected


def test_blank_is_what_training_passes_over():
    assert all(map(is_blank, (b"", b" \t\v\f\r", BOM.encode(), BOM.encode() + b" ")))
    assert not any(map(is_blank, ("\u2028".encode(), b"\x1c", "\u00a0".encode(), b"x")))


@pytest.mark.parametrize(("name", "part"), [("x.tsv", "\t"), ("x.csv", ",")])
def test_cells_keep_every_character_that_is_no_ending(tmp_path, name, part):
    cells = [["query", "positive"], ["a\u2028\x0b", "b\x1c\x85"], ["c\rd", "e"], ["", ""]]
    path = tmp_path / name
    path.write_bytes((BOM + "\r\n\n".join(part.join(row) for row in cells)).encode())
    rows = list(read_cells(path, frozenset(cells[0])))
    assert [row for _, row in rows] == [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    assert [where for where, _ in rows] == [f"{path}:{line}" for line in (3, 5, 7)]


def test_damage_in_a_table_is_named_and_the_rows_after_it_are_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'query,positive\n"a"b,c\n\xff,d\n"e\nf",g\n')
    first, second, third = read_cells(path, frozenset({"query", "positive"}))
    assert isinstance(first, RecordError)
    assert isinstance(second, RecordError)
    assert str(first).startswith(f"{path}:2: not valid CSV")
    assert str(second) == f"{path}:3: holds bytes that are not UTF-8"
    assert third == (f"{path}:4", {"query": "e\nf", "positive": "g"})
    path.write_text('query,positive\na,b\n"c,d\ne,f\n')
    with pytest.raises(InputError, match=r"x.csv:3: a quote that opens in this row is never closed"):
        list(read_cells(path, frozenset({"query", "positive"})))
    path.write_text("query,positive,query\na,b,c\n")
    with pytest.raises(InputError, match=r"x.csv:1: the header names 'query' twice"):
        list(read_cells(path, frozenset({"query", "positive"})))


def test_a_list_in_a_json_file_is_checked_as_lines_are(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(BOM + r' [ {"a": 1},{"a": "\ud83d"} , {"a": 1, "a": 2}, [3] ] ' + "\n")
    first, second, third, fourth = read_objects(path)
    assert first == (f"{path}:1", {"a": 1})
    assert [str(entry).partition(": ")[2] for entry in (second, third, fourth)] == [
        r"\ud83d is half of a surrogate pair, not a character; remove it",
        'key "a" appears twice; keep one of them',
        "found a JSON list; it must be an object",
    ]
    for content, message in (
        ("[1, 2", "Expecting ',' delimiter: line 1"), ("[1,\n 2 3]", "delimiter: line 2"), ("[1] 2", "Extra data"),
        ("[1,]", "cannot be read"), ('{"a": 1}', "holds one dict"), ("[" * 9999, "cannot be read"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError, match=rf"x.json: .*{message}"):
            list(read_objects(path))
    path.write_text("[]")
    assert list(read_objects(path)) == []
