"""Arguments reach their commands as they were given: nothing in them is split, matched with files or evaluated."""

import subprocess

import pytest

from tests.launch.test_prepare import PREPARE

ODD = ["data/two words", "data/*", "data/it's", "data/-n", 'data/"$(touch evaluated)"', "data/a\nb"]
POD = ["run", "--zone=us-east5-a"]


@pytest.fixture
def cloud(cloud, repository):
    (cloud.home / "configs").symlink_to(repository / "configs")
    return cloud


def quoted(paths):
    return "[" + ", ".join('"' + path.replace('"', '\\"').replace("\n", "\\n") + '"' for path in paths) + "]"


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_fetched_under_its_own_name(cloud, path):
    code, output = cloud.call("prepare.sh", *PREPARE, "--dry-run", "--", f"--data.train={quoted([path])}")
    assert code == 0, output
    printed = subprocess.run(["bash", "-c", f'printf "%s|" {output[2:]}'], capture_output=True, text=True).stdout
    assert printed.split("|")[-4:-1] == ["data", path.removeprefix("data/"), f"gs://b/{path}"]
    code, output = cloud.call("prepare.sh", *PREPARE, "--", f"--data.train={quoted([path])}")
    assert code == 0, output
    assert sum(" fetch" in line or "'fetch" in line for line in cloud.hosts_log()) == 1
    assert not list(cloud.home.rglob("evaluated"))


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_looked_for_in_the_bucket_under_its_own_name(cloud, path):
    code, output = cloud.run("--", f"--data.train={quoted([path])}")
    assert (code, "fetch.json is not there" in output) == (2, True), output
    assert cloud.calls() == [["storage", "ls", f"gs://b/{path}/fetch.json"]]
    assert not list(cloud.home.rglob("evaluated"))


def test_what_lies_in_a_fetched_folder_is_fetched_with_it(cloud):
    overrides = ["--", '--data.train=["data/medi2/a.jsonl", "data/medi2/"]', "--model.init=models/org/name/"]
    code, output = cloud.call("prepare.sh", *PREPARE, "--dry-run", *overrides)
    assert code == 0, output
    assert [line.split()[-1] for line in output.splitlines()] == ["gs://b/models/org/name", "gs://b/data/medi2"]


def test_a_config_may_have_a_name_that_begins_with_a_hyphen(cloud, repository):
    (cloud.home / "-tiny.yaml").write_text((repository / "configs/tiny.yaml").read_text())
    code, output = cloud.run("--config=-tiny.yaml", "--dry-run")
    assert code == 0, output
    assert "plan ./-tiny.yaml --topology v5p-8" in output


@pytest.mark.parametrize("node", ["a[$(touch evaluated)]", "x", "-1", "1+0", "08", "2", "0 1"])
def test_a_node_is_a_number_of_one_that_is_there(cloud, node):
    assert cloud.run("--slices=2", "--keep")[0] == 0
    code, output = cloud.call("pod.sh", "ssh", *POD, f"--node={node}", "--", "echo", "hello")
    assert (code, "--node" in output, "hello" in output) == (2, True, False), output
    assert not list(cloud.home.rglob("evaluated"))


def test_a_node_and_a_worker_are_chosen_by_their_numbers(cloud):
    cloud.plan(workers=2)
    assert cloud.run("--slices=2", "--keep")[0] == 0
    code, output = cloud.call("pod.sh", "ssh", *POD, "--node=1", "--worker=0", "--", "bash", "-c", "echo on $FAKE_NODE")
    assert (code, output.splitlines()[-1]) == (0, "on run-1"), output


@pytest.mark.parametrize("worker", ["x", "$(touch evaluated)", "0,", "-1"])
def test_a_worker_is_all_or_numbers(cloud, worker):
    code, output = cloud.call("pod.sh", "ssh", *POD, f"--worker={worker}", "--", "true")
    assert (code, "--worker" in output) == (2, True), output
    assert cloud.calls() == []


def test_words_for_hosts_arrive_as_they_are(cloud):
    assert cloud.run("--keep")[0] == 0
    words = ["-n", "~", "a  b", "", "*", "$HOME", "it's", 'a"b', "{a,b}", "tab\there", "!x", "\\"]
    command = ["python3", "-c", "import sys; print(sys.argv[1:])", *words]
    code, output = cloud.call("pod.sh", "ssh", *POD, "--", *command)
    assert (code, output.splitlines()[-1]) == (0, str(words)), output
