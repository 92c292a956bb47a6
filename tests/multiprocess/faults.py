"""Training runs of several processes that are disturbed, started again, and compared with undisturbed ones.

python -m tests.multiprocess.faults --trials 50 --seed 0
"""

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from grit_jax.checkpoints.checkpoint import open_checkpoint
from grit_jax.model.transformer import abstract_model, abstract_params
from tests.commands import ROOT, TINY, command, environment, write_data
from tests.multiprocess import launch

STEPS, EVERY, DEVICES = 8, 2, 4
SILENCE = 10  # distributed.timeout_seconds
LIMIT = 60  # seconds in which the others must have ended after one is gone
START = 300  # seconds for a run on a slow machine
FAULTS = ("kill", "kill while saving", "sigterm", "damage", "full disk", "stall", "stop below damage")


class Job:
    """The processes of one run, started together, with `settings` of its own."""

    def __init__(self, data, output, num_processes, settings=()):
        address = launch.free_address()
        options = [
            ROOT / "configs/tiny.yaml", *TINY, f"--data.train={data}", f"--train.output={output}",
            f"--train.steps={STEPS}", f"--checkpoint.every={EVERY}", f"--checkpoint.timeout_seconds={LIMIT // 2}",
            "--logging.every=1", *settings,
        ]  # fmt: skip
        self.output, self.processes = Path(output), []
        for index in range(num_processes):
            joining = [
                f"--distributed.coordinator={address}", f"--distributed.num_processes={num_processes}",
                f"--distributed.process_id={index}", f"--distributed.timeout_seconds={SILENCE}",
            ]  # fmt: skip
            with self._log(index).open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        command("train", *options, *joining),
                        stdout=log, stderr=log, env=environment(DEVICES // num_processes, device_order="interleaved"),
                    )
                )  # fmt: skip

    def _log(self, index):
        self.output.parent.mkdir(parents=True, exist_ok=True)
        return self.output.parent / f"{self.output.name}-{index}.log"

    def text(self):
        """What all processes have printed, in this run and earlier ones of its folder."""
        return "\n".join(self._log(index).read_text(errors="replace") for index in range(len(self.processes)))

    def until(self, reached, seconds=START):
        """Waits until `reached()`, or until a process has ended."""
        deadline = time.monotonic() + seconds
        while not reached() and all(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, f"nothing happened for {seconds} s\n{self.text()[-4000:]}"
            time.sleep(0.02)

    def at(self, step):
        """Waits until the run has printed a step."""
        self.until(lambda: f"step {step}/{STEPS}" in self.text())

    def ended(self, seconds):
        """Exit codes, once all have ended within `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                self.kill()
                raise AssertionError(f"a process still runs after {seconds} s\n{self.text()[-4000:]}") from error
        return [process.returncode for process in self.processes]

    def kill(self):
        """Ends all processes at once."""
        for process in self.processes:
            process.kill()
            process.wait()


def checkpoint_steps(output, kind="checkpoints"):
    """Steps whose checkpoint is committed, ascending."""
    return sorted(int(child.name) for child in (Path(output) / kind).glob("*") if child.name.isdigit())


def saving(draw):
    """Settings of what is saved beside the newest; they may differ from start to start."""
    choices = {
        "params_every": ["null", 1, 3],
        "keep_every": ["null", 4],
        "keep_best": [0, 1],
    }
    settings = {name: draw.choice(values) for name, values in choices.items()}
    best = ["--checkpoint.best_metric=loss"] if settings["keep_best"] else []
    return settings, [*(f"--checkpoint.{name}={value}" for name, value in settings.items()), *best]


def kept_parameters(output):
    """Which files the complete checkpoints of `params/` consist of."""
    folders = [Path(output) / f"params/{step}" for step in checkpoint_steps(output, "params")]
    return {file: file.stat().st_ino for folder in folders for file in folder.rglob("*") if file.is_file()}


def damage_newest(output):
    """Truncates the files of the newest checkpoint, if there is one."""
    for step in checkpoint_steps(output)[-1:]:
        for file in (output / f"checkpoints/{step}").rglob("*"):
            if file.is_file():
                os.truncate(file, file.stat().st_size // 2)


def disturb(job, fault, draw):
    """Does one harm to a running job; returns when all its processes have ended."""
    victim = draw.choice(job.processes)
    # When the last step but one is printed, two checkpoints are complete: saving one waits for the one before.
    step = STEPS - 1 if fault == "stop below damage" else draw.randrange(1, STEPS)
    if fault == "kill while saving":
        job.until(lambda: any(job.output.glob("checkpoints/*tmp*")))
        victim.kill()
    else:
        job.at(step)
        if fault == "kill":
            victim.kill()
        elif fault == "sigterm":
            victim.terminate()
        elif "damage" in fault:
            job.kill()
        elif fault == "full disk":
            for process in draw.choice([job.processes, [victim]]):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        elif fault == "stall":
            victim.send_signal(signal.SIGSTOP)
            others = [process for process in job.processes if process is not victim]
            deadline = time.monotonic() + LIMIT
            while any(process.poll() is None for process in others):
                assert time.monotonic() < deadline, f"others wait for a stalled process\n{job.text()[-4000:]}"
                time.sleep(0.05)
            victim.kill()
    # What is not ended by a fault goes on to the last step, which takes its time.
    codes = job.ended(START if fault in ("sigterm", "full disk") else LIMIT)
    if fault == "sigterm":
        assert set(codes) in ({75}, {0}), f"{codes}\n{job.text()[-4000:]}"
    if "damage" in fault:
        damage_newest(job.output)


def stop_below_damage(job, draw):
    """Stops a run that has passed over a damaged checkpoint before it saves that step again."""
    job.until(lambda: "set aside" in job.text())
    draw.choice(job.processes).terminate()
    codes = job.ended(START)
    assert set(codes) in ({75}, {0}, {2}), f"{codes}\n{job.text()[-4000:]}"


def weights(output):
    """The weights of a run's newest checkpoint, on the host."""
    pretrained = open_checkpoint(output)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_params(abstract_model(pretrained.architecture))
    return jax.device_get(pretrained.load(jax.tree.map(lambda _: here, shapes)))


def undisturbed(folder, num_processes):
    """Weights of a run that nothing happens to; made once per folder."""
    output = folder / f"undisturbed-{num_processes}"
    if not output.exists():
        job = Job(write_data(folder / "data"), output, num_processes)
        assert job.ended(START) == [0] * num_processes, job.text()[-4000:]
    return weights(output)


def trial(seed, folder):
    """One run with one fault; raises AssertionError where a law does not hold, and returns what was done."""
    draw = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    before = draw.choice([2, 2, 4])
    after = draw.choice([before, before, before // 2])
    expected = undisturbed(folder, before)
    output = folder / f"trial-{seed}"
    job = Job(folder / "data", output, before, saving(draw)[1])
    try:
        disturb(job, fault, draw)
    finally:
        job.kill()
    committed, damaged = checkpoint_steps(output), []
    if "damage" in fault:
        committed, damaged = committed[:-1], committed[-1:]
    if fault == "stop below damage" and committed:
        stop_below_damage(Job(folder / "data", output, before, saving(draw)[1]), draw)
        committed = checkpoint_steps(output)
    parameters, (settings, options) = kept_parameters(output), saving(draw)
    again = Job(folder / "data", output, after, options)
    if damaged and not committed:
        assert set(again.ended(START)) == {2}, again.text()[-4000:]
        return f"{fault}, {before} processes: the only checkpoint was damaged, which was said"
    assert again.ended(START) == [0] * after, again.text()[-4000:]
    resumed = re.findall(r"resumed from step (\d+)", again.text())
    if committed and committed[-1] < STEPS:
        assert int(resumed[-1]) == committed[-1], f"{resumed} of {committed}"
    assert checkpoint_steps(output, "set_aside/checkpoints") == damaged
    assert kept_parameters(output).items() >= parameters.items(), "parameters were lost or written again"
    if settings["keep_every"] != "null":
        assert {step for step in committed if step % settings["keep_every"] == 0} <= set(checkpoint_steps(output))
    found = weights(output)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if before == after:
            assert np.array_equal(ours, theirs)
        else:
            assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    start = committed[-1] if committed else 0
    return f"{fault}, {before} processes, then {after} from step {start} with {settings}"


def main():
    """Runs trials and prints what each did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + args.trials):
            print(f"trial {seed}: {trial(seed, Path(folder))}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
