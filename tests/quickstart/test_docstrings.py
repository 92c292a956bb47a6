import json
import textwrap
from pathlib import Path

import pytest

from grit_jax.data.records import parse_record
from grit_jax.errors import InputError
from grit_jax.quickstart import docstrings
from grit_jax.quickstart.docstrings import DocumentedObject, collect_objects, package_roots, write_corpus


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
    words = [f"word{number}" for number in range(400)]
    objects = [
        DocumentedObject(
            f"m{number % 7}.f{number}", f"m{number % 7}.f{number}(a)", f"Summary {word} of it.",
            f"Body {word} is here. More {word} follows it now.",
        )
        for number, word in enumerate(words)
    ]  # fmt: skip
    monkeypatch.setattr(docstrings, "collect_objects", lambda _: objects)
    counts = write_corpus(tmp_path)
    held_out = {f"word{number}" for number, thing in enumerate(objects) if thing.held_out}
    assert counts["held_out_objects"] == counts["held_out_queries"] == len(held_out) > 10

    def lines(folder):
        return [line for path in sorted((tmp_path / folder).rglob("*.jsonl")) for line in path.read_text().splitlines()]

    for folder in ("train", "validation"):
        assert all(parse_record(line, f"{folder}:1") for line in lines(folder))
    trained = " ".join(lines("train")).replace(".", " ").replace('"', " ").split()
    assert not held_out & set(trained)
    assert held_out <= set(" ".join(lines("validation")).replace(".", " ").replace('"', " ").split())
    rows = [json.loads(line) for line in lines("train/embedding")]
    assert all(row["neg"] and row["pos"] != row["neg"][:1] for row in rows)
    qrels = (tmp_path / "retrieval/qrels/test.tsv").read_text().splitlines()
    assert qrels[0] == "query-id\tcorpus-id\tscore"
    assert len(qrels) == len(lines("retrieval")) / 2 + 1


def function(name: str, summary: str, body: str, arguments: str = "value") -> str:
    return f'def {name}({arguments}):\n    """{summary}\n\n    {body}\n    """\n\n'


def write_module(folder: Path, text: str) -> list[tuple[str, Path]]:
    (folder / "orchard.py").write_text(text)
    return [("", folder)]


@pytest.fixture(scope="module")
def orchard(tmp_path_factory):
    """A folder with the corpus of 120 functions, written twice."""
    functions = "".join(
        function(
            f"chore_{number}",
            f"Does chore number {number} today.",
            f"Needs {number} ladders before noon. The shed lends out {number} more of them afterwards.",
        )
        for number in range(120)
    )
    folder = tmp_path_factory.mktemp("orchard")
    roots = write_module(folder, functions)
    for copy in ("data", "again"):
        write_corpus(folder / copy, roots)
    return folder


def read_rows(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_source_is_parsed_and_never_run(tmp_path):
    roots = write_module(tmp_path, '"""A module that must stay asleep."""\nraise SystemExit("it ran")\n')
    assert [thing.name for thing in collect_objects(roots)] == ["orchard"]


def test_a_property_and_its_setter_are_one_object(tmp_path):
    getter = '    @property\n    def weight(self):\n        """Weight of the whole basket."""\n'
    setter = '    @weight.setter\n    def weight(self, value):\n        """Sets another weight by hand."""\n'
    objects = collect_objects(write_module(tmp_path, f"class Basket:\n{getter}{setter}"))
    assert [(thing.name, thing.summary) for thing in objects] == [
        ("orchard.Basket.weight", "Weight of the whole basket.")
    ]


def test_only_the_first_argument_can_be_the_instance_or_class(tmp_path):
    text = function("load", "Reads one basket from text.", "Takes a class of baskets too.", "self, text, *, cls=None")
    assert collect_objects(write_module(tmp_path, text))[0].signature == "orchard.load(text, cls)"


def test_copies_of_a_summary_or_a_body_are_left_out(tmp_path):
    text = function("first", "Counts the apples twice.", "Starts with the largest one, and goes down.")
    text += function("second", "counts   the APPLES, twice!", "Says something of quite another kind.")
    text += function("third", "Sums up the fruit of a day.", "Starts with the: largest\n    one and goes down.")
    assert [thing.name for thing in collect_objects(write_module(tmp_path, text))] == ["orchard.first"]


def test_a_document_is_cut_to_its_words_and_leaves_out_the_summary(tmp_path):
    words = [f"word{number}" for number in range(200)]
    text = function("load", "Reads one basket from text.", " ".join(words))
    document = collect_objects(write_module(tmp_path, text))[0].document
    assert document == "orchard.load(value)\n" + " ".join(words[: docstrings._DOCUMENT_WORDS])


def test_a_description_that_stands_in_its_document_is_not_searched_for(tmp_path):
    echoes = (
        function(f"echo_{number}", f"Counts apples of tree {number}.", f"Then: counts  apples of TREE {number}, twice.")
        for number in range(60)
    )
    counts = write_corpus(tmp_path / "data", write_module(tmp_path, "".join(echoes)))
    assert counts["held_out_objects"] > 0 == counts["held_out_queries"]


def test_an_excerpt_is_cut_out_of_the_document_it_is_taken_from(orchard):
    rows = read_rows(orchard / "data/train/embedding/excerpt.jsonl")
    assert rows and all(row["query"][1] not in row["pos"][0][1] for row in rows)


@pytest.mark.parametrize("view", ["describe", "name", "excerpt"])
def test_hard_negatives_are_other_objects_in_the_form_of_the_positive(orchard, view):
    rows = read_rows(orchard / f"data/train/embedding/{view}.jsonl")
    positives = {row["pos"][0][1] for row in rows}
    for row in rows:
        negatives = {text for _, text in row["neg"]}
        assert len(negatives) == 3 and negatives <= positives - {row["pos"][0][1]}


def test_writing_again_gives_the_same_bytes(orchard):
    data, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (orchard / "data", orchard / "again")
    )
    assert data == again and len(data) == 9


def test_a_sample_of_the_held_out_queries_leaves_the_training_data_as_they_are(orchard, tmp_path):
    whole, sample = orchard / "data", tmp_path / "sample"
    counts = write_corpus(sample, [("", orchard)], most_queries=3)
    queries, all_queries = (read_rows(folder / "retrieval/queries.jsonl") for folder in (sample, whole))
    assert counts["held_out_queries"] == len(queries) == 3 < counts["held_out_queries_in_all"] == len(all_queries)
    assert [row for row in all_queries if row in queries] == queries
    assert {row["_id"] for row in read_rows(sample / "retrieval/corpus.jsonl")} == {row["_id"] for row in queries}
    for path in (whole / "train").rglob("*.jsonl"):
        assert (sample / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_the_standard_library_and_the_run_time_packages_are_read():
    roots = dict(docstrings._installed_roots())
    assert {"", "numpy", "jax", "flax", "optax"} <= roots.keys() <= {"", *docstrings.PACKAGES}
    objects = {thing.name: thing for thing in collect_objects([("json", roots[""] / "json")])}
    assert objects["json.loads"].signature.startswith("json.loads(s, cls, object_hook")
    assert "Python object" in objects["json.loads"].summary and "object_hook" in objects["json.loads"].body


def test_packages_are_read_by_name():
    objects = collect_objects(package_roots(["json"]))
    assert "json.dumps" in {thing.name for thing in objects}
    assert all(thing.name.startswith("json") for thing in objects)


@pytest.mark.parametrize("name", ["no_such_package", "this"])
def test_what_is_no_package_is_named(name):
    with pytest.raises(InputError, match=f"{name}: no package of that name is installed"):
        list(package_roots([name]))
