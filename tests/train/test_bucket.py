"""A whole run whose data and folder are in a bucket."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from grit_jax import files
from tests.bucket import BUCKET, Bucket
from tests.commands import ROOT, grit_jax, losses, start, train_arguments, write_data

pytest.importorskip("gcp_storage_emulator")
COPY = """
import json, sys
from grit_jax.runs.logs import read_lines
for line in read_lines(sys.argv[1]):
    print(json.dumps(line))
"""
LIST = """
import json, sys
from grit_jax import files
for folder in sys.argv[1:]:
    print(json.dumps(files.names(folder)))
"""
RUN = f"gs://{BUCKET}/runs/first"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    bucket = Bucket()
    bucket.start()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield bucket
    bucket.stop()


def succeeded(*arguments):
    done = grit_jax(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


CHECK = """
import sys
from grit_jax.config import load_config
from grit_jax.errors import InputError
from grit_jax.train.resolve import check_folder
try:
    check_folder(load_config(sys.argv[1], ["--train.output=" + sys.argv[2], "--loss.temperature=0.5"]))
except InputError as error:
    sys.exit(str(error))
"""


def test_a_folder_in_a_bucket_is_a_runs_from_its_first_complete_checkpoint_on(bucket):
    def checked():
        program = [sys.executable, "-c", CHECK, ROOT / "configs/tiny.yaml", RUN]
        done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, "holds a run with another config" in done.stderr

    bucket.put("runs/first/config.yaml", (ROOT / "configs/tiny.yaml").read_bytes())
    assert checked() == (0, False)
    bucket.put("runs/first/checkpoints/5/params/part", b"written when the run was killed")
    assert checked() == (0, False)
    bucket.put("runs/first/checkpoints/5/commit_success.txt", b"done")
    assert checked() == (1, True)


@pytest.mark.long
def test_a_run_in_a_bucket_is_stopped_gone_on_with_watched_and_used(bucket, tmp_path):
    data = write_data(tmp_path / "data")
    for file in data.iterdir():
        bucket.put(f"data/{file.name}", file.read_bytes())
    # Nothing here depends on the number of steps that are planned.
    options = ["--optimizer.schedule=constant", "--optimizer.warmup_steps=1", "--checkpoint.every=5"]
    arguments = train_arguments(f"gs://{BUCKET}/data", RUN, *options)
    with start(*arguments, "--train.steps=100000") as process:
        for line in process.stdout:
            if line.startswith("step 5/"):
                status = json.loads(succeeded("status", RUN, "--json"))
                assert status["alive"] and status["writer"]["pid"] == process.pid
                bucket.stop()
                time.sleep(2)
                bucket.start()
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    status = json.loads(succeeded("status", RUN, "--json"))
    stopped = status["step"]
    assert stopped >= 5 and status["checkpoint"] == stopped and status["writer"] is None

    resumed = succeeded(*arguments, f"--train.steps={stopped + 3}")
    assert int(re.search(r"resumed from step (\d+)", resumed)[1]) == stopped
    assert f"step {stopped + 3:,} of {stopped + 3:,} (100%), done" in succeeded("status", RUN)
    assert succeeded("plot", RUN, "--output", tmp_path / "run.png").strip() == str(tmp_path / "run.png")
    assert succeeded("plot", RUN).strip() == f"{RUN}/plot.png"

    # The numbers are those of a run on a disk that nothing happened to.
    succeeded(*train_arguments(data, tmp_path / "run", *options, f"--train.steps={stopped + 3}"))
    program = [sys.executable, "-c", COPY, f"{RUN}/metrics.jsonl"]
    lines = subprocess.run(program, capture_output=True, check=True, cwd=ROOT).stdout
    files.write_bytes(tmp_path / "copied" / "metrics.jsonl", lines)
    assert losses(tmp_path / "copied") == losses(tmp_path / "run")
    (tmp_path / "texts.txt").write_text("red is a word\nblue\n")
    for model, name in ((RUN, "there"), (tmp_path / "run", "here")):
        succeeded("encode", model, "--input", tmp_path / "texts.txt", "--output", tmp_path / f"{name}.npy")
    assert np.array_equal(np.load(tmp_path / "there.npy"), np.load(tmp_path / "here.npy"))


@pytest.mark.long
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, tmp_path):
    arguments = train_arguments(write_data(tmp_path / "data"), RUN, "--train.steps=4", "--checkpoint.params_every=1")
    succeeded(*arguments)
    bucket.put("runs/first/checkpoints/4/_CHECKPOINT_METADATA", b"{")
    resumed = succeeded(*arguments)
    assert f"it is now {RUN}/set_aside/checkpoints/4" in resumed and "resumed from step 2" in resumed
    program = [sys.executable, "-c", LIST, f"{RUN}/set_aside/checkpoints/4", f"{RUN}/checkpoints", f"{RUN}/params"]
    listed = subprocess.run(program, capture_output=True, check=True, cwd=ROOT, text=True).stdout.splitlines()
    moved, checkpoints, params = map(json.loads, listed)
    assert {"_CHECKPOINT_METADATA", "commit_success.txt", "params", "optimizer"} <= set(moved)
    assert checkpoints == ["2", "4"] and params == ["1", "2", "3", "4"]
    assert "done: " in succeeded(*arguments[:-2], "--train.steps=4")
