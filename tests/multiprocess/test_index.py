"""Indexing in a job of two processes."""

import jax
import pytest

from grit_jax import GritModel
from tests.multiprocess import launch
from tests.retrieval.stores import content, index, save_model, write_corpus


def test_two_processes_make_the_store_that_one_makes(tmp_path):
    model, corpus = save_model(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    alone = GritModel.load(model, devices=jax.devices()[:2])
    index(tmp_path / "one", alone, corpus, name=str(model))
    outputs = launch.run_commands("index", model, corpus, tmp_path / "two", "--shard-rows", 4)
    assert "embedded now: 21 documents" in outputs[0][0] and "embedded" not in outputs[1][0]
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.long
def test_processes_with_different_models_make_no_store(tmp_path):
    models = [save_model(tmp_path / str(theta), rope_theta=theta) for theta in (1e4, 1e5)]
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    outputs = launch.run_commands("index", own=lambda index: [models[index], corpus, tmp_path / "store"], code=2)
    assert all("the model is " in error for _, error in outputs), outputs
