"""Vectors of the reference's inference class, `GritLM.encode`."""

import re

import jax
import pytest

from grit_jax.config import EmbeddingConfig, MeshConfig
from grit_jax.inference.model import GritModel
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN
from grit_jax.text import prompts
from tests.parity import golden

OPTIONS = ["default", "attn=cccc", "normalized=False", "weightedmean", "cls", "lasttoken"]


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def family(request, shared, tmp_path_factory):
    pretrained, params = golden.load(shared, request.param, tmp_path_factory.mktemp("golden") / "hf")
    return request.param, pretrained, params


@pytest.mark.parametrize("option", OPTIONS)
def test_vectors(shared, family, option):
    name, pretrained, params = family
    about, recorded = golden.described(shared, "encode/encode"), golden.tensors(shared, "encode/encode")
    embedding = EmbeddingConfig(
        attention="causal" if option == "attn=cccc" else "bidirectional",
        pooling=golden.POOLING.get(option, "mean"),
        normalized=option != "normalized=False",
    )
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = GritModel(params, pretrained.architecture, embedding, pretrained.tokenizer, mesh=mesh, execution=PLAIN)
    cases = [key for key in recorded if re.fullmatch(rf"{name}/(\w+=)?{option}/instr[01]", key)]
    assert len(cases) == 2
    for case in cases:
        instruction, limit = about["instructions"][int(case[-1])], about["max_length"]
        texts = [as_recorded(text, instruction, model.tokenizer.bos) for text in about["sentences"]]
        vectors = model.embed([text.cut(limit) for text in prompts.tokenize(texts, model.tokenizer)])
        assert golden.absolute(vectors, recorded[case]) < golden.HIDDEN
        if not instruction:
            assert golden.absolute(model.encode(about["sentences"], max_length=limit), recorded[case]) < golden.HIDDEN


def as_recorded(text, instruction, bos):
    """What the reference reads: it leaves the colon at the end of the instruction, which training strips."""
    head = f"{bos}<|user|>\n{instruction}\n<|embed|>\n" if instruction else f"{bos}<|embed|>\n"
    return prompts.Prompt(head + text, ((len(head), len(head) + len(text)),))
