"""Keys and values of the reference's embedding pass, `get_cache`, and its answer on top of them."""

import jax
import numpy as np
import pytest

from grit_jax import GritModel
from grit_jax.config import EmbeddingConfig, MeshConfig
from grit_jax.inference.engine import Continuation, LaneSize
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN
from tests.parity import golden

ASKED = "\n<|user|>\nWhy?\n<|assistant|>\n"


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_keys_values_vector_and_the_answer_after_them(shared, tmp_path, family):
    pretrained, params = golden.load(shared, family, tmp_path / "hf")
    recorded = golden.recorded_batch(golden.tensors(shared, "encode/encode"), f"{family}/cache/")
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    about = pretrained.architecture, EmbeddingConfig(), pretrained.tokenizer
    model = GritModel(params, *about, mesh=mesh, execution=PLAIN)
    (cached,) = model.encode_with_caches(golden.described(shared, "encode/encode")["sentences"][:1])
    assert golden.absolute(cached.vector, recorded["embedding"][0]) < golden.HIDDEN
    for layer, (keys, values) in enumerate(zip(*cached.cache, strict=True)):
        for name, ours in (("key", keys), ("value", values)):
            assert golden.absolute(ours.swapaxes(0, 1), recorded[f"layer{layer}.{name}"][0]) < golden.HIDDEN

    tokens = model.tokenizer.encode(ASKED).ids
    assert np.array_equal(tokens, recorded["gen_input_ids"][0])
    engine = model.engine([LaneSize(1, 64)])
    engine.submit(Continuation(tokens, 8, prefix=cached.cache))
    written = [token for _ in range(8) for block in engine.step() for token in block.tokens]
    assert written == recorded["gen_output_ids"][0, len(tokens) :].tolist()
