"""What a run does with checkpoints of steps that it will do again."""

import os
import shutil
import signal
import time

import pytest

from grit_jax.checkpoints.checkpoint import Checkpoints
from grit_jax.config import load_config, parse_config
from grit_jax.errors import InputError
from grit_jax.train.loop import Trainer
from tests.commands import ROOT, TINY, losses, write_data
from tests.multiprocess import launch

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trainer(data, output, *more):
    options = [*TINY, f"--data.train={data}", f"--train.output={output}", f"--train.steps={STEPS}", *more]
    return Trainer(load_config(ROOT / "configs/tiny.yaml", options))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert trainer(data, output).fit()
    return output


class Crash(Exception):
    """The end of a run whose process is killed, as far as its folder shows."""


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def gone_within(paths, seconds):
    deadline = time.monotonic() + seconds
    while any(paths()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(paths())


def crash_when_saved(output):
    def crash():
        assert gone_within(lambda: output.glob("*/*tmp*"), seconds=60)
        raise Crash

    return crash


def at_batch(run, step, action):
    """Makes a run do something when it asks for the batch of a step."""
    batches = run.batches

    def disturbed(start):
        for number, batch in enumerate(batches(start), start + 1):
            if number == step:
                action()
            yield batch

    run.batches = disturbed
    return run


def crashed(data, output, step, *more):
    """A run that ends before a step and whose saves of earlier ones are on disk."""
    run = at_batch(trainer(data, output, *more), step, crash_when_saved(output))
    with pytest.raises(Crash):
        run.fit()


def steps_of(folder):
    return Checkpoints(folder, read_only=True).steps()


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def inodes(folder):
    return {file: file.stat().st_ino for file in folder.rglob("*")}


# When a read fails, Orbax closes its event loop while others are still at work, which then complain to nobody.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_damaged_newest_checkpoint_is_set_aside_by_the_run_that_saves_its_step_again(
    data, undisturbed, tmp_path, capsys
):
    output = tmp_path / "run"
    assert trainer(data, output).fit()
    truncate(output / "checkpoints/6")
    damaged = [file.read_bytes() for file in sorted((output / "checkpoints/6").rglob("*")) if file.is_file()]
    again = trainer(data, output)
    assert steps_of(output / "checkpoints") == [4, 6], "the constructor writes nothing"
    assert again.fit()
    said = capsys.readouterr().out
    assert "checkpoints/6: the checkpoint is damaged" in said and f"it is now {output}/set_aside/checkpoints/6" in said
    kept = [file.read_bytes() for file in sorted((output / "set_aside/checkpoints/6").rglob("*")) if file.is_file()]
    assert kept == damaged
    assert steps_of(output / "checkpoints") == [4, 6]
    assert losses(output) == losses(undisturbed)


def test_a_run_that_is_stopped_below_a_damaged_checkpoint_is_saved_there(data, undisturbed, tmp_path):
    output = tmp_path / "run"
    for damages in (1, 2):  # the same step twice
        assert trainer(data, output, "--checkpoint.keep=3").fit()
        truncate(output / "checkpoints/6")
        assert (output / "set_aside/checkpoints").exists() == (damages > 1)
    stopped = at_batch(trainer(data, output, "--checkpoint.keep=3"), 6, stop)
    assert not stopped.fit()
    assert steps_of(output / "checkpoints") == [2, 4, 5]
    assert sorted(os.listdir(output / "set_aside/checkpoints")) == ["6", "6-2"]
    assert trainer(data, output).fit()
    assert losses(output) == losses(undisturbed)


@pytest.mark.long
def test_parameters_of_steps_that_are_done_again_stay(data, undisturbed, tmp_path):
    output, options = tmp_path / "run", ["--checkpoint.every=4", "--checkpoint.params_every=1"]
    crashed(data, output, 4, *options)
    assert steps_of(output / "params") == [1, 2, 3] and steps_of(output / "checkpoints") == []
    before = inodes(output / "params")
    assert trainer(data, output, *options).fit()
    assert steps_of(output / "params") == [1, 2, 3, 4, 5, 6]
    assert inodes(output / "params").items() >= before.items()
    assert losses(output) == losses(undisturbed)


def test_damaged_parameters_of_steps_that_are_done_again_are_set_aside_and_saved_again(data, tmp_path):
    output, options = tmp_path / "run", ["--checkpoint.every=4", "--checkpoint.params_every=1"]
    crashed(data, output, 4, *options)
    truncate(output / "params/2")
    assert trainer(data, output, *options).fit()
    assert (output / "set_aside/params/2").exists() and not (output / "set_aside/params/1").exists()
    Checkpoints(output / "params", read_only=True).metadata(2)


@pytest.mark.long
def test_parameters_of_another_config_are_set_aside_and_saved_again(data, tmp_path):
    output = tmp_path / "run"
    more = ["--checkpoint.params_every=1", "--checkpoint.every=100"]
    run = trainer(data, output, *more)
    at_batch(run, 4, crash_when_saved(output))
    with pytest.raises(Crash):
        run.fit()
    for change in ("--optimizer.learning_rate=0.001", "--train.steps=5"):
        run = trainer(data, output, *more, change)
        at_batch(run, 3, crash_when_saved(output))
        with pytest.raises(Crash):
            run.fit()
    assert sorted(os.listdir(output / "set_aside/params")) == ["1", "1-2", "2", "2-2", "3"]
    for step, rate in ((1, 0.0005), (2, 0.0005)):
        saved = Checkpoints(output / "params", read_only=True).metadata(step)
        assert parse_config(saved.config).optimizer.learning_rate == rate


@pytest.mark.parametrize("every", [*(pytest.param(every, marks=pytest.mark.long) for every in (1, 3)), None])
def test_settings_of_saving_may_change_between_starts(data, tmp_path, every):
    output = tmp_path / "run"
    crashed(data, output, 4, "--checkpoint.every=4", "--checkpoint.params_every=2")
    half_written = output / "params/4.orbax-checkpoint-tmp"
    half_written.mkdir()
    params_every = "null" if every is None else every
    assert trainer(data, output, "--checkpoint.every=3", f"--checkpoint.params_every={params_every}").fit()
    assert steps_of(output / "params") == sorted({2, *range(every or 7, 7, every or 7)})
    assert steps_of(output / "checkpoints") == [3, 6]
    assert gone_within(lambda: output.glob("*/*tmp*"), seconds=60)


def test_what_another_process_saved_meanwhile_is_not_taken_for_damaged(data, tmp_path):
    output = tmp_path / "run"
    assert trainer(data, output, "--checkpoint.keep=3").fit()
    logged = losses(output)
    shutil.move(output / "checkpoints/6", tmp_path / "6")
    slow = trainer(data, output)
    shutil.move(tmp_path / "6", output / "checkpoints/6")
    with pytest.raises(InputError, match="another process saved step 6 while this one started from step 4"):
        slow.fit()
    assert steps_of(output / "checkpoints") == [2, 4, 6]
    assert losses(output) == logged


SEVERAL = """
    import sys
    from grit_jax.config import load_config, parse_config
    from grit_jax.errors import InputError
    from grit_jax.train.loop import Trainer
    from grit_jax.runs import folder

    apart, *options = sys.argv[2:]
    if apart == "apart" and jax.process_index() == 1:
        folder.checkpoint_steps = lambda folder: iter([4])
    try:
        print(Trainer(load_config(sys.argv[1], options)).fit())
    except InputError as error:
        print(error)
"""


@pytest.mark.long
def test_processes_set_damaged_checkpoints_aside_together_and_refuse_a_folder_that_they_do_not_share(data, tmp_path):
    output = tmp_path / "run"
    assert trainer(data, output).fit()
    truncate(output / "checkpoints/6")
    options = [*TINY, f"--data.train={data}", f"--train.output={output}", f"--train.steps={STEPS}"]
    apart = launch.run(SEVERAL, ROOT / "configs/tiny.yaml", "apart", *options, devices_each=4)
    assert all("checkpoints in train.output, which all hosts must share, is" in text for text in apart), apart
    assert steps_of(output / "checkpoints") == [4, 6]
    together = launch.run(SEVERAL, ROOT / "configs/tiny.yaml", "together", *options, devices_each=4)
    assert [text.splitlines()[-1] for text in together] == ["True", "True"]
    assert together[0].count("it is now") == 1 and (output / "set_aside/checkpoints/6").exists()
    assert steps_of(output / "checkpoints") == [4, 6]
