"""A machine with launch/, and a cloud that is made of this machine's processes (see fake_gcloud.py)."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.commands import ROOT

# Imported, because what is imported is compiled once; a journey makes dozens of calls.
GCLOUD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_gcloud import main
sys.exit(main(sys.argv[1:]))
"""

# On a host: uv makes an environment whose grit-jax does what `host_program` says.
UV = """#!/bin/bash
case $1 in
  venv) mkdir -p "${!#}/bin" ;;
  pip) cp "$FAKE_GCLOUD/host-program" "$(dirname "$5")/grit-jax"; echo "installed ${!#}" >> "$FAKE_GCLOUD/hosts.log" ;;
esac
"""

# The grit-jax of a host: doctor is content, and each start of training does the next line of the file `trainings`: it
# makes a checkpoint of the step that stands there, then exits with a code, is preempted, or waits for SIGTERM.
PROGRAM = """#!/bin/bash
printf '%s %q\\n' "$FAKE_NODE-w-$FAKE_WORKER" "$*" >> "$FAKE_GCLOUD/hosts.log"
case $1 in
  doctor) exit "$(cat "$FAKE_GCLOUD/doctor" 2>/dev/null || echo 0)" ;;
  train)
    times=$(grep -c "^$FAKE_NODE-w-$FAKE_WORKER train" "$FAKE_GCLOUD/hosts.log")
    read -r what step < <(sed -n "${times}p" "$FAKE_GCLOUD/trainings")
    [[ -z $step ]] || mkdir -p "$FAKE_GCLOUD/bucket/b/runs/run/checkpoints/$step"
    echo "training on $FAKE_NODE-w-$FAKE_WORKER"
    env > "$HOME/environment"
    case $what in
      preempted) gcloud fake preempt "$FAKE_NODE"; sleep 60 ;;
      waits) trap 'exit 75' TERM; for ((i = 0; i < 600; i++)); do sleep 0.05; done ;;
      *) exit "$what" ;;
    esac
    ;;
esac
"""

# On the machine that launches: the plan answers with the exit code in the file `plan-code`.
LAUNCHER = """#!/bin/bash
printf 'launcher %q\\n' "$*" >> "$FAKE_GCLOUD/hosts.log"
exit "$(cat "$FAKE_GCLOUD/plan-code" 2>/dev/null || echo 0)"
"""


# What gcloud says, from its sources, and what the scripts add.
AGAIN = "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials."
NETWORK = "HTTPSConnectionPool(host='tpu.googleapis.com', port=443): Max retries exceeded with url: /v2 (Caused by ...)"
LOGIN, ROLES = "nobody is logged in to gcloud on this machine", "docs/pods.md has the roles"


class Cloud:
    """A fresh cloud in a folder, and launch/ as a committed repository beside it."""

    def __init__(self, folder, repository, program=PROGRAM):
        self.home, self.repository = folder / "cloud", repository
        for name in ("bin", "host-bin", "launcher", "tmp"):
            (self.home / name).mkdir(parents=True)
        self._script("bin/gcloud", f'#!/bin/bash\nexec {sys.executable} -I -S -c {shlex.quote(GCLOUD)} "$@"\n')
        self._script("host-bin/uv", UV)
        self._script("host-bin/hostname", '#!/bin/bash\necho "$FAKE_NODE-w-$FAKE_WORKER"\n')
        self._script("launcher/grit-jax", LAUNCHER)
        self._script("launcher/python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        self._script("host-program", program)
        self.environment = os.environ | {
            "FAKE_GCLOUD": str(self.home), "GRIT_BIN": str(self.home / "launcher"), "PYTHONPATH": str(ROOT),
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(self.home / "tmp"),
        }  # fmt: skip

    def _script(self, name, text):
        (self.home / name).write_text(text)
        (self.home / name).chmod(0o755)

    def plan(self, **what):
        """What is to happen, see fake_gcloud.py."""
        (self.home / "plan.json").write_text(json.dumps(what))

    def trainings(self, *lines):
        """What each start of training does: CODE, `preempted` or `waits`; the step of a checkpoint may follow."""
        (self.home / "trainings").write_text("".join(f"{line}\n" for line in lines))

    def gcloud(self, *arguments):
        """One call of the cloud's gcloud."""
        subprocess.run(["gcloud", *arguments], env=self.environment, check=True)

    def start(self, script, *arguments):
        """Starts one of the scripts."""
        command = [self.repository / "launch" / script, *arguments]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def call(self, script, *arguments, timeout=60):
        """Runs one of the scripts: its exit code, and what it printed."""
        process = self.start(script, *arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, output

    def run(self, *more, config="configs/tiny.yaml", **options):
        """launch/run.sh for the run `run`, without waiting times."""
        return self.call("run.sh", *self.arguments(*more, config=config), **options)

    def arguments(self, *more, config="configs/tiny.yaml"):
        config = self.repository / config
        known = ["run", "--type=v5p-8", "--zone=us-east5-a", f"--config={config}", "--bucket=gs://b"]
        return [*known, "--wait=0", "--poll=0", *more] + ([] if "--" in more else ["--", "--data.train=gs://b/data"])

    def calls(self, *words):
        """The argv of every gcloud call so far whose words begin with `words`."""
        path = self.home / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line)[1:] for line in lines]
        return [call for call in calls if call[: len(words)] == list(words)]

    def hosts_log(self):
        """What ran on the hosts, and `launcher ...` for the plan."""
        path = self.home / "hosts.log"
        return path.read_text().splitlines() if path.exists() else []

    def state(self):
        return json.loads((self.home / "state.json").read_text())


def make_repository(folder):
    """launch/ and what it needs, committed."""
    repository = folder / "a repository"  # a blank in its path, as on many a desktop
    shutil.copytree(ROOT / "launch", repository / "launch")
    (repository / "configs").mkdir()
    for name in ("constraints.txt", "configs/tiny.yaml"):
        shutil.copy(ROOT / name, repository / name)
    git = ["git", "-C", repository, "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-verify", "--message=x"]):
        subprocess.run([*git, *command], check=True)
    return repository
