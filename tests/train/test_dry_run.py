"""What `train --dry-run` finds before anything is trained."""

import json
import shutil
import sys
from types import SimpleNamespace

import jax
import pytest

from grit_jax.cli.main import main
from grit_jax.config import load_config
from grit_jax.datatools.record_writer import write_records
from grit_jax.runs.lock import writer_lock
from grit_jax.train import dry_run as module
from grit_jax.train import loop
from grit_jax.train.dry_run import dry_run
from grit_jax.train.setup import lower_step
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
    "step",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Lowered:
    """Stands in for a step: compiles at once to one of 3 MiB of arguments and 5 MiB of temporaries, or fails."""

    def __init__(self, failure=None):
        self.failure = failure

    def compile(self):
        if self.failure:
            raise jax.errors.JaxRuntimeError(self.failure)
        size = {"argument_size_in_bytes": 3 << 20, "temp_size_in_bytes": 5 << 20, "host_temp_size_in_bytes": 0}
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**size))


@pytest.fixture(autouse=True)
def compiles_at_once(monkeypatch):
    monkeypatch.setattr(module, "lower_step", lambda *_: Lowered())


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


def test_a_step_is_estimated_with_every_text_at_its_limit(data, tmp_path, monkeypatch):
    text = checks(data, tmp_path / "run")["step"].text
    assert text.startswith(
        "estimate, with every text at its limit: 8.0 MiB on each device, 3.0 MiB of it state and bat"
    )
    assert "may not fit" not in text
    monkeypatch.setattr(module, "lower_step", lower_step)
    real, wide = (
        float(checks(data, tmp_path / "run", *more)["step"].text.split("limit: ")[1].split(" MiB")[0])
        for more in ([], ["--model.architecture.mlp_dim=4096", "--train.mode=generative"])
    )
    assert 0 < real < wide


@pytest.mark.parametrize("failure", [None, "RESOURCE_EXHAUSTED: Ran out of memory on HBM"])
def test_a_step_that_may_not_fit_passes_with_what_to_lower(data, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(module, "lower_step", lambda *_: Lowered(failure))
    monkeypatch.setattr(module, "device_memory", lambda *_: 7 << 20)
    step = checks(data, tmp_path / "run")["step"]
    assert step.passed
    assert "; it may not fit: activations dominate: set model.layer_rows=1 (3 rows of a device" in step.text


def test_an_option_that_the_compiler_refuses_is_found(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "lower_step", lower_step)
    found = failures(checks(data, tmp_path / "run", "--model.compiler_options={xla_cpu_enable_fast_math: maybe}"))
    assert list(found) == ["step"]
    assert "model.compiler_options: xla_cpu_enable_fast_math=maybe is no value of that option" in found["step"]


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
