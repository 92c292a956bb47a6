"""verify passes a good export and fails one that gives other numbers in PyTorch's tools."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig
from grit_jax.doctor import verify as module
from grit_jax.doctor.verify import verify
from grit_jax.errors import InputError
from grit_jax.runs.checks import TOLERANCE
from tests.hf import families
from tests.hf.test_export import INSTRUCTION, cases, export

TEXTS = ("x", "The ferry leaves at six.", "灯塔 😀\nnext line")
PROJECTION = EmbeddingConfig(projection_dim=8)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An export, and this package's numbers of it."""
    folder = export(tmp_path_factory.mktemp("good"), *families.CASES["llama 2"], PROJECTION)
    return folder, module._ours(folder, list(TEXTS), ["", INSTRUCTION, module._INSTRUCTION])


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy to damage; no damage changes this package's own numbers, so they are not computed again."""
    monkeypatch.setattr(module, "_ours", lambda *_: good[1])
    return shutil.copytree(good[0], tmp_path / "folder")


@pytest.mark.parametrize("case", cases("mixtral", long=["llama 3", "mistral", "qwen3", "gemma 2", "gemma 3"]))
def test_a_good_export_passes_every_comparison_and_nothing_else_is_said(tmp_path, case, capfd):
    folder = export(tmp_path, *families.CASES[case])
    capfd.readouterr()
    checks = list(verify(folder, TEXTS))
    assert all(check.difference <= TOLERANCE for check in checks), checks
    assert {check.target.partition(",")[0] for check in checks} == {
        "token ids", "transformers", "sentence-transformers"
    }  # fmt: skip
    assert any("prompt_name='query'" in check.target for check in checks)
    assert capfd.readouterr() == ("", "")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_dense_weight(folder):
    file = folder / "2_Dense/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["linear.weight"][2, 3] += 0.1
    safetensors.numpy.save_file(tensors, file)


DAMAGES = {
    "config.json without is_causal": (
        lambda folder: edit(folder / "config.json", lambda config: config.pop("is_causal")),
        "sentence-transformers, no prompt given",
    ),
    "a prompt that is pooled": (
        lambda folder: edit(folder / "1_Pooling/config.json", lambda config: config.update(include_prompt=True)),
        "sentence-transformers, no prompt given",
    ),
    "another weight in one of two places": (change_dense_weight, "sentence-transformers, prompt with an instruction"),
    "a tokenizer without BOS": (
        lambda folder: edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None)),
        "token ids",
    ),
    "a prompt in another format": (
        lambda folder: edit(
            folder / "config_sentence_transformers.json", lambda config: config["prompts"].update(query="query: ")
        ),
        "sentence-transformers prompts",
    ),
    "another maximal length": (
        lambda folder: edit(folder / "sentence_bert_config.json", lambda config: config.update(max_seq_length=99)),
        "sentence-transformers, max_seq_length",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_fails_the_comparison_that_sees_it(folder, damage):
    change, target = DAMAGES[damage]
    change(folder)
    failed = [check.target for check in verify(folder, TEXTS) if not check.difference <= TOLERANCE]
    assert target in failed


def test_nan_is_no_agreement(folder, monkeypatch):
    monkeypatch.setattr(module, "_pool", lambda *_: np.full(8, np.nan, np.float32))
    failed = [check.target for check in verify(folder, TEXTS) if not check.difference <= TOLERANCE]
    assert failed == [f"transformers, bidirectional hidden states pooled {with_} an instruction"
                      for with_ in ("without", "with", "with")]  # fmt: skip


def without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


def test_a_machine_without_torch_is_told_what_to_install(folder, monkeypatch):
    without_torch(monkeypatch)
    with pytest.raises(InputError, match=r"torch cannot be imported; pip install .*-e '\.\[torch\]'"):
        next(verify(folder, TEXTS))


def test_verify_export_exits_with_0_1_or_2(folder, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["verify-export", str(folder), "--texts", str(tmp_path / "texts.jsonl")]
    assert main(arguments) == 0
    assert "FAIL" not in capsys.readouterr().out
    change_dense_weight(folder)
    assert main(arguments) == 1
    assert "FAIL sentence-transformers, no prompt given: largest difference" in capsys.readouterr().out
    assert main(["verify-export", str(tmp_path)]) == 2
    assert "name a folder that export-hf wrote" in capsys.readouterr().err


def test_export_hf_verifies_where_torch_is_installed_unless_told_not_to(folder, tmp_path, capsys, monkeypatch):
    assert main(["import-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    arguments = ["export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    for difference, code in ((0.0, 0), (1.0, 1)):
        monkeypatch.setattr(module, "verify", lambda out, d=difference: [module.Check(f"numbers of {out}", d, "")])
        assert main(arguments) == code
        assert f"{'FAIL' if code else 'ok  '} numbers of {tmp_path / 'out'}" in capsys.readouterr().out
    assert main([*arguments, "--no-verify"]) == 0
    assert "not compared with PyTorch (--no-verify)" in capsys.readouterr().out
    without_torch(monkeypatch)
    assert main(arguments) == 0
    assert "not compared with PyTorch: torch cannot be imported" in capsys.readouterr().out
