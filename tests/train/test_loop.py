"""Whole runs: resuming, stopping, evaluating and refusing."""

import json
import random
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.cli.main import main
from grit_jax.config import Config, TrainConfig, load_config
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import init_params
from grit_jax.runs.checks import verdict
from grit_jax.runs.lock import read_writer, refuse_living, writer_lock
from grit_jax.runs.logs import read_lines
from grit_jax.train.callbacks import Callback
from grit_jax.train.dry_run import dry_run
from grit_jax.train.loop import Trainer
from tests.commands import ROOT, TINY, environment, grit_jax, losses, start, train_arguments, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of eight steps without interruption."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    result = grit_jax(*train_arguments(data, output, "--train.steps=8", f"--data.validation={data}"))
    assert result.returncode == 0, result.stderr
    return output


def config(data, output, *more):
    return load_config(ROOT / "configs/tiny.yaml", [*TINY, f"--data.train={data}", f"--train.output={output}", *more])


def signal_at(step, number, arguments):
    """Sends a signal to a run that has printed a step, and returns its exit code."""
    with start(*arguments) as process:
        for line in process.stdout:
            if line.startswith(f"step {step}/"):
                process.send_signal(number)
        return process.wait()


def kill_and_resume(data, output, fatal):
    """Kills a run of eight steps when it has printed step `fatal`, and runs the same command again."""
    arguments = train_arguments(data, output, "--train.steps=8", f"--data.validation={data}")
    signal_at(fatal, signal.SIGKILL, arguments)
    resumed = grit_jax(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    return resumed.stdout


def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(data, finished, tmp_path):
    # From step 5 on a checkpoint is complete: saving step 4 waits for that of step 2.
    fatal = random.randrange(5, 8)
    assert "resumed from step" in kill_and_resume(data, tmp_path / "killed", fatal)
    assert losses(tmp_path / "killed") == losses(finished), f"killed at step {fatal}"


@pytest.mark.long
@pytest.mark.parametrize("fatal", range(1, 9))
def test_a_run_killed_at_every_step_resumes_bit_for_bit(data, finished, tmp_path, fatal):
    kill_and_resume(data, tmp_path / "killed", fatal)
    assert losses(tmp_path / "killed") == losses(finished)


def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(data, finished, tmp_path):
    output = tmp_path / "stopped"
    arguments = train_arguments(data, output, "--train.steps=8", f"--data.validation={data}", "--checkpoint.every=2")
    assert signal_at(3, signal.SIGTERM, arguments) == 75
    assert grit_jax(*arguments).returncode == 0
    assert losses(output) == losses(finished)


def test_a_finished_run_is_left_alone_and_more_steps_go_on(data, finished, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(finished, output)
    config_of = [f"--data.validation={data}"]
    assert Trainer(config(data, output, "--train.steps=8", *config_of)).fit()
    assert losses(output) == losses(finished)
    trainer = Trainer(config(data, output, "--train.steps=9", "--mesh.data=2", "--mesh.fsdp=4", *config_of))
    assert trainer.step == 8
    assert trainer.fit()
    assert [line[0] for line in losses(output)] == list(range(1, 10))


def test_a_changed_config_is_refused_with_a_diff(data, finished):
    changed = config(data, finished, "--train.steps=8", f"--data.validation={data}", "--loss.temperature=0.5")
    with pytest.raises(InputError, match=r"another config \(loss.temperature: 0.05 -> 0.5\); put these values back"):
        Trainer(changed)


@pytest.mark.long
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew_with_another_config(data, tmp_path):
    output = tmp_path / "run"
    arguments = train_arguments(data, output, "--checkpoint.every=1000")
    signal_at(3, signal.SIGKILL, [*arguments, "--train.steps=1000"])
    assert (output / "checkpoints").is_dir()
    assert (output / "config.yaml").exists()
    assert grit_jax(*arguments, "--train.steps=2", "--loss.temperature=0.5").returncode == 0
    assert load_config(output / "config.yaml").loss.temperature == 0.5
    assert [line[0] for line in losses(output)] == [1, 2]


def test_changed_data_is_refused(data, finished, tmp_path):
    other = write_data(tmp_path / "data")
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    text = (copy / "config.yaml").read_text().replace(str(data), str(other))
    (copy / "config.yaml").write_text(text)
    (other / "generative.jsonl").write_text((other / "generative.jsonl").read_text().replace("dog", "god"))
    with pytest.raises(InputError, match=r"data.train is not what this run was trained on"):
        Trainer(config(other, copy, "--train.steps=8", f"--data.validation={other}"))


def check_of(settings, target):
    """One check of the dry run."""
    return next(check for check in dry_run(settings) if check.target == target)


def move_to_positives(folder):
    """Makes the negatives of every record positives: the same texts in the same order, with other roles."""
    rows = [json.loads(line) for line in (folder / "embedding.jsonl").read_text().splitlines()]
    moved = [row | {"pos": row["pos"] + row["neg"], "neg": []} for row in rows]
    (folder / "embedding.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))


def test_texts_that_became_positives_are_other_data(data, finished, tmp_path):
    other, copy = write_data(tmp_path / "data"), tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace(str(data), str(other)))
    resumed = config(other, copy, "--train.steps=8", f"--data.validation={other}")
    assert Trainer(resumed).step == 8
    assert check_of(resumed, "resume").passed
    move_to_positives(other)
    with pytest.raises(InputError, match=r"data.train is not what this run was trained on") as error:
        Trainer(resumed)
    assert check_of(resumed, "resume").text == str(error.value)


def test_batches_come_in_order_and_what_filling_one_raises_comes_in_its_place():
    def batch(step):
        if step == 5:
            raise InputError("no batch 5")
        return step

    data = types.SimpleNamespace(batch=batch)
    run = types.SimpleNamespace(config=Config(train=TrainConfig(steps=9)), data=data)
    batches = Trainer.batches(run, 2)
    assert [next(batches) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(InputError, match="no batch 5"):
        next(batches)
    assert list(Trainer.batches(run, 6)) == [6, 7, 8]


def test_a_run_goes_on_whose_config_holds_keys_that_are_gone(data, finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("model:", "model:\n  generative_attention: causal", 1))
    assert Trainer(config(data, copy, "--train.steps=8", f"--data.validation={data}")).step == 8


def test_metrics_hold_what_users_read(finished):
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() >= {
        "step", "loss", "loss/embedding", "loss/generative", "loss/ratio", "grad_norm", "learning_rate", "tokens",
        "tokens_per_second", "data_wait_seconds", "validation/loss/embedding", "validation/loss/generative",
    }  # fmt: skip
    assert np.isclose(last["loss"], last["loss/embedding"] + last["loss/generative"], rtol=1e-5)


def test_validation_losses_do_not_depend_on_the_batch(data, tmp_path):
    def evaluated(batch):
        options = [f"--data.validation={data}", f"--data.generative_batch={batch}"]
        return Trainer(config(data, tmp_path / "unused", *options)).evaluate()["validation/loss/generative"]

    assert abs(evaluated(5) - evaluated(12)) < 1e-5


def test_records_that_are_held_out_of_the_training_data_are_evaluated(data, tmp_path):
    trainer = Trainer(config(data, tmp_path / "unused", "--data.held_out=0.3"))
    assert set(trainer.evaluate()) == {"validation/loss/embedding", "validation/loss/generative"}
    assert all(np.isfinite(value) and value > 0 for value in trainer.evaluate().values())


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_each_stream_trains_alone(data, tmp_path, mode):
    trainer = Trainer(
        config(
            data / f"{mode}.jsonl",
            tmp_path / mode,
            f"--train.mode={mode}",
            "--train.steps=2",
            "--data.embedding_batch=8",
        )
    )
    assert trainer.fit()


def test_a_run_starts_from_a_checkpoint_and_from_an_export(data, finished, tmp_path):
    assert grit_jax("export-hf", finished, tmp_path / "hf").returncode == 0
    started = [
        Trainer(config(data, tmp_path / "unused", f"--model.init={path}")) for path in (finished, tmp_path / "hf")
    ]
    equal = jax.tree.map(np.array_equal, started[0].state.params, started[1].state.params)
    assert jax.tree.all(equal)
    with pytest.raises(InputError, match=r"is not the tokenizer of model.init"):
        other = tmp_path / "tokenizer"
        other.mkdir()
        from grit_jax.text.tokenizer import train_bpe

        for name, text in train_bpe(["a b"], 260).files().items():
            (other / name).write_text(text)
        Trainer(config(data, tmp_path / "unused", f"--model.init={finished}", f"--model.tokenizer={other}"))


HEAD = ["--model.embedding.projection_dim=8", "--model.embedding.pooling=last_token"]


@pytest.fixture(scope="module")
def inits(data, finished, tmp_path_factory):
    """Models to start from, by kind: without a projection head, and with one of width 8."""
    folder = tmp_path_factory.mktemp("inits")
    assert Trainer(config(data, folder / "run", "--train.steps=1", *HEAD)).fit()
    places = {"run": finished, "run with a head": folder / "run"}
    for name in list(places):
        assert main(["export-hf", str(places[name]), str(folder / f"hf {name}"), "--no-verify"]) == 0
        places[f"checkpoint of a {name}"] = sorted((places[name] / "checkpoints").iterdir())[-1]
        places[f"folder of a {name}"] = folder / f"hf {name}"
    return places


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


@pytest.mark.parametrize("kind", ["run", "checkpoint of a run", "folder of a run"])
def test_a_new_projection_head_is_initialised_and_the_rest_is_loaded(data, tmp_path, inits, kind):
    settings = config(data, tmp_path / "run", f"--model.init={inits[kind]}", "--model.embedding.projection_dim=4")
    params = dict(Trainer(settings).state.params)
    pretrained, loaded = load_for_conversion(inits[kind])
    initial = jax.jit(init_params, static_argnums=(0, 2))(pretrained.architecture, jax.random.key(0), 4)
    assert same(params.pop("projection"), initial["projection"])
    assert same(params, loaded)


def test_a_model_with_a_new_projection_head_is_announced_trained_and_exported(data, tmp_path, inits, capsys):
    init, run = inits["folder of a run"], tmp_path / "run"
    settings = config(data, run, f"--model.init={init}", "--model.embedding.projection_dim=4", "--train.steps=1")
    said = check_of(settings, "model.embedding").text
    assert said == (
        "model.embedding.projection_dim=4 adds a projection head, initialised from train.seed "
        f"(model.init={init} has none)"
    )
    assert Trainer(settings).fit()
    assert said in capsys.readouterr().out
    assert main(["export-hf", str(run), str(tmp_path / "hf"), "--no-verify"]) == 0
    ours, exported = (GritModel.load(path).encode(["red"]) for path in (run, tmp_path / "hf"))
    assert ours.shape == (1, 4)
    np.testing.assert_allclose(ours, exported, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["run with a head", "checkpoint of a run with a head", "folder of a run with a head"])
def test_a_projection_head_is_kept_or_left_out_aloud_and_no_other_width_is_taken(data, tmp_path, inits, kind):
    init = inits[kind]

    def settings(*more):
        return config(data, tmp_path / "run", f"--model.init={init}", *more)

    other = settings("--model.embedding.projection_dim=4")
    with pytest.raises(
        InputError, match=r"projection_dim=4 is not the width of the projection head of .*, 8;"
    ) as error:
        Trainer(other)
    assert check_of(other, "model.embedding") == verdict("model.embedding", False, str(error.value))
    assert not (tmp_path / "run").exists()
    assert check_of(settings(*HEAD), "model.embedding") == verdict("model.embedding", True, "as in model.init")
    assert check_of(settings(), "model.embedding").text == (
        f"model.embedding.pooling=mean (model.init={init} has last_token); model.embedding.projection_dim=null "
        f"leaves out the projection head of model.init={init}, of width 8"
    )
    loaded = dict(load_for_conversion(init)[1])
    del loaded["projection"]
    assert same(Trainer(settings()).state.params, loaded)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.embedding_batch=6"], r"data.embedding_batch=6 is not divisible by the mesh's 8 batch shards"),
        (
            ["--mesh.fsdp=4", "--mesh.tensor=4"],
            r"mesh.data=1, mesh.fsdp=4, mesh.tensor=4, mesh.expert=1 do not multiply to the 8",
        ),
        (
            ["--mesh.fsdp=2", "--mesh.tensor=4", "--model.architecture.vocab_size=260"],
            r"kv_heads=2 is not divisible by mesh.tensor=4",
        ),
        (["--data.passage_max_length=4096"], r"data.passage_max_length=4096 is over the model's 1024 tokens"),
        (["--data.train=nowhere"], r"nowhere: no such file or folder"),
        (["--model.init=nowhere"], r"nowhere: nothing there; name a run folder"),
        (["--model.tokenizer=nowhere"], r"tokenizer nowhere: no nowhere there"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        Trainer(config(data, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_updates_that_are_not_finite_are_skipped_and_stop_the_run_when_there_are_many(data, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config(data, run, "--train.steps=5", "--train.max_skipped=2"))
    trainer.state = trainer.state._replace(trainable=jax.tree.map(lambda x: x * np.nan, trainer.state.trainable))
    with pytest.raises(FloatingPointError, match=r"2 updates in a row were skipped, up to step 2, .*bad_batches.jsonl"):
        trainer.fit()
    bad = read_lines(run / "bad_batches.jsonl")
    assert [(line["step"], line["reason"]) for line in bad] == [(1, "not finite"), (2, "not finite")]
    # The records are those of the batch: eight queries and four conversations, with their lines in the files.
    embedding, generative = bad[0]["samples"]
    assert embedding["file"] == str(data / "embedding.jsonl")
    assert (len(embedding["records"]), len(generative["records"])) == (8, 4)
    assert embedding["lines"] == [record + 1 for record in embedding["records"]]
    expected = trainer.data.samples(0)[0].records
    assert embedding["records"] == expected != trainer.data.samples(1)[0].records
    assert [line["skipped"] for line in read_lines(run / "metrics.jsonl")] == [1, 1]
    assert read_writer(run) is None, "the folder is free again"


HANGS = """
import sys, time
from grit_jax.config import load_config
from grit_jax.train.loop import Trainer

def data_that_stops(batches):
    yield next(batches)
    yield next(batches)
    time.sleep(600)

trainer = Trainer(load_config(sys.argv[1], sys.argv[2:]))
batches = trainer.batches
trainer.batches = lambda start: data_that_stops(batches(start))
trainer.fit()
"""


@pytest.mark.long
def test_a_run_that_hangs_says_where_and_ends_and_its_folder_can_be_gone_on_with(data, tmp_path):
    run = tmp_path / "run"
    options = [*TINY, f"--data.train={data}", f"--train.output={run}", "--train.steps=4", "--train.watchdog_seconds=10"]
    command = [sys.executable, "-c", HANGS, str(ROOT / "configs/tiny.yaml"), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 70, done.stderr
    assert "the data of step 3 has taken more than train.watchdog_seconds=10" in done.stderr
    assert "in data_that_stops" in (run / "stacks-0.txt").read_text()
    refuse_living(run)


def test_a_run_folder_that_is_being_written_is_refused(data, tmp_path):
    with writer_lock(tmp_path / "run"), pytest.raises(InputError, match="is being written by process"):
        Trainer(config(data, tmp_path / "run", "--train.steps=3"))


def test_goodput_and_metrics_go_on_through_a_restart(data, finished):
    lines = read_lines(finished / "goodput.jsonl")
    assert lines[-1]["step"] == 8
    assert lines[-1]["seconds"].keys() >= {"useful", "startup", "compile", "checkpoint", "evaluation"}
    spent = sum(lines[-1]["seconds"].values())
    assert abs(spent - (lines[-1]["time"] - lines[0]["session"])) < 1
    metrics = read_lines(finished / "metrics.jsonl")
    assert 0 < metrics[-1]["goodput"] < 1
    assert metrics[-1]["loss/embedding/embedding"] == metrics[-1]["loss/embedding"]
    # One file holds all conversations, and the loss is the mean over its tokens.
    assert metrics[0]["loss/generative/generative"] == pytest.approx(metrics[0]["loss/generative"], rel=1e-5)
    assert metrics[0].keys() >= {"embedding/uniformity", "embedding/mean_cosine", "embedding/effective_rank"}


class Probe(Callback):
    """Adds a number of the state that every second step leaves."""

    def due(self, run, step):
        return step % 2 == 0

    def step_ended(self, run, step, values):
        if self.due(run, step):
            with run.aside("evaluation"):
                values["probe/step"] = float(run.trainer.state.step)
            run.say(f"probed step {step}")


def test_a_callback_of_the_callers_adds_to_what_is_logged_and_ranks_checkpoints(data, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--checkpoint.keep=1", "--checkpoint.keep_best=1", "--checkpoint.best_metric=probe/step"]
    assert Trainer(config(data, run, "--train.steps=6", *options), callbacks=[Probe()]).fit()
    assert [line.get("probe/step") for line in read_lines(run / "metrics.jsonl")] == [None, 2, None, 4, None, 6]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "6"}, "the smallest, and the newest"
    assert "probed step 4" in capsys.readouterr().out
    assert read_lines(run / "goodput.jsonl")[-1]["seconds"]["evaluation"] > 0


def test_any_callbacks_may_be_left_out(data, tmp_path):
    def ran(name, kept):
        trainer = Trainer(config(data, tmp_path / name, "--train.steps=2", "--logging.gradient_ratio_every=1"))
        trainer.callbacks[:] = trainer.callbacks[kept]
        assert trainer.fit()
        return {path.name for path in (tmp_path / name).iterdir()}

    logs = {"config.yaml", "goodput.jsonl", "metrics.jsonl", "checkpoints"}
    assert ran("one half", slice(0, None, 2)) | ran("the other half", slice(1, None, 2)) == logs
    assert ran("none", slice(0)) == {"config.yaml"}


def test_a_trainer_gives_the_model_that_its_run_folder_holds(data, tmp_path):
    trainer = Trainer(config(data, tmp_path / "run", "--train.steps=3"))
    untrained = trainer.model().encode(["red"])
    assert trainer.fit()
    trained = trainer.model().encode(["red"])
    np.testing.assert_allclose(trained, GritModel.load(tmp_path / "run").encode(["red"]), rtol=0, atol=1e-6)
    assert np.abs(trained - untrained).max() > 1e-4
