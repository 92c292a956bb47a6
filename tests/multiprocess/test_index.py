"""Indexing in a job of two processes."""

import jax

from grit_jax import GritModel
from tests.multiprocess import launch
from tests.store.stores import content, index, save_model, write_corpus


def test_two_processes_make_the_store_that_one_makes(tmp_path):
    model, corpus = save_model(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    alone = GritModel.load(model, devices=jax.devices()[:2])
    index(tmp_path / "one", alone, corpus, name=str(model))
    outputs = launch.run_commands("index", model, corpus, tmp_path / "two", "--shard-rows", 4)
    assert "embedded now: 21 documents" in outputs[0][0] and "embedded" not in outputs[1][0]
    assert content(tmp_path / "two") == content(tmp_path / "one")
