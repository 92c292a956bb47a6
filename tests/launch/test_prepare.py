"""launch/prepare.sh, and what launch/run.sh makes of the paths that it fills."""

import json
import shlex

import pytest
import yaml

from tests.launch.cloud import LOGIN, NETWORK, ROLES

PREPARE = ["--bucket=gs://b", "--config=configs/tiny.yaml"]
NAMED = ["--", "--model.init=models/org/name", '--data.train=["data/medi2", "data/tulu2"]', "--model.tokenizer=null"]
PATHS = ["models/org/name", "data/medi2", "data/tulu2"]
FETCHES = [["model", "org/name", "gs://b/models/org/name"]] + [
    ["data", name, f"gs://b/data/{name}"] for name in ("medi2", "tulu2")
]


@pytest.fixture
def cloud(cloud, repository):
    (cloud.home / "configs").symlink_to(repository / "configs")
    return cloud


def fetches(cloud):
    """The arguments of every `grit-jax fetch` on the machine that launches."""
    lines = [shlex.split(line)[1] for line in cloud.hosts_log()]
    return [line.split()[1:] for line in lines if line.startswith("fetch ")]


def test_what_a_config_names_is_fetched_into_the_bucket(cloud):
    code, output = cloud.call("prepare.sh", *PREPARE, "--keep-downloads", *NAMED)
    assert code == 0, output
    assert fetches(cloud) == [[*fetch, "--keep-downloads"] for fetch in FETCHES]
    assert cloud.calls() == []


def test_a_dry_run_prints_the_commands_and_runs_none(cloud):
    code, output = cloud.call("prepare.sh", *PREPARE, "--dry-run", *NAMED)
    assert code == 0, output
    assert [shlex.split(line)[5:] for line in output.splitlines()] == FETCHES
    assert fetches(cloud) == cloud.calls() == []


def test_a_failed_fetch_ends_it_with_its_exit_code(cloud):
    (cloud.home / "plan-code").write_text("2")
    code, _ = cloud.call("prepare.sh", *PREPARE, *NAMED)
    assert (code, len(fetches(cloud))) == (2, 1)


def test_a_vm_does_the_same_from_the_commit(cloud):
    options = ["vm", "--zone=z", "--secret=HF_TOKEN=hf-token", "--dry-run"]
    code, output = cloud.call("prepare.sh", *PREPARE, *options, *NAMED)
    assert code == 0, output
    upload, ssh = output.splitlines()
    assert "archive" in upload and "gcloud storage cp" in upload
    words = shlex.split(ssh[2:])
    assert words[:4] == ["gcloud", "compute", "ssh", "vm"]
    steps = words[-1].removeprefix("--command=").split(" && ")
    assert [shlex.split(step)[-len(fetch) :] for step, fetch in zip(steps[-3:], FETCHES, strict=True)] == FETCHES
    assert all("GRIT_SECRETS=HF_TOKEN=hf-token" in step and "host.sh fetch" in step for step in steps[-3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.yaml"], "--bucket is missing"),
        (["--bucket=b", "--config=configs/tiny.yaml"], "must start with gs://"),
        (PREPARE, "names no path models/... or data/..."),
        ([*PREPARE, "vm"], "--zone is missing"),
        ([*PREPARE, "--", "--model.int=x"], "did you mean 'model.init'?"),
    ],
)
def test_wrong_options_are_refused(cloud, arguments, message):
    code, output = cloud.call("prepare.sh", *arguments)
    assert (code, message in output) == (2, True), output
    assert fetches(cloud) == []


def test_a_run_reads_from_the_bucket_what_was_fetched_and_is_refused_before(cloud):
    code, output = cloud.run(*NAMED)
    assert (code, "gs://b/models/org/name/fetch.json is not there: launch/prepare.sh" in output) == (2, True), output
    assert {tuple(call[:2]) for call in cloud.calls()} == {("storage", "ls")}
    for path in PATHS:
        (cloud.home / "bucket/b" / path).mkdir(parents=True)
        (cloud.home / "bucket/b" / path / "fetch.json").write_text(json.dumps({}))
    code, output = cloud.run(*NAMED)
    assert code == 0, output
    config = yaml.safe_load((cloud.home / "bucket/b/launch/run/config.yaml").read_text())
    assert [config["model"]["init"], *config["data"]["train"]] == [f"gs://b/{path}" for path in PATHS]


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("You do not currently have an active account selected.", 2, LOGIN),
        ("[me@x] does not have permission to access b instance [b] (or it may not exist)", 2, ROLES),
        ("gs://b not found: 404.", 2, "gs://b not found"),
        (NETWORK, 1, "gcloud does not reach Google"),
    ],
)
def test_a_bucket_that_cannot_be_asked_is_not_taken_for_an_empty_one(cloud, message, code, said):
    cloud.plan(faults=[{"match": "storage ls", "times": 1, "message": message}])
    found, output = cloud.run(*NAMED)
    assert (found, said in output, "is not there" in output) == (code, True, False), output
    assert {tuple(call[:2]) for call in cloud.calls()} == {("storage", "ls")}
