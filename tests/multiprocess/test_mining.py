"""Mining negatives with a model in a job of two processes."""

import subprocess

from grit_jax.checkpoint import CheckpointMetadata, save_params
from grit_jax.data.sources import open_source
from tests.hf.test_folder import random_model
from tests.multiprocess import launch
from tests.runs import command, environment, grit_jax, write_data


def test_two_processes_mine_what_one_does_and_the_first_one_writes(tmp_path):
    pretrained, params = random_model(tie_embeddings=False)
    about = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(tmp_path / "model", params, about)
    data = write_data(tmp_path / "data") / "embedding.jsonl"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one more"}\n')  # 25 passages, which two do not divide

    def arguments(name):
        return [
            "data", "mine-negatives", data, tmp_path / name, "--model", tmp_path / "model", "--corpus", corpus,
            "--count", "3", "--ceiling", "0",
        ]  # fmt: skip

    alone = grit_jax(*arguments("one.jsonl"), devices=2)
    assert alone.returncode == 0, alone.stderr
    address = launch.free_address()
    processes = [
        subprocess.Popen(
            command(
                *arguments("two.jsonl"), f"--distributed.coordinator={address}", "--distributed.num_processes=2",
                f"--distributed.process_id={index}",
            ),
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "12 rows over 25 passages" in outputs[0][0] and "rows over" not in outputs[1][0]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert all(len(record.negatives) == 3 for record in open_source(tmp_path / "two.jsonl"))
