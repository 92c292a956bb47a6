"""A pretrained model from PyTorch, trained here, and back to PyTorch."""

import json

import pytest
import yaml

from grit_jax.inference.model import GritModel
from tests.commands import ROOT, grit_jax

LENGTHS = [f"--data.{text}_max_length=256" for text in ("query", "passage", "generative")]


@pytest.mark.long
def test_a_pretrained_model_comes_in_is_trained_and_goes_out_verified(shared, tmp_path):
    pytest.importorskip("sentence_transformers")
    source, data = shared / "data/models/stories260K", shared / "data/tiny"
    recorded = json.loads((source / "reference_output.json").read_text())
    done = grit_jax("import-hf", source, tmp_path / "imported")
    assert done.returncode == 0, done.stderr
    imported = GritModel.load(tmp_path / "imported")
    text = imported.generate("", raw=True, max_new_tokens=len(recorded["greedy_ids_from_bos"]) - 1)
    assert text.strip() == recorded["greedy_text"].strip()
    config = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    del config["model"]  # shape and tokenizer are those of the imported model
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = grit_jax(
        "train", tmp_path / "config.yaml", f"--model.init={tmp_path / 'imported'}",
        f"--data.train={data}", f"--train.output={tmp_path / 'run'}", "--train.steps=100", *LENGTHS,
        optimized=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["loss/generative"] for line in part) for part in (metrics[:10], metrics[-10:]))
    assert len(metrics) == 100
    assert last < first
    done = grit_jax("export-hf", tmp_path / "run", tmp_path / "exported", "--no-verify")
    assert done.returncode == 0, done.stderr
    done = grit_jax("verify-export", tmp_path / "exported")
    assert done.returncode == 0, done.stdout + done.stderr
