"""A dry run of every script and verb prints commands, runs none of them and changes nothing."""

import shlex

import pytest

from tests.commands import ROOT
from tests.launch.test_prepare import NAMED
from tests.test_docs import SHELL, blocks, of_program

POD = ["run", "--zone=us-east5-a", "--dry-run"]
VERBS = [
    ["status", *POD],
    ["status", *POD, "--bucket=gs://b"],
    ["logs", *POD],
    ["ssh", *POD, "--", "df", "-h"],
    ["ssh", *POD, "--node=1", "--worker=0", "--", "df", "-h"],
    ["stop", *POD],
    ["delete", *POD],
]
CALLS = [("pod.sh", verb) for verb in VERBS] + [
    ("prepare.sh", ["--bucket=gs://b", "--dry-run", *NAMED]),
    ("prepare.sh", ["vm", "--zone=z", "--bucket=gs://b", "--secret=A=b", "--dry-run", *NAMED]),
    ("run.sh", ["--dry-run"]),
    ("run.sh", ["--dry-run", "--no-plan"]),
    ("run.sh", ["--dry-run", *NAMED]),
    ("run.sh", ["--dry-run", "--tpu-vm", "--keep"]),
]


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("script", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_a_dry_run_prints_commands_and_runs_none(cloud, script, arguments):
    if script == "run.sh":
        arguments = cloud.arguments(*arguments)
    elif script == "prepare.sh":
        arguments = [f"--config={cloud.repository / 'configs/tiny.yaml'}", *arguments]
    before = everything(cloud.home)
    code, output = cloud.call(script, *arguments)
    assert code == 0, output
    assert output.startswith("+ ")
    for line in output.splitlines():
        assert line.startswith("+ "), output
        shlex.split(line)
    after = everything(cloud.home)
    # The plan's own check of the step, which takes seconds and compiles nothing, is the one program that runs.
    assert all("--no-compile" in line for line in cloud.hosts_log())
    after.pop(cloud.home / "hosts.log", None)
    assert after == before


def test_the_status_of_the_run_is_a_command_like_the_others(cloud):
    code, output = cloud.call("pod.sh", "status", *POD, "--bucket=gs://b")
    assert (code, output.splitlines()[-1].endswith("grit-jax status gs://b/runs/run")) == (0, True), output


def shown_commands():
    """Every call of a launch script in the documentation that is whole."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in (block for block in blocks(page.read_text(), *SHELL) if "launch/" in block):
            for script in ("run.sh", "prepare.sh", "pod.sh"):
                for arguments in of_program(block, script):
                    if script == "pod.sh" or any(word.startswith("--config") for word in arguments):
                        yield script, arguments


@pytest.mark.parametrize(("script", "arguments"), [*shown_commands()], ids=str)
def test_the_commands_of_the_documentation_pass_a_dry_run(cloud, script, arguments):
    (cloud.home / "configs").symlink_to(ROOT / "configs")
    place = arguments.index("--") if "--" in arguments else len(arguments)
    code, output = cloud.call(script, *arguments[:place], "--dry-run", *arguments[place:])
    assert code == 0, output
