"""What an exported model card says of the run it comes from."""

import json

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.cli.export_hf import read_origin
from grit_jax.config import EmbeddingConfig, dump_config, parse_config
from grit_jax.hf.interop import Origin, model_card
from grit_jax.text.tokenizer import Tokenizer
from tests import models


def run_folder(folder, **model):
    """A run with checkpoints of steps 10 and 20, that was measured at steps 10, 20 and 30."""
    config = parse_config(json.dumps({"model": model, "data": {"train": ["/secret/place/nli.jsonl", "gs://b/chats/"]}}))
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [{"step": step, "time": 0.0, "loss": 1.0, "validation/loss/generative": step / 8} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in ("10", "20"):
        (folder / "checkpoints" / step / "params").mkdir(parents=True)
    return folder


def test_the_origin_of_a_run_is_told_without_paths_and_with_the_figures_of_its_step(tmp_path):
    base = tmp_path / "mistral-7b"
    base.mkdir()
    (base / "fetch.json").write_text(json.dumps({"repository": "mistralai/Mistral-7B-v0.1", "licence": "apache-2.0"}))
    run = run_folder(tmp_path / "run", init=str(base))
    figures = {"validation/loss/generative": 2.5}
    whole = Origin("mistralai/Mistral-7B-v0.1", "apache-2.0", ("nli.jsonl", "chats"), 20, figures)
    assert read_origin(str(run), None) == whole
    assert read_origin(str(run), 10).figures == {"validation/loss/generative": 1.25}
    (base / "fetch.json").write_text("[")
    assert (read_origin(str(run), None).base_model, read_origin(str(run), None).licence) == ("mistral-7b", None)
    assert read_origin(str(base), None) == Origin()


def test_a_model_card_says_what_is_known_and_nothing_else():
    def card(origin):
        return model_card("mine", models.shape(), EmbeddingConfig(), Tokenizer.load("bytes"), {}, origin)

    assert "How it was made" not in card(Origin())
    assert "license:" not in card(Origin())
    text = card(
        Origin("org/base", "apache-2.0", ("a.jsonl", "b.jsonl"), 1200, {"validation/loss/generative": 1.2345678})
    )
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert {'license: "apache-2.0"', "base_model: org/base"} <= set(head.splitlines())
    told = [
        "Trained from: org/base",
        "Steps: 1,200",
        "Data: `a.jsonl`, `b.jsonl`",
        "| `validation/loss/generative` | 1.235 |",
    ]
    assert all(line in body for line in told)
    assert "base_model:" not in card(Origin("/some folder"))
    assert "- Merged from: a 20 (weight 0.5)" in card(Origin(merged="a 20 (weight 0.5), b (weight 0.5); linear"))


def test_the_origin_of_a_merged_model_is_told_without_paths(tmp_path):
    models_of = ["/secret/a/checkpoints/20", "gs://b/secret/base/0", "/secret/hf", "org/name@v1"]
    merged = {"models": models_of, "weights": [0.1, 0.2, 0.3, 0.4], "method": "linear"}
    about = CheckpointMetadata(models.shape(), EmbeddingConfig(), Tokenizer.load("bytes").files(), merged=merged)
    save_params(tmp_path / "merged", models.weights(models.shape()), about)
    parts = "a 20 (weight 0.1), base 0 (weight 0.2), hf (weight 0.3), org/name@v1 (weight 0.4); linear"
    assert read_origin(str(tmp_path / "merged"), None) == Origin(merged=parts)
