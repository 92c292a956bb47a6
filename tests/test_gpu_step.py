"""The benchmark for a GPU, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_step
import pytest

ROOT = Path(__file__).parents[1]


def run(tmp_path, *options):
    """The lines that the benchmark prints on a machine without grain and jsonargparse, and its exit code."""
    for package in ("grain", "jsonargparse"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not on a bare machine')")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu", "OUT": str(tmp_path), "XLA_FLAGS": "",
    }  # fmt: skip
    command = [sys.executable, ROOT / "benchmarks/gpu_step.py", *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


@pytest.mark.long
def test_every_section_runs_in_small_on_a_bare_machine_without_a_gpu(tmp_path):
    lines, code = run(tmp_path, "--toy")
    assert [line for line in lines if line.get("error")] == []
    assert [line["section"] for line in lines if line.get("done")] == list(gpu_step.SECTIONS)
    assert code == 0
    assert {line["kernel"] for line in lines if line["section"] == "numerics" and "kernel" in line} == {
        "dense", "blockwise",
    }  # fmt: skip
    steps = {line["texts"]: line for line in lines if line["section"] == "step" and "loss" in line}
    assert steps.keys() == {"tenth", "limits"}
    assert all(line["skipped"] == 0 for line in steps.values())
    assert any("profile" in file.name for file in tmp_path.glob("*.xplane.pb"))


def test_numerics_beyond_the_bound_fail(monkeypatch, capsys):
    monkeypatch.setattr(gpu_step, "_BOUND", 1e-9)
    with pytest.raises(ArithmeticError, match="errors of 1e-09 and more: dense, causal=False; blockwise"):
        gpu_step.numerics(gpu_step.TOY)
    assert not any(json.loads(line)["passed"] for line in capsys.readouterr().out.splitlines())
