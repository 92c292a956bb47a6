"""What `status` says of a run folder."""

import json
import subprocess
import sys
import time

import pytest

from grit_jax.cli.main import main
from grit_jax.errors import InputError
from grit_jax.runs.history import duration
from grit_jax.runs.lock import writer_lock
from grit_jax.runs.status import as_lines, read_status
from tests.bucket import BUCKET, emulator
from tests.commands import ROOT
from tests.runs.runs import write_run


def test_a_folder_tells_the_state_of_its_run(tmp_path):
    with writer_lock(tmp_path):
        status = read_status(write_run(tmp_path))
    assert (status.step, status.steps, status.checkpoint, status.skipped) == (60, 100, 40, 1)
    assert [spike["step"] for spike in status.spikes] == [40]
    assert status.recent["loss/embedding"] == pytest.approx(1.5)
    assert status.recent["loss/embedding/msmarco"] == 2.0
    assert status.recent["tokens_per_second"] == pytest.approx(1000 / 1.5)
    assert status.recent["embedding/effective_rank"] == 60, "the last one, not a mean of six"
    assert status.seconds_left == pytest.approx(40 * 2), "at the pace of the clock, saving and evaluation included"
    assert status.goodput.seconds["restart"] == 0
    assert status.goodput.seconds["down"] == pytest.approx(20)
    assert status.alive and not status.done
    assert not read_status(tmp_path).alive


def test_the_lines_for_people_name_what_matters(tmp_path):
    write_run(tmp_path)
    lines = "\n".join(as_lines(read_status(tmp_path)))
    for text in (
        "step 60 of 100 (60%), not running",
        "embedding 1.5000  generative 3.0000",
        "highest loss first: msmarco 2.0000, nli 1.0000",
        "scorecard  search 0.5000  embedding 0.6000",
        "667 tokens/s, 1.5 s a step",
        "49.1% of 3 min 40 s, 2 sessions: startup 36.4%, down 9.1%, compile 5.5%",
        "checkpoint step 40",
        "1 updates, not finite",
        "step 40: loss/generative is 9",
    ):
        assert text in lines


def test_json_is_one_object_that_keeps_every_number(tmp_path, capsys):
    write_run(tmp_path)
    assert main(["status", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["alive"], said["done"], said["writer"]) == (60, False, False, None)
    assert said["goodput"]["ratio"] == pytest.approx(108 / 220)
    assert said["recent"]["learning_rate"] == pytest.approx(4e-4)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run folder: no config.yaml, no metrics.jsonl; name a train.output"):
        read_status(tmp_path / "nothing")


def test_a_run_that_has_not_made_a_step_has_a_status(tmp_path):
    (tmp_path / "config.yaml").write_text("train:\n  steps: 5\n")
    with writer_lock(tmp_path):
        assert "step 0 of 5 (0%), starting" in "\n".join(as_lines(read_status(tmp_path)))


def test_a_living_run_that_logs_nothing_is_called_silent(tmp_path):
    with writer_lock(tmp_path):
        write_run(tmp_path, now=time.time() - 300)
        assert "1 min 20 s left, silent for 5 min" in "\n".join(as_lines(read_status(tmp_path)))


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (65, "1 min 5 s"), (7300, "2 h 1 min"), (200_000, "2 d 7 h")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_status_starts_without_jax(tmp_path):
    write_run(tmp_path)
    program = "import sys; from grit_jax.cli.main import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    for name in ("status", "plot"):
        subprocess.run([sys.executable, "-c", program, name, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)


PROGRAM = """
import sys
from pathlib import Path
from grit_jax.cli.main import main
from grit_jax import files
from tests.runs.runs import write_run
local, remote = Path(sys.argv[1]), sys.argv[2]
write_run(local)
for file in local.rglob("*"):
    if file.is_file():
        files.write_bytes(f"{remote}/{file.relative_to(local)}", file.read_bytes())
for name in ("20/params/a", "20/commit_success.txt", "40/params/a"):
    files.write_text(f"{remote}/checkpoints/{name}", "")
assert main(["status", remote]) == 0
assert main(["plot", remote]) == 0
assert "plot.png" in files.names(remote)
"""


def test_a_run_in_a_bucket_has_a_status_and_a_picture(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as environment:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), f"gs://{BUCKET}/run"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "checkpoint step 20" in done.stdout, done.stderr + done.stdout
    assert done.returncode == 0, done.stderr
