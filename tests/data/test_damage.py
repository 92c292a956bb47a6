"""Thousands of damaged lines and odd files, with an oracle for each.

- Nothing raises but an `InputError`, and no command prints a traceback.
- Damage that a line's structure can show is found and named with file and line.
- A line that says the same in another way, and every undamaged one, comes through unchanged.
"""

import gzip
import json
import os
import random

import numpy as np
import pytest

from grit_jax.cli.encode import read_texts
from grit_jax.cli.main import main
from grit_jax.data.records import RecordError, parse_record
from grit_jax.data.sources import open_source
from grit_jax.datatools import convert
from grit_jax.datatools.overlap import EvaluationTexts
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import read_corpus
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import build_index
from tests.data.test_sources import write

TEXTS = [
    "a",
    "line\u2028end",
    "page\x0cend",
    "next\u0085",
    "你好，世界",
    "😀",
    '"quoted"',
    "tab\tand\nfeed",
    "back\\slash",
    "\ufeffmark",
]


def words(rng):
    return " ".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 6)))


def embedding(rng, number):
    return {"query": [words(rng), f"{number} {words(rng)}"], "pos": [["", words(rng)]], "neg": [["", words(rng)]]}


def conversation(rng, number):
    return {"text": [f"{number} {words(rng)}", words(rng)]}


def foreign(kind):
    def row(rng, number):
        user, answer = f"{number} {words(rng)}", f"answer {words(rng)}"
        return {
            "triples": {"query": user, "positive": answer, "negative": "never"},
            "alpaca": {"instruction": user, "input": "", "output": answer},
            "sharegpt": {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]},
            "openai": {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]},
        }[kind]

    return row


def plain(row):
    return json.dumps(row, ensure_ascii=False).encode()


# The same row, written in another way.
SAME = {
    "as it is": lambda row, rng: plain(row),
    "escapes": lambda row, rng: json.dumps(row).encode(),
    "carriage return": lambda row, rng: plain(row) + b"\r",
    "byte order mark": lambda row, rng: b"\xef\xbb\xbf" + plain(row),
    "space around": lambda row, rng: b" \t" + plain(row) + b" \r",
    "more keys": lambda row, rng: plain({"id": rng.random(), "note": None} | row),
    "another order": lambda row, rng: plain(dict(reversed(row.items()))),
    "blank lines before": lambda row, rng: b"\n \t\n\xef\xbb\xbf\r\n" + plain(row),
}


def cut(row, rng):
    line = plain(row)
    return line[: rng.randrange(1, len(line))]


def without_utf8(row, rng):
    line = plain(row)
    place = rng.randrange(1, len(line))
    return line[:place] + bytes([rng.choice([0xFF, 0xC0, 0xF8])]) + line[place:]


def key_twice(row, rng):
    key = rng.choice(list(row))
    return plain(row)[:-1] + b", " + plain({key: row[key]})[1:]


# What the structure of a line shows, whatever the format.
DAMAGED = {
    "cut": cut,
    "not UTF-8": without_utf8,
    "a key twice": key_twice,
    "a key of half a character twice": lambda row, rng: plain(row)[:-1] + rb', "\ud83d": 1, "\ud83d": 2}',
    "half a character": lambda row, rng: json.dumps(row | {"note": "a\ud83d"}).encode(),
    "two rows on a line": lambda row, rng: plain(row) + b" " + plain(row),
    "a control character": lambda row, rng: plain(row).replace(b'": ', b'": \x00', 1),
    "nested too deeply": lambda row, rng: b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no object": lambda row, rng: rng.choice([b"7", b"null", b'"text"', b"true", b"NaN"]),
    "other keys": lambda row, rng: plain({f"{key}_": value for key, value in row.items()}),
    "null": lambda row, rng: plain(dict.fromkeys(row)),
    "numbers": lambda row, rng: plain(dict.fromkeys(row, 7)),
}
STREAM_DAMAGE = {
    "the other stream": lambda row, rng: plain({"text": "x"} if "query" in row else {"query": "q", "pos": ["p"]}),
    "no turn or positive": lambda row, rng: plain({key: value if key == "query" else [] for key, value in row.items()}),
}


def damaged_lines(rng, make, count, damage):
    """Lines, and for each row its number in the file and the row, or None where it is damaged; the first is sound."""
    lines, expected, number = [], [], 0
    for place in range(count):
        row = make(rng, place)
        sound = place == 0 or rng.random() < 0.6
        line = rng.choice(list((SAME if sound else damage).values()))(row, rng)
        lines.append(line)
        number += line.count(b"\n") + 1
        expected.append((number, row if sound else None))
    return b"\n".join(lines) + rng.choice([b"", b"\n", b"\r\n\n"]), expected


COUNTS = [200, pytest.param(10_000, marks=pytest.mark.long)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("make", [embedding, conversation])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_damaged_rows_are_named_and_the_others_are_what_they_were(tmp_path, count, make, suffix, capsys):
    content, expected = damaged_lines(random.Random(count), make, count, DAMAGED | STREAM_DAMAGE)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    source = open_source(path)
    assert [source.line_number(number) for number in range(len(source))] == [number for number, _ in expected]
    for number, (line, row) in enumerate(expected):
        try:
            record = source[number]
        except RecordError as error:
            assert row is None, (error, row)
            assert str(error).startswith(f"{path}:{line}: ")
        else:
            assert row is not None, record
            assert record == parse_record(plain(row), f"{path}:{line}")
    good = [row for _, row in expected if row is not None]
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(path), str(out), "--from", "grit", "--skip-bad"]) == 0
    kept = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert [{key: row[key] for key in wanted} for row, wanted in zip(kept, good, strict=True)] == good
    assert main(["data", "validate", str(path)]) == 2
    assert (
        f"{len(good):,} {source.record_type.name} records, {count - len(good):,} malformed" in capsys.readouterr().out
    )
    index = build_index(path, Tokenizer.load("bytes"), skip_bad=True)
    lines = index.line_numbers(np.arange(index.num_records))
    assert lines.tolist() == [line for line, row in expected if row is not None]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["triples", "alpaca", "sharegpt", "openai"])
def test_damaged_foreign_rows_are_named_and_the_others_are_what_they_were(tmp_path, count, kind):
    content, expected = damaged_lines(random.Random(count), foreign(kind), count, DAMAGED)
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    options = {"instruction": "", "min_score": None} if kind == "triples" else {}
    entries = list(getattr(convert, kind)(path, **options))
    for entry, (line, row) in zip(entries, expected, strict=True):
        where = f"{path}:{line}"
        if isinstance(entry, RecordError):
            assert row is None, entry
            assert str(entry).startswith(f"{where}: ")
        elif row is None:  # what is read here and cannot be written
            assert kind == "triples"
            with pytest.raises(InputError, match=f"^{where}: "):
                parse_record(json.dumps(entry[1]), f"{path}:{line}")
        else:
            assert entry[0] == where
            texts = entry[1].get("text") or [entry[1]["query"][1], entry[1]["pos"][0][1]]
            assert texts == [
                text for text in strings(row) if text not in ("human", "gpt", "user", "assistant", "never", "")
            ]


def strings(value):
    if isinstance(value, str):
        return [value]
    return [text for part in (value.values() if isinstance(value, dict) else value) for text in strings(part)]


@pytest.mark.parametrize("count", COUNTS)
def test_random_bytes_in_random_places_raise_nothing_but_a_named_fault(tmp_path, count):
    rng = random.Random(count)
    kinds = ["triples", "alpaca", "sharegpt", "openai"]
    for start in range(0, count, 100):
        lines = []
        for number in range(start, start + 100):
            make = rng.choice([embedding, conversation, *map(foreign, kinds)])
            line = bytearray(plain(make(rng, number)))
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(line))
                line[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            lines.append(bytes(line))
        path = tmp_path / f"{start}.jsonl"
        path.write_bytes(b"\n".join(lines))
        num_lines = sum(
            1 for line in path.read_bytes().split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\v\f")
        )
        for kind in kinds:
            options = {"instruction": "", "min_score": None} if kind == "triples" else {}
            assert len(list(getattr(convert, kind)(path, **options))) == num_lines
        for use in USES:
            quietly(use, path)


USES = [
    lambda path: list(open_source(path, skip_bad=True)),
    lambda path: [document for _, document in read_corpus(path)],
    read_texts,
    lambda path: EvaluationTexts([path], ngram=13),
]


def quietly(use, path):
    try:
        use(path)
    except InputError as error:
        assert str(path) in str(error)


ODD = {
    "empty": b"", "a mark alone": b"\xef\xbb\xbf", "blank": b"\n \r\n\t\n\xef\xbb\xbf\n", "zeros": bytes(1000),
    "UTF-16": '{"text": "a"}\n'.encode("utf-16"), "latin 1": b'{"text": "caf\xe9"}\n', "a list": b'[{"text": "a"}]',
    "over many lines": b'{\n"text":\n"a"\n}\n', "old Macintosh": b'{"text": "a"}\r{"text": "b"}',
    "noise": random.Random(0).randbytes(5000),
    "a table": b"text\tlabel\na\t1\n", "no line feed": b"{" * 100_000,
    "packed twice": gzip.compress(gzip.compress(b"{}")),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".array_record"])
def test_files_that_are_something_else_are_named_by_every_command(tmp_path, name, suffix, capsys):
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(ODD[name])
    assert main(["data", "validate", str(path)]) == 2
    assert main(["data", "convert", str(path), str(tmp_path / "out.jsonl"), "--from", "grit"]) == 2
    printed = capsys.readouterr()
    assert f"odd{suffix}" in printed.out
    assert f"odd{suffix}" in printed.err
    assert "Traceback" not in printed.out + printed.err
    for use in USES:
        quietly(use, path)


def test_a_folder_of_odd_things_holds_its_data_alone(tmp_path, capsys):
    write(tmp_path / "good.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (".hidden.jsonl", "good.jsonl~", "#good.jsonl#", ".good.jsonl.swp", ".git/good.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ODD["noise"])
    assert main(["data", "validate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'good.jsonl'}: 3 generative records, 0 malformed\n"
