import dataclasses
import json

import jax
import pytest

from grit_jax.cli import main as cli
from grit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, TransformerConfig
from grit_jax.data.streams import trained_streams
from grit_jax.errors import InputError
from grit_jax.parallel.sharding import make_mesh
from grit_jax.plan import program
from grit_jax.plan.collectives import TransferTotal
from grit_jax.plan.cost import KINDS, Cost
from grit_jax.plan.presentation import as_json, as_lines
from grit_jax.plan.program import Plan, planned_config
from grit_jax.plan.topology import parse_topology
from grit_jax.plan.work import Work, lengths_at_limits, lengths_of_data, planned_work, rows_by_stream
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.metrics import model_flops
from grit_jax.train.objectives import trained_objectives
from tests.commands import ROOT, write_data

ARCHITECTURE = TransformerConfig(vocab_size=64, embed_dim=32, num_heads=4, num_kv_heads=2, num_layers=2).resolve(64)
CONFIG = Config(
    model=ModelConfig(architecture=ARCHITECTURE),
    data=DataConfig(
        query_max_length=64, passage_max_length=256, generative_max_length=128, embedding_batch=16, generative_batch=8
    ),
)
TOPOLOGY = parse_topology("v5e-8")
# What libtpu 0.0.42.1 says of temporaries that no device holds.
FAILED_BEFORE_ALLOCATION = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (173.64G) exceeds "
    "available HBM (15.75G)."
)
FAILED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(train_step)/while/body/dot_general"
     Shape: bf16[32,4,2048,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     ==========================

  2. Size: 512.0M
     Shape: f32[128,1024]{1,0}
     ==========================
"""


COST = Cost(
    seconds={kind: 0.5 if kind in ("products", "attention", "vector", "exposed") else 0.0 for kind in KINDS},
    hbm_seconds=0.1,
    ici_seconds=0.7,
    dcn_seconds=0.0,
    host_seconds=0.0,
    matmul_flops=10,
    kernel_flops=0,
    hbm_bytes=5,
    transfers=(
        TransferTotal("all-gather", "ici", False, "grit_jax/model/layers.py:57", 64, 3 << 30, 0.4, 0.4),
        TransferTotal("all-gather", "ici", False, "grit_jax/model/layers.py:61", 64, 1 << 30, 0.1, 0.1),
        TransferTotal("all-reduce", "ici", False, "grit_jax/train/step.py:137", 1, 4, 1e-6, 1e-6),
        TransferTotal("all-gather", "ici", True, "grit_jax/model/layers.py:57", 64, 1 << 30, 0.2, 0.0),
    ),
    unknown_loops=0,
    unknown_kernels=(),
)


def plan(**changes):
    about = {
        "topology": TOPOLOGY, "parameters": 1000,
        "work": Work({"embedding": 16, "generative": 8}, 16, 4096, 1e12, 4096),
        "rows_at_once": {"embedding": 2, "generative": 1}, "steps": 1800, "state_bytes": 1 << 30, "negatives": "dense",
        "argument_bytes": 1 << 30, "temporary_bytes": 2 << 30, "peak_bytes": 3 << 30, "host_bytes": 0, "largest": (),
        "cost": None, "compile_seconds": 1.0,
    }  # fmt: skip
    return Plan(**about | changes)


def at_limits(config=CONFIG, fill=1.0):
    return lengths_at_limits(trained_streams(config), fill)


def work_of(config, shards, lengths):
    return planned_work(config.model.architecture, trained_objectives(config), shards, lengths)


def test_texts_at_their_limits_are_packed_as_a_step_packs_them():
    work = work_of(CONFIG, 8, at_limits())
    # 16 queries of 64 share 4 rows of 256, 32 passages fill one each; 8 conversations fill one each.
    assert work.rows == {"embedding": 40, "generative": 8}
    tokens, generated = 16 * 64 + 32 * 256 + 8 * 128, 8 * 128
    assert (work.tokens, work.capacity) == (tokens, 40 * 256 + 8 * 128)
    pairs = 16 * 64**2 + 32 * 256**2 + 8 * 128**2 / 2
    assert work.flops == model_flops(ARCHITECTURE, tokens=tokens, tokens_through_head=generated, attention_pairs=pairs)


def test_half_the_fill_is_half_the_tokens_and_rows():
    work = work_of(CONFIG, 4, at_limits(CONFIG, 0.5))
    assert work.rows == {"embedding": 20, "generative": 4}
    assert work.tokens == work_of(CONFIG, 4, at_limits()).tokens // 2


def test_texts_of_data_are_those_of_the_steps_that_train_on_it(tmp_path):
    write_data(tmp_path)
    data = dataclasses.replace(CONFIG.data, train=str(tmp_path), embedding_batch=8, generative_batch=4)
    architecture = TransformerConfig(vocab_size=512, embed_dim=32, num_heads=4, num_kv_heads=2, num_layers=2)
    config = dataclasses.replace(CONFIG, data=data, model=ModelConfig(architecture=architecture.resolve(512)))
    lengths = lengths_of_data(config, trained_streams(config))
    assert {name: len(of_stream) for name, of_stream in lengths.items()} == {"embedding": 8 + 16, "generative": 4}
    work = work_of(config, 1, lengths)
    assert work.tokens == sum(of_stream.sum() for of_stream in lengths.values())
    assert work.tokens < work_of(config, 1, at_limits(config)).tokens
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens and model.architecture.vocab_size is 64"):
        lengths_of_data(dataclasses.replace(config, model=CONFIG.model), trained_streams(config))


def test_a_stream_that_is_not_trained_has_no_rows():
    for mode, rows in (("embedding", (40, 0)), ("generative", (0, 8))):
        config = dataclasses.replace(CONFIG, train=TrainConfig(mode=mode))
        assert tuple(rows_by_stream(work_of(config, 8, at_limits(config))).values()) == rows


def test_a_plan_takes_the_vocabulary_of_the_tokenizer_where_the_architecture_has_none():
    assert planned_config(Config()).model.architecture == TransformerConfig().resolve(
        Tokenizer.load("bytes").vocab_size
    )


def test_a_plan_says_what_to_give_where_the_tokenizer_is_not_on_this_machine():
    config = Config(model=ModelConfig(init="models/org/name"))
    with pytest.raises(InputError, match=r"models/org/name: nothing there; .*model.architecture.vocab_size"):
        planned_config(config)


@pytest.fixture
def compiler_says(monkeypatch):
    """Compiling for any topology fails with the message that the fixture is called with."""

    def fail(message):
        class Lowered:
            def compile(self):
                raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(program, "devices", lambda topology: jax.devices())
        work = Work({"embedding": 40, "generative": 8}, 40, 4096, 1e12, 4096)
        monkeypatch.setattr(program, "lower", lambda *_: (work, Lowered()))

    return fail


def test_what_the_compiler_says_when_memory_runs_out_is_reported(compiler_says):
    compiler_says(FAILED)
    failed = program.make_plan(CONFIG, TOPOLOGY, at_limits())
    assert not failed.fits
    assert failed.peak_bytes == int(23.5 * (1 << 30))
    assert failed.largest[0] == "8.00G bf16[32,4,2048,4096] jit(train_step)/while/body/dot_general"
    assert failed.largest[1] == "512.0M f32[128,1024]"
    text = "\n".join(as_lines(failed, CONFIG))
    assert "peak 23.50 of 15.75 GiB: DOES NOT FIT" in text
    assert "set model.layer_rows=" in text


def test_memory_that_runs_out_before_allocation_is_advice_and_exit_code_3(compiler_says, capsys):
    compiler_says(FAILED_BEFORE_ALLOCATION)
    assert cli.main(["plan", str(ROOT / "configs/tiny.yaml"), "--topology", "v5e-1"]) == 3
    assert "peak 173.64 of 15.75 GiB: DOES NOT FIT" in capsys.readouterr().out


def test_an_option_that_the_compiler_does_not_know_is_named_with_exit_code_2(compiler_says, capsys):
    compiler_says("INVALID_ARGUMENT: No such compile option: 'xla_nope'")
    arguments = ["plan", str(ROOT / "configs/tiny.yaml"), "--topology", "v5e-1"]
    assert cli.main([*arguments, "--model.compiler_options={xla_nope: true}"]) == 2
    assert (
        "error: model.compiler_options: the compiler for these devices has no option 'xla_nope'"
        in capsys.readouterr().err
    )


def test_a_row_holds_one_text_where_data_are_not_packed():
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, packing=False))
    assert work_of(config, 8, at_limits()).rows == {"embedding": 16 + 32, "generative": 8}


def test_another_error_of_the_compiler_is_raised(compiler_says):
    compiler_says("INTERNAL: Mosaic failed to compile a kernel of 12.5M")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        program.make_plan(CONFIG, TOPOLOGY, at_limits())


def test_a_plan_says_what_the_whole_run_costs():
    found = plan(cost=COST)
    assert "the whole run: 1,800 steps, 1.0 hours, 8.0 chip-hours" in "\n".join(as_lines(found, CONFIG))
    report = as_json(found)
    assert (report["steps"], report["predicted_run_hours"], report["predicted_chip_hours"]) == (1800, 1.0, 8.0)


def test_the_top_names_every_kind_of_work_and_each_long_exposed_transfer(monkeypatch, capsys):
    monkeypatch.setattr(program, "make_plan", lambda *_, **__: plan(cost=COST))
    arguments = ["plan", str(ROOT / "configs/gritlm_7b_v5p_128.yaml"), "--topology", "v5p-128"]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    # Without it, the transfers of all lines together.
    assert "all-gather (ici, synchronous): 128 x, 4.29 GB, 0.500 s, exposed 0.500" in plain
    assert "layers.py" not in plain
    assert cli.main([*arguments, "--top"]) == 0
    top = capsys.readouterr().out.removeprefix(plain.rpartition("compiled in")[0])
    assert [line.split() for line in top.splitlines() if "%" in line] == [
        *([["0.500", "s", "25.0%", *name.split()] for name in (
            "matrix products", "attention", "vector work", "exposed transfers")]),
        *([["0.000", "s", "0.0%", *name.split()] for name in ("experts", "other kernels", "copies")]),
        ["2.000", "s", "100.0%", "in", "all"],
    ]  # fmt: skip
    exposed = [line.strip() for line in top.splitlines() if "exposed at" in line]
    assert [line.partition(":")[0] for line in exposed] == [
        "0.400 s exposed at grit_jax/model/layers.py", "0.100 s exposed at grit_jax/model/layers.py"
    ]  # fmt: skip
    assert exposed[0].startswith("0.400 s exposed at grit_jax/model/layers.py:57: all-gather (ici, synchronous): 64 x")


def test_the_seconds_of_the_report_add_up_to_the_step():
    report = as_json(plan(cost=COST))
    assert sum(report["seconds"].values()) == report["predicted_step_seconds"] == 2.0
    exposed = sum(row["exposed_seconds"] for row in report["collectives"])
    assert exposed == pytest.approx(report["seconds"]["exposed"], abs=1e-5)


def test_padding_gets_no_expert():
    experts = dataclasses.replace(ARCHITECTURE, num_experts=8)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for tokens, fill in ((4096, 1.0), (1024, 0.25)):
        work = Work({"generative": 8}, 8, tokens, 1e12, 4096)
        assert program._expert_fill(experts, mesh, work) == fill


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"argument_bytes": 2 << 30}, {}, "the state dominates"),
        ({"argument_bytes": None, "state_bytes": 16 << 30}, {}, "state and gradients alone need 16.00 GiB"),
        ({}, {"remat": "dots"}, "what layers keep dominates: set model.remat=full"),
        ({}, {"layer_rows": 1}, "the inputs of layers dominate: set model.remat=offload"),
        ({}, {"layer_rows": 1, "remat": "offload"}, "lower model.layer_rows"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_dominates_and_what_to_change(changes, model, said):
    assert said in plan(**changes).advice(dataclasses.replace(CONFIG.model, **model))


@pytest.mark.parametrize(("peak", "code"), [(1 << 30, 0), (99 << 30, 3)])
def test_the_command_prints_one_object_and_its_exit_code_says_whether_it_fits(monkeypatch, capsys, peak, code):
    monkeypatch.setattr(program, "make_plan", lambda *_, **__: plan(cost=COST, peak_bytes=peak))
    arguments = ["plan", str(ROOT / "configs/gritlm_7b_v5p_128.yaml"), "--topology", "v5p-128", "--json"]
    assert cli.main(arguments) == code
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    for key in (
        "fits", "parameters", "peak_bytes_per_device", "hbm_bytes", "model_flops_per_step", "predicted_step_seconds",
        "predicted_mfu", "compile_seconds",
    ):  # fmt: skip
        assert report[key] is not None, key
    assert report["fits"] == (code == 0)
    assert report == json.loads(json.dumps(as_json(plan(cost=COST, peak_bytes=peak))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9-8"], "unknown TPU topology 'v9-8'"),
        (["--topology", "v5p-8", "--fill", "2"], "--fill=2.0 must be over 0 and at most 1"),
        (["--topology", "v5p-8", "--mesh.fsdp=3"], "do not multiply to the 4 devices"),
        (
            ["--topology", "v5p-8", "--data.embedding_batch=30"],
            "data.embedding_batch=30 is not divisible by the mesh's 4",
        ),
        (["--topology", "v5p-8", "--data.passage_max_length=65536"], "is over the model's 32768 tokens"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--no-compile"]], ids=["", "no compile"])
def test_what_cannot_be_planned_is_one_clear_line(monkeypatch, capsys, arguments, message, more):
    monkeypatch.setattr(program, "devices", lambda topology: jax.devices()[:4])
    assert cli.main(["plan", str(ROOT / "configs/gritlm_7b_v5p_128.yaml"), *arguments, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "code"), [(1, 0), (64, 3)])
def test_a_plan_without_compiling_says_whether_the_state_alone_fits(monkeypatch, capsys, layers, code):
    monkeypatch.setattr(program, "devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
    config = [str(ROOT / "configs/gritlm_7b_v5p_128.yaml"), f"--model.architecture.num_layers={layers}"]
    arguments = ["plan", *config, "--topology", "v6e-4", "--no-compile", "--data.embedding_batch=64"]
    assert cli.main(arguments) == code
    assert ("DOES NOT FIT" in capsys.readouterr().out) == (code == 3)
    assert cli.main([*arguments, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert (report["may_fit"], report["chips"], report["mesh"]["fsdp"]) == (code == 0, 4, 4)
