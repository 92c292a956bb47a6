"""What `train --dry-run` finds before anything is compiled."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from grit_jax.cli.main import main
from grit_jax.config import load_config
from grit_jax.datatools.record_writer import write_records
from grit_jax.runs.lock import writer_lock
from grit_jax.train import dry_run as module
from grit_jax.train import loop
from grit_jax.train.dry_run import dry_run
from tests.commands import ROOT, TINY, train_arguments, write_data

CHECKED = [
    "data.train",
    "tokenizer",
    "mesh",
    "shapes",
    "memory",
    "space",
    "resume",
    "logging",
    "train.output",
    "writer",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def checks(data, output, *more):
    options = [*TINY, f"--data.train={data}", f"--train.output={output}", *more]
    return {check.target: check for check in dry_run(load_config(ROOT / "configs/tiny.yaml", options))}


def failures(found):
    return {target: check.text for target, check in found.items() if not check.passed}


def test_a_good_start_passes_everything_and_leaves_nothing(data, tmp_path, capsys):
    found = checks(data, tmp_path / "run")
    assert (list(found), failures(found)) == (CHECKED, {})
    assert not (tmp_path / "run").exists()
    assert main([*map(str, train_arguments(data, tmp_path / "run")), "--dry-run"]) == 0
    assert "ok   mesh: 8 x cpu as mesh.fsdp=8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "target", "message"),
    [
        (["--data.train=nowhere"], "data.train", "nowhere: no such file or folder"),
        (["--data.embedding_batch=6"], "shapes", "data.embedding_batch=6 is not divisible by the mesh's 8 batch"),
        (["--mesh.fsdp=3"], "mesh", "do not multiply to the 8 devices found"),
        (["--model.tokenizer=nowhere"], "tokenizer", "no nowhere there"),
        (["--model.init=nowhere"], "model.init", "nowhere: nothing there"),
        (["--model.attention_kernel=splash"], "shapes", "model.attention_kernel=splash needs tpu devices"),
        (["--data.passage_max_length=4096"], "shapes", "data.passage_max_length=4096 is over the model's 1024 tokens"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_is_checked_all_the_same(data, tmp_path, more, target, message):
    found = checks(data, tmp_path / "run", *more)
    assert list(failures(found)) == [target]
    assert message in failures(found)[target]
    assert found["train.output"].passed


@pytest.mark.parametrize(
    ("setting", "package"), [("tensorboard=true", "tensorboardX"), ("wandb=mine", "wandb"), ("trackio=mine", "trackio")]
)
def test_a_tracker_that_is_not_installed_ends_a_dry_run_and_a_run_before_either_reads_a_model(
    data, tmp_path, monkeypatch, capsys, setting, package
):
    monkeypatch.setitem(sys.modules, package, None)
    key = setting.partition("=")[0]
    found = checks(data, tmp_path / "run", f"--logging.{setting}")
    assert list(failures(found)) == ["logging"]
    assert f"needs {package}, which cannot be imported; pip install" in found["logging"].text
    monkeypatch.setattr(loop, "resolve_tokenizer", lambda *_: pytest.fail("something was read first"))
    assert main([*map(str, train_arguments(data, tmp_path / "run")), f"--logging.{setting}"]) == 2
    assert f"error: logging.{key}=" in capsys.readouterr().err


def test_any_failure_is_exit_code_2(data, tmp_path, capsys):
    arguments = [*map(str, train_arguments(data, tmp_path / "run")), "--dry-run", "--mesh.fsdp=3"]
    assert main(arguments) == 2
    assert "FAIL mesh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting",
    ["optimizer.b2=1", "optimizer.warmup_ratio=3", "train.seed=4294967296", "loss.temperature=.nan",
     "model.generative_attention=bidirectional"],
)  # fmt: skip
def test_a_setting_that_is_refused_is_refused_in_a_dry_run_with_the_same_words(data, tmp_path, capsys, setting):
    arguments = [*map(str, train_arguments(data, tmp_path / "run")), f"--{setting}"]
    assert [main(arguments), main([*arguments, "--dry-run"])] == [2, 2]
    run, dry = capsys.readouterr().err.splitlines()
    assert run == dry
    assert run.startswith("error: ")
    assert setting.partition("=")[0] in run
    assert not (tmp_path / "run").exists()


def test_a_malformed_record_and_a_missing_stream_are_found(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    lines = (copy / "generative.jsonl").read_text().splitlines()
    (copy / "generative.jsonl").write_text("\n".join([*lines[:5], '{"text": 3}', *lines[6:]]) + "\n")
    assert "generative.jsonl:6:" in failures(checks(copy, tmp_path / "run"))["data.train"]
    (copy / "generative.jsonl").unlink()
    missing = failures(checks(copy, tmp_path / "run"))["data.train"]
    assert "no generative file, and train.mode=unified trains that stream" in missing


def test_files_are_opened_as_training_opens_them(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    lines = (copy / "generative.jsonl").read_text().splitlines()
    (copy / "generative.jsonl").unlink()
    rows = ((f"generative.jsonl:{number}", json.loads(line)) for number, line in enumerate(lines, start=1))
    write_records(copy / "generative.array_record", rows)
    assert failures(checks(copy, tmp_path / "run")) == {}
    with (copy / "embedding.jsonl").open("a") as file:
        file.write('{"query": 3}\n')
    assert "embedding.jsonl:13:" in failures(checks(copy, tmp_path / "run"))["data.train"]
    assert failures(checks(copy, tmp_path / "run", "--data.skip_bad=true")) == {}


def test_state_that_no_device_holds_and_checkpoints_that_no_disk_holds_are_found(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "device_memory", lambda *_: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    found = failures(checks(data, tmp_path / "run"))
    assert found.keys() == {"memory", "space"}
    assert "use more devices, a larger mesh.fsdp, or a smaller model" in found["memory"]
    assert found["space"].startswith("3 checkpoints of")


def test_memory_is_that_of_the_shards(data, tmp_path):
    whole, split = (checks(data, tmp_path / "run", *mesh)["memory"].text for mesh in (["--mesh.data=8"], []))
    bytes_of = [float(text.split(" MiB of state")[0]) for text in (whole, split)]
    assert bytes_of[0] > 4 * bytes_of[1]


def test_a_living_writer_and_another_runs_folder_are_found(data, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/2").mkdir(parents=True)
    (run / "config.yaml").write_text("train:\n  seed: 7\n")
    with writer_lock(run):
        found = failures(checks(data, run))
    assert found.keys() == {"resume", "writer"}
    assert "train.seed: 7 -> 0" in found["resume"]
    assert "train.output is being written by process" in found["writer"]
    assert failures(checks(data, run)).keys() == {"resume"}


def test_a_folder_that_cannot_be_written_is_found(data, tmp_path):
    (tmp_path / "file").write_text("")
    found = failures(checks(data, tmp_path / "file" / "run"))
    assert "cannot be written (NotADirectoryError" in found["train.output"]


def test_device_memory_is_what_jax_says_or_the_chips_own():
    def device(kind, platform, stats):
        return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)

    assert module.device_memory(device("TPU v5 lite", "tpu", {"bytes_limit": 7}), 1) == 7
    assert module.device_memory(device("TPU v5 lite", "tpu", None), 1) == int(15.75 * 2**30)
    assert module.device_memory(device("unheard of", "gpu", None), 1) is None
    cpu = device("cpu", "cpu", None)
    assert module.device_memory(cpu, 4) == pytest.approx(module.device_memory(cpu, 1) / 4, rel=1e-6)
