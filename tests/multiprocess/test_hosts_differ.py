"""Hosts that read other data or another config than the others are refused before the first step, everywhere."""

import re

import pytest

from tests.commands import ROOT, TINY, write_data
from tests.multiprocess import launch

FACTS = """
    from grit_jax.errors import InputError
    from grit_jax.parallel.distributed import in_every_process, require_same

    index = jax.process_index()

    def told(action):
        try:
            action()
            print("same")
        except InputError as error:
            print(error)

    def fails():
        if index == 2:
            raise InputError("a.jsonl:1: bad")

    told(lambda: require_same({"a": "1", "b": "ü"}))
    told(lambda: require_same({}))
    told(lambda: require_same({"a": str(index == 1), "b": "2"} | ({"c": "3"} if index == 2 else {})))
    told(lambda: in_every_process(fails))
    print(in_every_process(lambda: index))
"""


def test_processes_tell_which_facts_differ_where_and_fail_together():
    outputs = launch.run(FACTS, num_processes=3, devices_each=1)
    for index, output in enumerate(outputs):
        same, empty, different, failed, own = re.sub(r" \([^)]*\)", "", output).splitlines()  # without names of hosts
        assert (same, empty, own) == ("same", "same", str(index))
        assert (
            "a is True on process 1, False on process 0, 2; c is 3 on process 2, missing on process 0, 1" in different
        )
        assert failed == ("" if index == 2 else "process 2: ") + "a.jsonl:1: bad"


def refused(tmp_path, change, *, key="data.train", options=()):
    """What two processes say whose data differ by `change` of a folder, with as many records or fewer."""
    folders = [write_data(tmp_path / name) for name in ("one", "other")]
    change(folders[1])
    arguments = [ROOT / "configs/tiny.yaml", *TINY, f"--data.train={folders[0]}", "--train.steps=4", *options]
    outputs = launch.run_commands(
        "train",
        *arguments,
        f"--train.output={tmp_path / 'run'}",
        own=lambda index: [f"--{key}={folders[index]}"],
        code=2,
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()
    (said,) = {re.findall("error: .*", error)[-1] for _, error in outputs}
    return said


def rewritten(name, change):
    """A change of one file's lines."""

    def rewrite(folder):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(change(lines)))

    return rewrite


CHANGES = {
    "fewer records": ("embedding.jsonl", lambda lines: lines[:9]),
    "another text of the same length": (
        "embedding.jsonl", lambda lines: [line.replace("is a word", "is a bird") for line in lines],
    ),
    "another order of the generative records": ("generative.jsonl", lambda lines: lines[::-1]),
}  # fmt: skip


def test_hosts_with_their_records_in_another_order_are_refused(tmp_path):
    said = refused(tmp_path, rewritten("embedding.jsonl", lambda lines: lines[::-1]))
    assert re.search("the content of data.train, file 1 is embedding.jsonl .* on process [01] ", said), said
    assert "file 2" not in said


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_hosts_with_other_records_are_refused(change, tmp_path):
    name, lines = CHANGES[change]
    said = refused(tmp_path, rewritten(name, lines))
    number = {"embedding.jsonl": 1, "generative.jsonl": 2}[name]
    assert f"the content of data.train, file {number} is {name}" in said


@pytest.mark.long
def test_hosts_with_other_validation_data_are_refused(tmp_path):
    said = refused(tmp_path, rewritten("embedding.jsonl", lambda lines: lines[:5]), key="data.validation")
    assert "the content of data.validation, file 1 is embedding.jsonl" in said


@pytest.mark.long
def test_a_file_that_one_host_lacks_is_named(tmp_path):
    said = refused(tmp_path, lambda folder: (folder / "generative.jsonl").rename(folder / "other.jsonl"))
    assert "data.train is embedding.jsonl, generative.jsonl on process" in said


@pytest.mark.long
def test_bad_input_of_one_host_ends_all_of_them(tmp_path):
    folder, broken = write_data(tmp_path / "one"), write_data(tmp_path / "broken")
    rewritten("generative.jsonl", lambda lines: [*lines[:3], "{\n"])(broken)
    arguments = [ROOT / "configs/tiny.yaml", *TINY, f"--train.output={tmp_path / 'run'}"]
    outputs = launch.run_commands(
        "train", *arguments, own=lambda index: [f"--data.train={(folder, broken)[index]}"], code=2
    )
    assert "error: process 1: " in outputs[0][1]
    assert all("generative.jsonl:4: not valid JSON" in error for _, error in outputs)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("optimizer.learning_rate", ("0.0005", "0.05")),
        pytest.param("train.seed", ("0", "1"), marks=pytest.mark.long),
        pytest.param("data.embedding_batch", ("8", "16"), marks=pytest.mark.long),
        pytest.param("mesh.fsdp", ("4", "2"), marks=pytest.mark.long),
    ],
)
def test_hosts_with_another_config_are_refused(key, values, tmp_path):
    data = write_data(tmp_path / "data")
    arguments = [
        ROOT / "configs/tiny.yaml", *TINY, f"--data.train={data}", f"--train.output={tmp_path / 'run'}",
        "--mesh.data=-1", "--mesh.fsdp=4",
    ]  # fmt: skip
    outputs = launch.run_commands("train", *arguments, own=lambda index: [f"--{key}={values[index]}"], code=2)
    for _, error in outputs:
        assert re.search(rf"{key} is {values[0]} on process 0 \(.*\), {values[1]} on process 1 \(", error), error
