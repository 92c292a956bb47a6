"""Indexing in a job of two processes."""

import subprocess

import jax

from grit_jax import GritModel
from tests.multiprocess import launch
from tests.runs import command, environment
from tests.store.stores import content, index, save_model, write_corpus


def two_processes(*arguments):
    """Exit code, output and errors of a command in each of two processes."""
    distributed = [f"--distributed.coordinator={launch.free_address()}", "--distributed.num_processes=2"]
    processes = [
        subprocess.Popen(
            command(*arguments, *distributed, f"--distributed.process_id={number}"),
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_two_processes_make_the_store_that_one_makes_and_fail_together(tmp_path):
    model, corpus = save_model(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    alone = GritModel.load(model, devices=jax.devices()[:2])
    index(tmp_path / "one", alone, corpus, name=str(model))
    (code, out, err), (other_code, other_out, other_err) = two_processes(
        "index", model, corpus, tmp_path / "two", "--shard-rows", 4
    )
    assert (code, other_code) == (0, 0), (err, other_err)
    assert "embedded now: 21 documents" in out and not other_out
    assert content(tmp_path / "two") == content(tmp_path / "one")
    refused = two_processes("index", model, corpus, tmp_path / "two", "--dtype", "int8")
    assert [code for code, *_ in refused] == [2, 2]
    assert all("made with --dtype 'float32', not 'int8'" in err for *_, err in refused)
