import re

import pytest
import yaml

from grit_jax.errors import InputError
from grit_jax.evaluation.suite import load_suite, packaged_instructions
from tests.commands import ROOT
from tests.evaluation.tasks import write_suite

SUITES = [*sorted((ROOT / "configs/suites").glob("*.yaml")), *sorted((ROOT / "configs/claim").glob("*suite.yaml"))]
STS = {"name": "x", "type": "sts", "path": "x.tsv"}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{**STS, "type": "st"}], r"suite.yaml: task 'x': type is 'st'; did you mean 'sts'\?"),
        ([{**STS, "type": "sentiment"}], "type is 'sentiment'; it must be one of retrieval, sts, "),
        ([{**STS, "instructions": "x"}], r"task 'x': unknown key 'instructions'; did you mean 'instruction'\?"),
        ([{"name": "x", "type": "sts"}], "task 'x': no key 'path'; give all of name, path"),
        ([{**STS, "instruction": 3}], "task 'x': .*instruction.*'str'.*Given value: 3"),
        (
            [{**STS, "name": "a/b"}],
            r"suite.yaml: name 'a/b' of a task cannot be a file's; it must not be empty or have /",
        ),
        ([{**STS, "name": "a\\b"}], r"name 'a\\\\b' of a task cannot be a file's"),
        ([{**STS, "name": "a\0"}], r"name 'a\\x00' of a task cannot be a file's"),
        ([{**STS, "name": ""}], "name '' of a task cannot be a file's"),
        ([STS, STS], "there are 2 tasks of name 'x'; give each its own"),
        (["sts"], r"tasks\[0\] is 'sts'; it must be a mapping with name, type and path"),
        ([], "tasks is empty"),
        ([{**STS, "type": "code", "k": [1, 30]}], r"k=\[1, 30\] must be numbers from 1 to samples=20"),
        ([{**STS, "type": "multiple_choice", "shots": 5}], "shots=5 needs shots_path"),
        ([{**STS, "type": "exact_match", "limit": 0}], "limit=0 must be positive; leave it out for all records"),
        ([{**STS, "type": "exact_match", "max_new_tokens": 0}], "max_new_tokens=0 must be positive"),
        (
            [{**STS, "type": "exact_match", "shots_path": "."}],
            "is a folder with the examples of each group: give group",
        ),
        ([{**STS, "type": "exact_match", "shots_path": ".", "group": "g", "shots": 2}], "leave shots out, as"),
        ([{**STS, "type": "alpaca_eval", "max_new_tokens": 0}], "max_new_tokens=0 must be positive"),
        ([{**STS, "type": "perplexity", "max_length": 0}], "max_length=0 must be positive"),
        ([{**STS, "type": "reranking", "candidates": 0}], "candidates=0 must be positive"),
        ([{**STS, "type": "classification", "experiments": 0}], "experiments=0 must be positive"),
        ([{**STS, "type": "classification", "samples_per_label": -1}], "samples_per_label=-1 must be positive"),
        ([{**STS, "type": "code", "seconds": 0}], "seconds=0.* must be positive"),
        ([{**STS, "type": "exact_match", "compare": "words"}], "compare"),
    ],
)
def test_mistakes_are_named_with_their_remedy(tasks, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_suite(write_suite(tmp_path, tasks))


def test_mistakes_of_the_file_itself(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_suite(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"unknown key 'max_len'; did you mean 'max_length'\?"):
        load_suite(write_suite(tmp_path, [STS], max_len=3))
    with pytest.raises(InputError, match="max_length=0 must be at least 1"):
        load_suite(write_suite(tmp_path, [STS], max_length=0))
    (tmp_path / "bad.yaml").write_text("tasks:\n- {name: [}\n")
    with pytest.raises(InputError, match=r"bad\.yaml:2: not valid YAML"):
        load_suite(tmp_path / "bad.yaml")


def test_instructions_come_by_name_and_a_task_s_own_wins(tmp_path):
    tasks = [{**STS, "name": "STS13"}, {**STS, "instruction": ""}, {**STS, "name": "y", "type": "perplexity"}]
    loaded = load_suite(write_suite(tmp_path, tasks, instructions="mteb"))
    assert loaded.tasks[0].instruction == packaged_instructions()["STS13"]
    assert loaded.tasks[1].instruction == ""
    assert loaded.tasks[0].path == str(tmp_path / "x.tsv")
    with pytest.raises(InputError, match=r"task 'STS133' is not in the suite's instructions; did you mean 'STS13'\?"):
        load_suite(write_suite(tmp_path, [{**STS, "name": "STS133"}], instructions="mteb"))
    (tmp_path / "own.yaml").write_text("x: Find it\n")
    assert load_suite(write_suite(tmp_path, [STS], instructions="own.yaml")).tasks[0].instruction == "Find it"


def test_each_english_task_of_mteb_has_an_instruction():
    instructions = packaged_instructions()
    parts = [name for name in instructions if name.startswith("CQADupstack") and name != "CQADupstackRetrieval"]
    assert (len(instructions) - len(parts), len(parts)) == (56, 12)
    for text in instructions.values():
        assert text == text.strip() and not text.endswith(".") and len(text.split()) > 5


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_suites_that_are_shipped_load_and_name_no_machine(path):
    assert load_suite(path).tasks
    assert not re.search(r"(?<![\w.])/\w", path.read_text())
    for task in yaml.safe_load(path.read_text())["tasks"]:
        assert not task["path"].startswith("/")
