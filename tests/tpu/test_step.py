"""The train step as the TPU compiler makes it, for chips that need not be there."""

import dataclasses
import re

import pytest

from grit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, TransformerConfig

CONFIG = Config(
    model=ModelConfig(
        architecture=TransformerConfig(
            family="mistral", embed_dim=512, mlp_dim=1024, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
            max_length=512, sliding_window=128, tie_embeddings=False,
        ).resolve(4096),
        remat="full",
    ),
    data=DataConfig(
        query_max_length=128, passage_max_length=256, generative_max_length=256, embedding_batch=16, generative_batch=8
    ),
    train=TrainConfig(embedding_chunks=2),
    mesh=MeshConfig(data=1, fsdp=-1),
)  # fmt: skip


def gathers_within(module, computation):
    """What the all-gathers of a computation, and of all that it calls, give."""
    for instruction in computation:
        if instruction.opcode == "all-gather":
            yield from instruction.arrays
        for key in ("calls", "to_apply", "body"):
            if instruction.attribute(key) in module.computations:
                yield from gathers_within(module, module.called(instruction, key))


def compiled_for_four_chips(config):
    """The train step of a config, compiled for a v5e-4."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    from grit_jax.data.streams import trained_streams
    from grit_jax.plan.program import lower, planned_mesh
    from grit_jax.plan.topology import parse_topology
    from grit_jax.plan.work import lengths_at_limits
    from grit_jax.train.setup import set_up

    mesh = planned_mesh(config, parse_topology("v5e-4"))
    _, lowered = lower(set_up(config, mesh), mesh, lengths_at_limits(trained_streams(config)))
    return lowered.compile()


def bfloat16_sums(module):
    """Instructions of a program that add up bfloat16 over devices, or over more than one row of a scatter."""
    for instruction in (instruction for computation in module.computations.values() for instruction in computation):
        narrow = any(array.dtype == "bf16" for array in instruction.arrays)
        adds = instruction.opcode in ("all-reduce", "all-reduce-start", "reduce-scatter", "scatter")
        if adds and narrow and instruction.attribute("unique_indices") != "true":
            yield instruction


def test_a_step_of_both_streams_as_the_tpu_compiler_makes_it(capfd):
    """One program, as compiling takes most of a minute: its kernels, its collectives, and what the compiler says."""
    from grit_jax.plan.hlo import parse_module
    from grit_jax.train.step import TOKEN_LOSSES

    compiled = compiled_for_four_chips(CONFIG)
    text = compiled.as_text()
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err

    # Every device has all metrics, but for the losses of the tokens, which few steps' readers gather.
    _, metrics = compiled.output_shardings
    assert [name for name, split in metrics.items() if not split.is_fully_replicated] == [f"{TOKEN_LOSSES}generative"]

    # Splash attention forward and backward; all scores of a row would be the dense kernel's.
    assert set(re.findall(r"splash_mha_(fwd|dkv)", text)) == {"fwd", "dkv"}
    assert not re.search(r"\[(?:\d+,)*256,256\]", text)

    def shapes(kind):
        found = re.findall(rf"= \w+\[([\d,]+)\]\S* {kind}\(", text)
        return [tuple(sorted(map(int, dims.split(",")))) for dims in found]

    # The tables of 4096 tokens are gathered outside all loops: not for every chunk, layer or block of logits.
    assert (512, 4096) in shapes("all-gather")
    module = parse_module(text)
    bodies = [module.called(i, "body") for c in module.computations.values() for i in c if i.opcode == "while"]
    gathered = [array.dims for body in bodies for array in gathers_within(module, body)]
    assert (1, 512, 1024) in gathered
    assert (4096, 512) not in gathered
    assert not list(bfloat16_sums(module))
    # The gradients of the three MLP matrices leave each stream's layer in pieces: its scan has one instruction each.
    assert shapes("reduce-scatter").count((128, 1024)) + shapes("all-reduce").count((512, 1024)) <= 2 * 3


@pytest.mark.long
def test_with_tensor_only_activations_are_added_up_in_bfloat16_and_no_weight_is_whole():
    from grit_jax.plan.hlo import parse_module, replica_groups

    module = parse_module(compiled_for_four_chips(dataclasses.replace(CONFIG, mesh=MeshConfig(1, 2, 2))).as_text())
    # Each is the sum of two halves of a product, which the devices of `tensor` hold.
    assert all(replica_groups(instruction, 4) == [(0, 1), (2, 3)] for instruction in bfloat16_sums(module))
    gathered = {
        array.dims for computation in module.computations.values() for array in gathers_within(module, computation)
    }
    assert (512, 512) in gathered
    assert not {(512, 1024), (1024, 512)} & gathered
