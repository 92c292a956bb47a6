"""Secrets are named to the launch scripts; a value that is given instead is shown nowhere."""

import os
import subprocess

import pytest

from tests.commands import ROOT
from tests.launch.test_prepare import NAMED

VALUES = [
    "hf_abc",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "sk-proj-a1",
    "0123456789abcdef0123456789abcdef01234567",
    "ghp_a1B2",
]
MISTAKES = [
    *(f"HF_TOKEN={value}" for value in VALUES),  # the value instead of the secret's name
    *VALUES,  # no variable
    *(f"{value}=" for value in VALUES),
    *(f"{value}=HF_TOKEN" for value in VALUES),  # the wrong way round
    *(f"HF_TOKEN={value} and more" for value in VALUES),
]


def shown(cloud, output):
    """Everything that a call has printed or handed to another program."""
    return "\n".join([output, *map(str, cloud.calls()), *cloud.hosts_log()])


@pytest.mark.parametrize("secret", MISTAKES)
def test_a_value_instead_of_a_name_is_refused_and_not_shown(cloud, secret):
    vm = ["vm", "--zone=z", "--bucket=gs://b", f"--config={cloud.repository / 'configs/tiny.yaml'}"]
    calls = [("run.sh", cloud.arguments(f"--secret={secret}", "--dry-run"))]
    calls += [("prepare.sh", [*vm, f"--secret={secret}", "--dry-run", *NAMED])]
    for script, arguments in calls:
        code, output = cloud.call(script, *arguments)
        assert (code, "--secret takes VARIABLE=NAME" in output) == (2, True)
        assert not any(value in shown(cloud, output) for value in VALUES)


@pytest.mark.parametrize(
    "words", [["--secret", "HF_TOKEN", "hf_abc"], ["--secret", "HF_TOKEN=", "hf_abc"], ["--secret=HF_TOKEN=", "hf_abc"]]
)
def test_a_value_that_is_a_word_of_its_own_is_not_shown(cloud, words):
    config = f"--config={cloud.repository / 'configs/tiny.yaml'}"
    for script, arguments in (("run.sh", cloud.arguments(*words)), ("prepare.sh", [*words, "--bucket=gs://b", config])):
        code, output = cloud.call(script, *arguments)
        assert (code, "hf_abc" in shown(cloud, output)) == (2, False), output
        code, output = cloud.call(script, *words, *arguments[1 + len(words) :])  # where NAME is expected
        assert (code, "hf_abc" in shown(cloud, output)) == (2, False), output


def test_a_secret_for_this_machine_is_refused_instead_of_left_out(cloud):
    arguments = ["--bucket=gs://b", f"--config={cloud.repository / 'configs/tiny.yaml'}", "--secret=HF_TOKEN=hf-token"]
    code, output = cloud.call("prepare.sh", *arguments, *NAMED)
    assert (code, "--secret is for a VM" in output) == (2, True), output
    assert not cloud.hosts_log()


def test_a_trace_of_the_hosts_script_shows_no_value(cloud):
    environment = cloud.environment | {"HOME": str(cloud.home), "GRIT_SECRETS": "HF_TOKEN=hf-token WANDB_API_KEY=wandb"}
    script = 'source "$0" secrets; secrets; [[ $HF_TOKEN,$WANDB_API_KEY == "value of hf-token,value of wandb" ]]'
    done = subprocess.run(
        ["bash", "-xc", script, ROOT / "launch/host.sh"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=cloud.home,
    )
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition("[[")
    assert "set +x" in before
    assert "value of" not in before
    assert os.fspath(ROOT / "launch/host.sh") not in after
