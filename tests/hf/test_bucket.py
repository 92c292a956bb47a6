"""Hugging Face folders in a bucket."""

import subprocess
import sys

import pytest

from grit_jax.hf.model_folder import save_folder
from tests.bucket import BUCKET, emulator
from tests.commands import ROOT
from tests.hf.test_model_folder import random_model

pytest.importorskip("gcp_storage_emulator")

PROGRAM = """
import sys
import jax, numpy as np
from etils import epath
from grit_jax.checkpoints.opening import load_for_conversion
local, remote = sys.argv[1:]
epath.Path(remote).mkdir(parents=True, exist_ok=True)
for file in epath.Path(local).iterdir():
    if file.is_file():
        (epath.Path(remote) / file.name).write_bytes(file.read_bytes())
(here, params), (there, again) = map(load_for_conversion, (local, remote))
assert here.architecture == there.architecture
assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
print("the same")
"""


def test_a_model_is_read_from_a_bucket_as_from_a_disk(tmp_path):
    pretrained, params = random_model(tie_embeddings=False)
    save_folder(tmp_path / "hf", pretrained, params, max_shard_bytes=20_000)
    with emulator() as environment:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "hf"), f"gs://{BUCKET}/model"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "the same", done.stderr
