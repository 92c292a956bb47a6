"""The command line from outside: exit codes, messages and what is written."""

import glob
import importlib.metadata
import importlib.util
import json
import subprocess

import numpy as np
import pytest

from grit_jax import __version__
from grit_jax.cli.encode import read_texts
from grit_jax.cli.main import COMMANDS, main
from grit_jax.errors import InputError
from grit_jax.parallel.chips import DEVICE_FILES
from tests.commands import ROOT, command, environment, grit_jax, train_arguments, write_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run folder."""
    folder = tmp_path_factory.mktemp("cli")
    result = grit_jax(*train_arguments(write_data(folder / "data"), folder / "run", "--train.steps=2"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"grit-jax {name}" in capsys.readouterr().out.split("examples:")[1]


def test_a_run_folder_holds_config_metrics_and_checkpoints(run):
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "goodput.jsonl", "checkpoints"}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_encode_writes_one_unit_vector_per_text_in_order(run, tmp_path):
    texts = ["one", "a second text", "three " * 300]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "in.txt").write_text("".join(text.strip() + "\n" for text in texts))
    for name in ("in.jsonl", "in.txt"):
        out = tmp_path / f"{name}.npy"
        result = grit_jax("encode", run, "--input", tmp_path / name, "--output", out, "--max-length", 128)
        assert result.returncode == 0, result.stderr
        assert "3 texts" in result.stdout
        assert "1 truncated" in result.stdout
        vectors = np.load(out)
        assert (vectors.dtype, vectors.shape) == (np.float32, (3, 32))
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.long
def test_a_run_mines_negatives_for_its_own_data(run, tmp_path):
    source = run.parent / "data/embedding.jsonl"
    for name in ("a", "b"):
        arguments = ("--model", run, "--count", 2, "--ceiling", 0, "--query-max-length", 64)
        result = grit_jax("data", "mine-negatives", source, tmp_path / f"{name}.jsonl", *arguments)
        assert result.returncode == 0, result.stderr
        assert "12 records over 24 passages; 0 got fewer than 2 negatives" in result.stdout
        assert result.stderr == ""
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(len(row["neg"]) == 2 and row["pos"][0] not in row["neg"] for row in rows)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_generate_prints_the_same_answer_for_the_same_seed(run):
    arguments = ("generate", run, "--prompt", "say red", "--max-new-tokens", 8, "--temperature", 1, "--seed", 4)
    first, second = grit_jax(*arguments), grit_jax(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.long
def test_a_model_survives_export_and_import(run, tmp_path):
    assert grit_jax("export-hf", run, tmp_path / "hf", "--step", 2).returncode == 0
    assert grit_jax("import-hf", tmp_path / "hf", tmp_path / "checkpoint").returncode == 0
    (tmp_path / "in.txt").write_text("one\n")
    for number, model in enumerate((run, tmp_path / "hf", tmp_path / "checkpoint")):
        result = grit_jax("encode", model, "--input", tmp_path / "in.txt", "--output", tmp_path / f"{number}.npy")
        assert result.returncode == 0, result.stderr
    vectors = [np.load(tmp_path / f"{number}.npy") for number in range(3)]
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: config file nowhere.yaml: no such file"),
        (["train", str(ROOT / "configs/tiny.yaml")], "error: data.train is missing"),
        (["train", str(ROOT / "configs/tiny.yaml"), "--train.step=3"], "did you mean 'train.steps'?"),
        (["encode", "nowhere", "--input", "x.csv", "--output", "x.npy"], "x.csv: must end in .jsonl or .txt"),
        (["encode", "nowhere", "--input", "x.txt", "--output", "x"], "--output x: must end in .npy"),
        (["generate", "nowhere", "--prompt", "x"], "error: nowhere: nothing there"),
        (["generate", "nowhere", "--prompt", "x", "--top-p", "1.5"], "--top-p=1.5 must be from 0 to 1"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "nan"], "--temperature=nan must be a finite number"),
        (["export-hf", "nowhere", "out"], "error: nowhere: nothing there"),
        (["evaluate", "nowhere", "--suite", "x.yaml"], "error: suite x.yaml: no such file"),
        (["evaluate", "nowhere", "--suite", "x.yaml", "--output", "x.txt"], "--output x.txt: must end in .json"),
        (["quickstart", "--train.stps=3"], "did you mean 'train.steps'?"),
        (["data", "validate", "nowhere"], "error: nowhere: no such file or folder"),
        (["data", "stats", ".", "--plot", "x.pdf"], "--plot x.pdf: must end in .png"),
        (["data", "convert", "nowhere.json", "x.jsonl", "--from", "alpaca"], "nowhere.json: cannot be read"),
        (["data", "convert", "x.json", "x.csv", "--from", "alpaca"], "x.csv: must end in .jsonl"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("platforms", "raised", "said"),
    [
        ("cuda", AssertionError(), "JAX_PLATFORMS=cuda: JAX cannot use that here (AssertionError)"),
        (
            "nonsense",
            RuntimeError("Unable to initialize backend 'nonsense': not in the list of known backends: ['cpu', 'tpu']."),
            "JAX_PLATFORMS=nonsense: JAX cannot use that here (Unable to initialize backend 'nonsense'",
        ),
        (
            None,
            RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use"),
            "already in use",
        ),
    ],
)
def test_a_platform_that_jax_cannot_use_is_one_clear_line(platforms, raised, said, capsys, monkeypatch):
    def run(_):
        raise raised

    monkeypatch.setattr(COMMANDS["doctor"], "run", run)
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert main(["doctor"]) == (2 if platforms else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert "grit-jax doctor" in line


def test_a_platform_that_is_not_there_is_no_damage_and_its_library_says_nothing(run, tmp_path):
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, DEVICE_FILES["TPU"])):
        pytest.skip("needs libtpu, and no TPU")
    (tmp_path / "in.txt").write_text("one\n")
    variables = {key: value for key, value in environment().items() if not key.startswith("TPU_")}
    arguments = command("encode", run, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.npy")
    result = subprocess.run(
        arguments, capture_output=True, text=True, env=variables | {"JAX_PLATFORMS": "tpu"}, timeout=300
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=tpu: JAX cannot use that here (Unable to initialize backend 'tpu'")


@pytest.mark.parametrize("raised", [RuntimeError("a fault"), AssertionError("a law"), AssertionError()])
def test_another_error_keeps_its_traceback(raised, monkeypatch):
    def run(_):
        raise raised

    monkeypatch.setattr(COMMANDS["doctor"], "run", run)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(type(raised)):
        main(["doctor"])


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"grit-jax {importlib.metadata.version('grit-jax')}\n"
    assert __version__ == importlib.metadata.version("grit-jax")


def test_unknown_arguments_exit_with_2(capsys):
    assert main(["generate", "x", "--prompt", "y", "--beams=3"]) == 2
    assert "generate does not know --beams=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x.jsonl:2: not valid JSON"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r'x.jsonl:2: no string under "text"'),
        ("x.jsonl", '{"text": ""}\n', r"x.jsonl:1: empty text"),
        ("x.jsonl", '\n{"text": "a\\ud83d"}\n', r"x.jsonl:2: \\ud83d is half of a surrogate pair"),
        ("x.jsonl", '{"text": "a", "text": "b"}\n', r'x.jsonl:1: key "text" appears twice'),
        ("x.txt", b"a\nb\xff\n", r"x.txt:2: byte 2 is not UTF-8"),
        ("x.txt", "\n \n", r"x.txt: the file is empty"),
    ],
)
def test_malformed_input_lines_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_texts(tmp_path / name)


@pytest.mark.long
def test_an_epoch_of_the_tiny_set_and_fifty_steps_of_the_real_one(shared, tmp_path):
    config = ROOT / "configs/tiny.yaml"
    for name, data, steps in (("tiny", "data/tiny", 18), ("train", "data/train", 50)):
        arguments = [f"--data.train={shared / data}/{stream}" for stream in ("",)]
        if name == "train":
            folders = [str(shared / data / stream) for stream in ("embedding", "generative")]
            arguments = [f"--data.train={json.dumps(folders)}"]
        result = grit_jax(
            "train", config, *arguments, f"--train.steps={steps}", f"--train.output={tmp_path / name}", optimized=True,
            timeout=1800,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == steps
        # The contrastive loss of so few steps follows the file that a batch comes from, so only its range is a law.
        assert all(0 < line["loss/embedding"] < 2 * np.log(32) for line in lines)
        early, late = (np.mean([line["loss/generative"] for line in part]) for part in (lines[:5], lines[-5:]))
        assert late < early
