"""Tiny models with random weights and the byte tokenizer."""

import jax
import tokenizers

from grit_jax import GritModel
from grit_jax.config import EmbeddingConfig, MeshConfig, TransformerConfig
from grit_jax.model.transformer import abstract_model, init_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN
from grit_jax.text.tokenizer import Tokenizer


def shape(**changes):
    """A resolved architecture of two layers."""
    sizes = {"embed_dim": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_length": 256}
    return TransformerConfig(**sizes | changes).resolve(258)


def weights(config, projection_dim=None, seed=0):
    """Parameters whose layers matter."""
    return jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(seed), projection_dim))


def bytes_with_ending():
    """The byte tokenizer with a token after every text, as that of Qwen3-Embedding has one."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.load("bytes").files()["tokenizer.json"])
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return Tokenizer(backend, bos="<s>", eos="</s>")


def make(devices=1, embedding=EmbeddingConfig(), seed=0, tensor=1, tokenizer=Tokenizer.load("bytes"), **changes):
    """A model with a copy on each of some devices, or with each copy on `tensor` of them."""
    config = shape(**changes)
    params = weights(config, embedding.projection_dim, seed)
    mesh = sharding.make_mesh(MeshConfig(devices // tensor, 1, tensor), jax.devices()[:devices])
    axes = param_axes(abstract_model(config, embedding.projection_dim))
    params = jax.device_put(params, sharding.shardings(mesh, params, axes))
    return GritModel(params, config, embedding, tokenizer, mesh=mesh, execution=PLAIN)
