"""launch/run.sh and launch/pod.sh against a cloud that is made of this machine's processes."""

import json
import os
import re
import shlex
import shutil
import signal
import time

import pytest
import yaml

from tests.commands import ROOT
from tests.launch.cloud import AGAIN, LOGIN, NETWORK, ROLES, Cloud, make_repository

CREATE = ("compute", "tpus", "queued-resources", "create")
DELETE = ("compute", "tpus", "queued-resources", "delete")


def trainings(cloud):
    """Hosts in the order in which training was started on them."""
    return [line.split()[0] for line in cloud.hosts_log() if " train" in line]


def followed(cloud):
    """The calls that print the log of process 0."""
    return [call for call in cloud.calls("compute", "tpus", "tpu-vm", "ssh") if call[-1].endswith("follow")]


def wait_for(reached, seconds=30):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_first_launch_plans_creates_tests_trains_and_deletes(cloud):
    code, output = cloud.run("--spot")
    assert code == 0, output
    steps = [
        line.split()[1] if "launcher" not in line else "plan" for line in cloud.hosts_log() if "installed" not in line
    ]
    assert [re.split(r"\\", step)[0] for step in steps] == ["plan", "doctor", "train"]
    assert len(cloud.calls(*CREATE)) == len(cloud.calls(*DELETE)) == 1
    assert {"--spot", "--labels=grit_run=run", "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"} <= set(
        cloud.calls(*CREATE)[0]
    )
    assert cloud.state()["requests"] == cloud.state()["nodes"] == {}
    assert "training on run-w-0" in output
    config = yaml.safe_load((cloud.home / "bucket/b/launch/run/config.yaml").read_text())
    assert (config["train"]["output"], config["data"]["train"]) == ("gs://b/runs/run", "gs://b/data")
    assert "training on run-w-0" in next((cloud.home / "bucket/b/launch/run/logs").iterdir()).read_text()


def test_a_preempted_pod_is_made_again_and_trains_on(cloud):
    cloud.trainings("preempted 2", "preempted 4", "0 6")
    code, output = cloud.run("--spot", "--retries=1")
    assert code == 0, output
    assert len(cloud.calls(*CREATE)) == len(trainings(cloud)) == 3
    assert "failure 1 of at most 1" in output  # a new checkpoint begins the count again


def test_failures_without_progress_are_counted_and_end_the_run(cloud):
    cloud.trainings(70, 1, 1, 0)
    code, output = cloud.run("--retries=2")
    assert code == 1, output
    assert "given up after 3 failures without a new checkpoint" in output
    assert cloud.state()["requests"] == {}


def test_training_starts_again_after_75_and_never_after_2(cloud):
    cloud.trainings(75, 2, 0)
    code, output = cloud.run()
    assert code == 2, output
    assert len(trainings(cloud)) == 2
    assert len(cloud.calls(*CREATE)) == 1
    assert "training refused its input" in output


def test_three_failures_to_create_then_success(cloud):
    message = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPerProjectPerZone' has been exceeded."
    cloud.plan(faults=[{"match": "queued-resources create", "times": 3, "message": message}])
    code, output = cloud.run()
    assert code == 0, output
    assert output.count(message) == 3
    assert len(cloud.calls(*CREATE)) == 4


def test_a_request_that_fails_is_deleted_and_made_again(cloud):
    cloud.plan(states=["WAITING_FOR_RESOURCES", "FAILED"])
    code, output = cloud.run("--retries=2")
    assert code == 1, output
    assert len(cloud.calls(*CREATE)) == 3
    assert cloud.state()["requests"] == {}


def test_a_connection_that_breaks_is_made_again(cloud):
    cloud.plan(
        faults=[{"match": "host.sh doctor", "times": 1, "message": "[/usr/bin/ssh] exited with return code [255]."}]
    )
    code, output = cloud.run()
    assert code == 0, output
    assert len(trainings(cloud)) == len(cloud.calls(*CREATE)) == 1


@pytest.mark.parametrize(
    ("match", "message", "remedy"),
    [
        ("list", "PERMISSION_DENIED: Permission 'tpu.nodes.list' denied on 'projects/p/locations/us-east5-a'", ROLES),
        ("list", "Permission denied on 'locations/us-east55-a' (or it may not exist).", ROLES),  # a wrong zone
        ("queued-resources create", "INVALID_ARGUMENT: Accelerator v5p-8 is not available in zone us-east5-a", ""),
        ("list", "You do not currently have an active account selected.", LOGIN),
        ("list", "There was a problem refreshing your current auth tokens: Reauthentication failed.\n" + AGAIN, LOGIN),
        ("list", "The required property [project] is not currently set.", ""),
        ("storage cp", "gs://b not found: 404.", ""),
        ("storage cp", "[me@x] does not have permission to access b instance [b] (or it may not exist)", ROLES),
    ],
)
def test_what_trying_again_does_not_help_ends_at_once_with_what_to_do(cloud, match, message, remedy):
    cloud.plan(faults=[{"match": match, "times": 9, "message": message}])
    code, output = cloud.run()
    assert (code, remedy in output) == (2, True), output
    assert output.count(message) == 1
    assert not trainings(cloud)
    assert not cloud.calls(*DELETE)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(NETWORK, marks=pytest.mark.long),
        f"There was a problem refreshing your current auth tokens: {NETWORK}\n{AGAIN}",
    ],
)
def test_a_network_that_is_away_before_anything_is_created_is_not_a_mistake(cloud, message):
    cloud.plan(faults=[{"match": "list", "times": 1, "message": message}])
    code, output = cloud.run()
    assert (code, "gcloud does not reach Google" in output, LOGIN in output) == (1, True, False), output
    assert cloud.run()[0] == 0


def test_a_bucket_that_cannot_be_asked_for_checkpoints_is_no_progress(cloud):
    cloud.trainings("70 4", 70, 70, 70)
    cloud.plan(faults=[{"match": "storage ls .*checkpoints", "times": 1, "message": NETWORK}])
    code, output = cloud.run("--retries=2")
    assert code == 1, output
    # The first failure learns nothing of step 4, the second finds it and begins the count again.
    assert output.count("failure 1 of") == 2
    assert len(trainings(cloud)) == 4


def test_what_the_plan_says_does_not_fit_is_not_created(cloud):
    (cloud.home / "plan-code").write_text("3")
    code, output = cloud.run("--slices=2")
    assert code == 3, output
    assert "does not fit 2 x v5p-8; nothing was created" in output
    assert not cloud.calls(*CREATE)
    assert not cloud.calls("storage")


def test_a_host_that_is_not_well_trains_nothing(cloud):
    (cloud.home / "doctor").write_text("1")
    code, output = cloud.run("--retries=1")
    assert code == 1, output
    assert output.count("grit-jax doctor found a problem") == 2
    assert not trainings(cloud)


def test_what_others_made_is_neither_used_nor_deleted(cloud):
    cloud.gcloud(*CREATE, "run", "--accelerator-type=v5p-8", "--node-id=run")
    code, output = cloud.run()
    assert code == 2, output
    assert "launch/run.sh did not make it" in output
    code, output = cloud.call("pod.sh", "delete", "run", "--zone=us-east5-a")
    assert code == 2, output
    assert not cloud.calls(*DELETE)


def test_a_node_of_others_is_in_nobodys_way(cloud):
    cloud.gcloud("compute", "tpus", "tpu-vm", "create", "run", "--accelerator-type=v5p-8")
    code, output = cloud.run()
    assert code == 2, output
    assert "which launch/run.sh did not make (,run)" in output
    assert not cloud.calls(*CREATE)
    assert cloud.state()["nodes"]


def test_a_pod_that_somebody_deletes_is_not_made_again(cloud):
    cloud.trainings("waits 1")
    process = cloud.start("run.sh", *cloud.arguments())
    wait_for(lambda: trainings(cloud))
    code, output = cloud.call("pod.sh", "delete", "run", "--zone=us-east5-a")
    assert code == 0, output
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert "somebody else has deleted run" in output
    assert len(cloud.calls(*CREATE)) == 1


def test_a_second_start_goes_on_with_the_pod_and_the_training(cloud):
    cloud.trainings("waits 1")
    first = cloud.start("run.sh", *cloud.arguments())
    wait_for(lambda: len(followed(cloud)) == 1)
    code, output = cloud.run()
    assert (code, "another launch/run.sh looks after run" in output) == (2, True), output

    os.killpg(first.pid, signal.SIGKILL)  # the laptop is closed; the pod trains on
    first.communicate()
    second = cloud.start("run.sh", *cloud.arguments())
    wait_for(lambda: len(followed(cloud)) == 2)
    code, output = cloud.call("pod.sh", "stop", "run", "--zone=us-east5-a")
    assert code == 0, output
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 75, output
    assert "run trains already" in output
    assert "run was stopped" in output
    assert len(trainings(cloud)) == len(cloud.calls(*CREATE)) == 1
    assert cloud.state()["nodes"]["run"]["state"] == "READY"  # until it is deleted

    code, output = cloud.call("pod.sh", "status", "run", "--zone=us-east5-a", "--bucket=gs://b")
    assert code == 0, output
    assert "queued resource: ACTIVE, v5p-8, made by launch/run.sh" in output
    assert "run-w-0 stopped 75" in output
    cloud.trainings("", 0)
    code, output = cloud.run()
    assert code == 0, output  # asked for again, it trains again


def test_every_host_of_every_slice_takes_part(cloud):
    cloud.plan(workers=2)
    code, output = cloud.run("--slices=2")
    assert code == 0, output
    assert sorted(trainings(cloud)) == ["run-0-w-0", "run-0-w-1", "run-1-w-0", "run-1-w-1"]
    assert {"--node-count=2", "--node-prefix=run"} <= set(cloud.calls(*CREATE)[0])
    assert "4 ended 0" in output
    # Again where the first host ends before the others.
    assert {(log[4], "--worker=0" in log) for log in followed(cloud)} == {("run-0", True)}
    environment = dict(
        line.partition("=")[::2] for line in (cloud.home / "hosts/run-1.1/1/environment").read_text().splitlines()
    )
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "gs://b/compiled"
    assert environment["JAX_PLATFORMS"] == "tpu,cpu"


def test_a_start_that_does_not_reach_all_hosts_is_completed(cloud):
    cloud.trainings("waits")
    cloud.plan(
        faults=[{"match": "ssh run-1 .*host.sh start", "times": 1, "message": "[/usr/bin/ssh] exited with 255."}]
    )
    process = cloud.start("run.sh", *cloud.arguments("--slices=2"))
    wait_for(lambda: len(trainings(cloud)) == 2 and followed(cloud))
    code, output = cloud.call("pod.sh", "stop", "run", "--zone=us-east5-a")
    assert code == 0, output
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert sorted(trainings(cloud)) == ["run-0-w-0", "run-1-w-0"]
    assert sum(" doctor" in line for line in cloud.hosts_log()) == 2


def test_a_lost_slice_takes_its_job_along(cloud):
    cloud.trainings("preempted 1", 0)
    cloud.plan(workers=1)
    code, output = cloud.run("--slices=2")
    assert code == 0, output
    assert len(cloud.calls(*CREATE)) == 2


def test_a_plain_vm_is_made_again_too(cloud):
    cloud.trainings("preempted 1", 0)
    code, output = cloud.run("--tpu-vm", "--spot")
    assert code == 0, output
    assert not cloud.calls(*CREATE)
    assert len(cloud.calls("compute", "tpus", "tpu-vm", "create")) == 2
    assert cloud.state()["nodes"] == {}


def test_keep_leaves_the_pod(cloud):
    code, output = cloud.run("--keep")
    assert code == 0, output
    assert "the pod is kept, at its price: launch/pod.sh delete run --zone us-east5-a" in output
    code, output = cloud.call("pod.sh", "ssh", "run", "--zone=us-east5-a", "--", "echo", "a  b", "$HOME *")
    assert (code, "a  b $HOME *" in output) == (0, True), output
    code, output = cloud.call("pod.sh", "logs", "run", "--zone=us-east5-a")
    assert (code, "training on run-w-0" in output) == (0, True), output


def test_blanks_and_quotes_survive(cloud):
    data = ["gs://b/my data/a 'b'", 'gs://b/"c"']
    code, output = cloud.run(
        "--bucket=gs://b/my runs", "--secret=HF_TOKEN=hf-token", "--secret=WANDB_API_KEY=wandb",
        "--", f"--data.train={json.dumps(data)}",
    )  # fmt: skip
    assert code == 0, output
    config = yaml.safe_load((cloud.home / "bucket/b/my runs/launch/run/config.yaml").read_text())
    assert config["data"]["train"] == data
    assert config["train"]["output"] == "gs://b/my runs/runs/run"
    environment = (cloud.home / "hosts/run.1/0/environment").read_text().splitlines()
    assert {"HF_TOKEN=value of hf-token", "WANDB_API_KEY=value of wandb"} <= set(environment)
    assert not any("value of" in word for call in cloud.calls() for word in call)


def test_a_dry_run_prints_every_command_and_runs_none_of_them(cloud):
    code, output = cloud.run("--slices=2", "--dry-run")
    assert code == 0, output
    assert cloud.calls() == []
    assert not (cloud.home / "bucket").exists()
    lines = output.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    words = [shlex.split(line[2:]) for line in lines]
    printed = "\n".join(lines)
    order = [
        "config.py",
        " plan ",
        "archive",
        "queued-resources create",
        "install tpu",
        "doctor",
        "start",
        "follow",
        "delete",
    ]
    assert [printed.index(word) for word in order] == sorted(printed.index(word) for word in order)

    code, output = cloud.run("--slices=2")
    ran = [call for call in cloud.calls() if call[0] != "secrets"]
    assert code == 0, output
    for call in ran:
        if call[:2] not in (["storage", "cat"], ["storage", "ls"]) and "logs/" not in call[-1]:  # those of the hosts
            assert any(call == word[-len(call) :] for word in words), call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type"], "--type needs a value"),
        (["--spot=1"], "--spot takes no value"),
        (["--sopt"], "unknown option --sopt"),
        (["--slices=two"], "--slices two is not a whole number"),
        (["--spot", "--flex=3d"], "--spot and --flex"),
        (["--tpu-vm", "--slices=2"], "slices and flex-start need a queued resource"),
        (["--type=v7x-8"], "see docs/launch-xpk.md"),
        (["--bucket=b"], "must start with gs://"),
        (["other"], "one NAME, then options"),
        (["--slices=08"], "--slices 08 is not a whole number"),
        (["--retries=99999999999999999999"], "is not a whole number"),
    ],
)
def test_wrong_options_are_refused(cloud, arguments, message):
    code, output = cloud.run(*arguments)
    assert (code, message in output) == (2, True), output
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.step=3"], "did you mean 'train.steps'?"),
        (["--data.train=mine/medi2"], "data.train: mine/medi2 is on this machine, where no host can read it"),
        ([f"--data.train={ROOT}/tests"], f"data.train: {ROOT}/tests is on this machine"),
        (["--data.train=gs://b/data", "--data.validation=it's mine"], """--recursive 'it'"'"'s mine' gs://"""),
        (["--data.train=gs://b/data", f"--model.init={ROOT}/tests"], f"model.init: {ROOT}/tests is on this machine"),
        (
            ["--data.train=gs://b/data", "--scorecard.suite=suite.yaml"],
            "scorecard.suite: suite.yaml is on this machine",
        ),
        (["--train.steps=9"], "data.train is missing"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["", "dry run"])
def test_a_config_that_hosts_cannot_use_is_refused_before_anything_is_rented(cloud, overrides, message, more):
    code, output = cloud.run(*more, "--", *overrides)
    assert (code, message in output) == (2, True), output
    assert cloud.calls() == []


def test_a_disk_that_only_hosts_have_is_named_by_its_absolute_path(cloud):
    code, output = cloud.run("--dry-run", "--", "--data.train=/mnt/disks/of-hosts-alone")
    assert code == 0, output


@pytest.mark.parametrize(("plan_code", "more"), [(2, []), (3, ["--dry-run"]), (2, ["--dry-run"])])
def test_what_the_plan_refuses_is_refused_in_a_dry_run_too(cloud, plan_code, more):
    (cloud.home / "plan-code").write_text(str(plan_code))
    code, output = cloud.run(*more)
    assert code == plan_code, output
    assert not cloud.calls(*CREATE)
    assert ("--no-compile" in cloud.hosts_log()[-1]) == bool(more)


def test_what_is_missing_on_the_machine_that_launches_is_named(cloud):
    cloud.environment["GRIT_BIN"] = "/no/such/bin"
    code, output = cloud.run()
    assert (code, "/no/such/bin/python is not there; make install brings it" in output) == (2, True), output
    tools = cloud.home / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    cloud.environment |= {"GRIT_BIN": str(cloud.home / "launcher"), "PATH": str(tools)}
    code, output = cloud.run()
    assert (code, "gcloud is not installed" in output) == (2, True), output


def test_only_a_commit_is_launched(tmp_path):
    repository = make_repository(tmp_path)
    cloud = Cloud(tmp_path, repository)
    (repository / "constraints.txt").write_text("")
    code, output = cloud.run()
    assert (code, "changes that are not committed" in output) == (2, True), output
