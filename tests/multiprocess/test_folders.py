"""Checkpoints and Hugging Face folders that several processes write and read together."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.hf.model_folder import save_folder
from tests.commands import grit_jax
from tests.hf.test_model_folder import random_model, same
from tests.multiprocess import launch

SAVE = """
    import sys
    from grit_jax.parallel import sharding
    from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
    from grit_jax.config import MeshConfig
    from grit_jax.model.transformer import abstract_model, abstract_params, param_axes
    from tests.hf.test_model_folder import random_model

    pretrained, params = random_model(tie_embeddings=False)
    model = abstract_model(pretrained.architecture)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    split = sharding.shardings(mesh, abstract_params(model), param_axes(model))
    place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: jax.device_get(x)[index])
    params = jax.tree.map(place, params, split)
    assert not params["head"].is_fully_addressable
    about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files()
    save_params(sys.argv[1], params, CheckpointMetadata(*about))
"""

IMPORT = """
    import json, sys
    from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
    from grit_jax.hf.tensors import StoredTensor
    from grit_jax.checkpoints.opening import load_for_conversion

    read, count = StoredTensor.read, 0

    def counting(self, start, stop):
        global count
        count += (stop - start) * self.dtype.itemsize
        return read(self, start, stop)

    StoredTensor.read = counting
    pretrained, params = load_for_conversion(sys.argv[1])
    about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files()
    save_params(sys.argv[2], params, CheckpointMetadata(*about))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(json.dumps({"processes": jax.process_count(), "devices": jax.device_count(), "read": count, "held": held}))
"""


@pytest.mark.long
def test_one_process_exports_what_two_have_saved(tmp_path):
    launch.run(SAVE, tmp_path / "checkpoint")
    pretrained, params = random_model(tie_embeddings=False)
    save_folder(tmp_path / "expected", pretrained, params)
    done = grit_jax("export-hf", tmp_path / "checkpoint", tmp_path / "hf", "--no-verify")
    assert done.returncode == 0, done.stderr
    files = (tmp_path / name / "model.safetensors" for name in ("expected", "hf"))
    expected, exported = map(safetensors.numpy.load_file, files)
    assert expected.keys() == exported.keys()
    assert all(np.array_equal(expected[name], exported[name]) for name in expected)


def test_two_processes_import_together_and_each_reads_half_of_the_bytes(tmp_path):
    save_folder(tmp_path / "hf", *random_model(tie_embeddings=True))
    file = tmp_path / "hf/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()  # repeated, compared and left out
    safetensors.numpy.save_file(tensors, file)
    _, expected = load_for_conversion(tmp_path / "hf")
    reports = [json.loads(out) for out in launch.run(IMPORT, tmp_path / "hf", tmp_path / "checkpoint")]
    for report in reports:
        assert (report["processes"], report["devices"]) == (2, 4)
        assert report["read"] == sum(value.nbytes for value in tensors.values()) / 2
        assert report["held"] == sum(leaf.nbytes for leaf in jax.tree.leaves(expected)) / 2
    assert same(load_for_conversion(tmp_path / "checkpoint")[1], expected)


def test_the_launcher_ends_all_processes_when_one_fails(tmp_path):
    script = """
        import pathlib, sys, time
        if jax.process_index() == 1:
            raise RuntimeError("the second gives up")
        time.sleep(60)
        pathlib.Path(sys.argv[1]).touch()
    """
    with pytest.raises(AssertionError, match=r"(?s)process 1 ended with 1:.*the second gives up"):
        launch.run(script, tmp_path / "late", timeout=50)
    assert not (tmp_path / "late").exists()
