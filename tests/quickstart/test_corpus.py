import json
import textwrap

import pytest

from grit_jax.data.records import parse_record
from grit_jax.quickstart.corpus import DocumentedObject, collect_objects, write_corpus


@pytest.fixture
def package(tmp_path):
    """Sources with copies, private corners and syntax of another Python."""
    body = "Takes several words of explanation and then returns something that is useful."
    files = {
        "one.py": f'''
            """A module that says what it is for."""
            def first(a, *, b):
                """Computes the first thing of them all.

                {body}
                """
                def inner():
                    """An inner function is nobody's business."""
            class Thing:
                """Holds a thing for later use."""
                def method(self, x):
                    """Does what a method has to do."""
            ''',
        "copy.py": f'''
            def renamed(a, b):
                """Computes  the first THING of them all

                {body} With an extra sentence.
                """
            ''',
        "tests/test_x.py": 'def check():\n    """A test is no documentation at all."""\n',
        "old.py": "print 'python 2'\n",
    }
    for name, text in files.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "pkg"


def test_objects_are_documented_and_public_and_each_text_comes_once(package):
    objects = {thing.name: thing for thing in collect_objects([("pkg", package)])}
    # Files are read in sorted order: the copy comes first and its original is left out.
    assert objects.keys() == {"pkg.copy.renamed", "pkg.one", "pkg.one.Thing", "pkg.one.Thing.method"}
    renamed = objects["pkg.copy.renamed"]
    assert renamed.signature == "pkg.copy.renamed(a, b)"
    assert renamed.summary == "Computes the first THING of them all"
    assert renamed.summary not in renamed.document
    assert objects["pkg.one.Thing.method"].signature == "pkg.one.Thing.method(x)"


def test_the_split_follows_the_name_alone():
    def thing(name, text):
        return DocumentedObject(name, name, text, text)

    names = [f"pkg.module{number}.f" for number in range(2000)]
    assert all(thing(name, "a").held_out == thing(name, "b").held_out for name in names)
    assert 0.08 < sum(thing(name, "a").held_out for name in names) / len(names) < 0.12


def test_the_written_corpus_is_grit_data_with_nothing_held_out_in_training(tmp_path, monkeypatch):
    from grit_jax.quickstart import corpus

    words = [f"word{number}" for number in range(400)]
    objects = [
        DocumentedObject(
            f"m{number % 7}.f{number}", f"m{number % 7}.f{number}(a)", f"Summary {word} of it.",
            f"Body {word} is here. More {word} follows it now.",
        )
        for number, word in enumerate(words)
    ]  # fmt: skip
    monkeypatch.setattr(corpus, "collect_objects", lambda _: objects)
    counts = write_corpus(tmp_path)
    held_out = {f"word{number}" for number, thing in enumerate(objects) if thing.held_out}
    assert counts["held_out_objects"] == counts["held_out_queries"] == len(held_out) > 10

    def lines(folder):
        return [line for path in sorted((tmp_path / folder).rglob("*.jsonl")) for line in path.read_text().splitlines()]

    for folder in ("train", "validation"):
        assert all(parse_record(line, path=folder, line_number=1) for line in lines(folder))
    trained = " ".join(lines("train")).replace(".", " ").replace('"', " ").split()
    assert not held_out & set(trained)
    assert held_out <= set(" ".join(lines("validation")).replace(".", " ").replace('"', " ").split())
    rows = [json.loads(line) for line in lines("train/embedding")]
    assert all(row["neg"] and row["pos"] != row["neg"][:1] for row in rows)
    qrels = (tmp_path / "retrieval/qrels/test.tsv").read_text().splitlines()
    assert qrels[0] == "query-id\tcorpus-id\tscore"
    assert len(qrels) == len(lines("retrieval")) / 2 + 1
