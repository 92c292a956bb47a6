"""Indexing in a job of two processes."""

import subprocess

import jax

from grit_jax import GritModel
from tests.multiprocess import launch
from tests.runs import command, environment
from tests.store.stores import content, index, save_model, write_corpus


def test_two_processes_make_the_store_that_one_makes(tmp_path):
    model, corpus = save_model(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    alone = GritModel.load(model, devices=jax.devices()[:2])
    index(tmp_path / "one", alone, corpus, name=str(model))
    arguments = ["index", model, corpus, tmp_path / "two", "--shard-rows", 4]
    address = launch.free_address()
    processes = [
        subprocess.Popen(
            command(
                *arguments, f"--distributed.coordinator={address}", "--distributed.num_processes=2",
                f"--distributed.process_id={number}",
            ),
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "embedded now: 21 documents" in outputs[0][0] and "embedded" not in outputs[1][0]
    assert content(tmp_path / "two") == content(tmp_path / "one")
