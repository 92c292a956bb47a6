"""Mining negatives with a model in a job of two processes."""

import pytest

from grit_jax.data.sources import open_source
from tests.commands import grit_jax, write_data
from tests.multiprocess import launch
from tests.retrieval.stores import save_model


@pytest.mark.long
def test_two_processes_mine_what_one_does_and_the_first_one_writes(tmp_path):
    model = save_model(tmp_path / "model")
    data = write_data(tmp_path / "data") / "embedding.jsonl"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one more"}\n')  # 25 passages, which two do not divide

    def arguments(name):
        return [
            "data", "mine-negatives", data, tmp_path / name, "--model", model, "--corpus", corpus,
            "--count", "3", "--ceiling", "0",
        ]  # fmt: skip

    alone = grit_jax(*arguments("one.jsonl"), devices=2)
    assert alone.returncode == 0, alone.stderr
    outputs = launch.run_commands(*arguments("two.jsonl"))
    assert "12 records over 25 passages" in outputs[0][0] and "records over" not in outputs[1][0]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert all(len(record.negatives) == 3 for record in open_source(tmp_path / "two.jsonl"))


@pytest.mark.long
def test_processes_with_other_queries_or_another_model_are_refused(tmp_path):
    models = [save_model(tmp_path / str(theta), rope_theta=theta) for theta in (1e4, 1e5)]
    files = [write_data(tmp_path / f"data{index}") / "embedding.jsonl" for index in range(2)]
    files[1].write_text(files[1].read_text().replace("what is red", "what is read"))
    for own, name in (
        (lambda index: [files[index], tmp_path / "mined.jsonl", "--model", models[0]], "the records is "),
        (lambda index: [files[0], tmp_path / "mined.jsonl", "--model", models[index]], "the model is "),
    ):
        outputs = launch.run_commands("data", "mine-negatives", own=own, code=2)
        assert all(name in error for _, error in outputs), outputs
    assert not (tmp_path / "mined.jsonl").exists()
