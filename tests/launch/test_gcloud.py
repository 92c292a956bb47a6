"""Every gcloud command of launch/ is one that the real gcloud knows: without an account it still parses arguments."""

import json
import shlex
import shutil
import subprocess

import pytest

from tests.commands import ROOT
from tests.launch.cloud import Cloud, make_repository
from tests.launch.test_prepare import NAMED

# Runs in gcloud's own Python. From stdin: commands, and resources to filter and print; to stdout: what is wrong with
# the commands, and what is printed.
PARSE = """
import contextlib, io, json, sys
sys.path[:0] = [sys.argv[1] + "/lib", sys.argv[1] + "/lib/third_party"]
from googlecloudsdk import gcloud_main
from googlecloudsdk.core.resource import resource_filter, resource_printer
given = json.load(sys.stdin)
parser = gcloud_main.CreateCLI([])._CLI__parser
wrong = []
for command in given["commands"]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(command)
    except SystemExit:
        wrong.append([command, said.getvalue()])
printed = []
for filter_, format_, resources in given["lists"]:
    chosen = [resource for resource in resources if resource_filter.Compile(filter_).Evaluate(resource)]
    out = io.StringIO()
    resource_printer.Print(chosen, format_, out=out)
    printed.append(out.getvalue())
json.dump([wrong, printed], sys.stdout)
"""


def in_gcloud(commands=(), lists=()):
    """What the real gcloud says about commands, and prints for [filter, format, resources]."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    info = ["gcloud", "info", "--format=value[separator=' '](installation.sdk_root,basic.python_location)"]
    root, python = subprocess.run(info, capture_output=True, text=True, check=True).stdout.split()
    given = json.dumps({"commands": list(commands), "lists": list(lists)})
    done = subprocess.run([python, "-c", PARSE, root], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Every gcloud command that a dry run prints, and those of the hosts."""
    folder = tmp_path_factory.mktemp("gcloud")
    cloud = Cloud(folder, make_repository(folder))
    tiers = [["--spot", "--project=p", "--slices=2"], ["--flex=3d"], ["--tpu-vm"], ["--tpu-vm", "--spot"]]
    more = ["--create-flag=--network=n", "--create-flag=--service-account=a@b.c", "--connect-flag=--internal-ip"]
    printed = [cloud.run(*tier, *more, "--dry-run") for tier in tiers]
    verbs = [["status"], ["logs"], ["stop"], ["delete"], ["ssh", "--", "nproc"]]
    config = f"--config={cloud.repository / 'configs/tiny.yaml'}"
    vm = ["vm", "--zone=z", "--bucket=gs://b", config, "--connect-flag=--internal-ip", "--dry-run", *NAMED]
    printed.append(cloud.call("prepare.sh", *vm))
    printed += [cloud.call("pod.sh", verb, "run", "--zone=z", "--dry-run", *rest) for verb, *rest in verbs]
    assert not any(code for code, _ in printed), printed
    found = []
    for _, output in printed:
        for line in output.splitlines():
            words = shlex.split(line.removeprefix("+ "))
            if "gcloud" in words:
                found.append(words[words.index("gcloud") + 1 :])
    return found


def test_the_real_gcloud_knows_every_command(commands):
    scripts = "\n".join(path.read_text() for path in sorted((ROOT / "launch").glob("*.sh")))
    known = {" ".join(command[:4]) for command in commands}
    assert len(known) > 8
    on_hosts = [
        ["secrets", "versions", "access", "latest", "--secret=s"],
        ["storage", "cat", "gs://b/o"],
        ["storage", "cp", "--quiet", "file", "gs://b/o"],
        ["storage", "ls", "gs://b/f/"],
    ]
    for command in on_hosts:  # written here again, because a dry run does not reach them
        assert f"gcloud {' '.join(word for word in command[:3] if '/' not in word and word != 'file')}" in scripts
    wrong, _ = in_gcloud([*commands, *on_hosts])
    assert not wrong, "\n".join(f"gcloud {shlex.join(command)}\n{message}" for command, message in wrong)


def test_the_real_gcloud_refuses_what_it_does_not_know():
    command = ["compute", "tpus", "queued-resources", "create", "run", "--zone=z", "--no-such-flag"]
    wrong, _ = in_gcloud([command])
    assert wrong[0][0] == command


def test_the_real_gcloud_filters_and_prints_what_the_scripts_read(commands):
    node = {"acceleratorType": "v5p-8", "labels": {"grit_run": "run"}}
    place = "projects/p/locations/z"
    resources = [
        {"name": f"{place}/queuedResources/run", "state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [{"node": node}]}},
        {"name": f"{place}/queuedResources/my-run", "state": {"state": "FAILED"}},
        {"name": f"{place}/queuedResources/run-2", "state": {"state": "FAILED"}},
    ]
    nodes = [
        {"name": f"{place}/nodes/run", "state": "READY", "health": "HEALTHY"} | node,
        {"name": f"{place}/nodes/run-1", "state": "CREATING"} | node,
        {"name": f"{place}/nodes/other", "state": "READY", "acceleratorType": "v5p-8"},
    ]

    def asked(kind, start, first):
        """Filter and format of a command that lists `kind`, by the start of its filter and its first value."""
        for command in commands:
            flags = dict(word[2:].partition("=")[::2] for word in command if word.startswith("--"))
            if command[2:4] == [kind, "list"] and flags["filter"].startswith(start) and f"]({first}" in flags["format"]:
                return [flags["filter"], flags["format"]]
        raise AssertionError(f"no command lists {kind} by {start}")

    lists = [
        [*asked("queued-resources", "name", "state"), resources],
        [*asked("tpu-vm", "name", "state"), nodes],
        [*asked("tpu-vm", "labels", "name"), nodes],
        [*asked("tpu-vm", "name~/run-[0-9]", "labels"), nodes],
    ]
    _, printed = in_gcloud(lists=lists)
    assert printed == [
        "ACTIVE,run,v5p-8\n",
        "READY,run,v5p-8\n",
        "run,READY,HEALTHY,v5p-8\nrun-1,CREATING,,v5p-8\n",
        "run,run-1\n",
    ]
