"""What a step needs of a device's memory, and how a run ends where that is too much."""

import resource
from pathlib import Path

import jax
import pytest

from grit_jax.cli.main import main
from grit_jax.config import dump_config, load_config
from grit_jax.errors import InputError
from grit_jax.parallel import sharding
from grit_jax.train import loop
from grit_jax.train.loop import Trainer
from grit_jax.train.memory import packed_rows, rows_at_once, step_memory
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.resolve import check_folder, resolved
from grit_jax.train.setup import lower_step, set_up
from tests.commands import ROOT, TINY, train_arguments, write_data

# What the TPU's runtime says where a program finds no room beside other arrays, and what its compiler says.
NO_ROOM = (
    "RESOURCE_EXHAUSTED: Error loading program 'jit_train_step': Attempting to reserve 12.50G at the bottom of memory. "
    "That was not possible. There are 9.75G free, 0B reserved, and 9.75G reservable."
)
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (173.64G) exceeds "
    "available HBM (15.75G)."
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def config(data, output, *more):
    return load_config(ROOT / "configs/tiny.yaml", [*TINY, f"--data.train={data}", f"--train.output={output}", *more])


def raising(message):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    return fail


@pytest.fixture
def little_address_space():
    """Bounds the process's memory to 32 GiB more than it has: a larger array is refused, as on a full device."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 30), old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.usefixtures("little_address_space")
def test_a_step_for_which_no_memory_is_there_names_its_rows_and_what_to_lower(data, tmp_path):
    # 192 rows of a device, of 1024 tokens and 65,536 activations: 48 GiB of float32.
    settings = [
        "--train.mode=generative", "--data.packing=false", "--data.generative_batch=1536", "--train.steps=1",
        "--data.generative_max_length=1024", "--model.architecture.mlp_dim=65536",
    ]  # fmt: skip
    trainer = Trainer(config(data, tmp_path / "run", *settings))
    with pytest.raises(InputError) as error:
        trainer.fit()
    text = str(error.value)
    assert text.startswith("out of memory: a device of ")
    assert "and takes 192 generative rows at once; activations dominate: set model.layer_rows=48" in text
    assert "(XLA: RESOURCE_EXHAUSTED: Out of memory allocating " in text


@pytest.mark.parametrize("message", [NO_ROOM, TOO_LARGE])
def test_memory_that_runs_out_in_a_step_is_one_line_and_exit_code_2(data, tmp_path, monkeypatch, capsys, message):
    monkeypatch.setattr(loop, "set_up", lambda *arguments: set_up(*arguments)._replace(train_step=raising(message)))
    assert main([*map(str, train_arguments(data, tmp_path / "run"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: a device of ")
    assert "takes 2 embedding and 1 generative rows at once; activations dominate: set model.layer_rows=1 " in line
    assert message[:100] in line


def test_memory_that_runs_out_before_the_first_step_is_the_states(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop, "newest_state", raising("RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes.")
    )
    with pytest.raises(InputError, match=r"MiB of state; the state dominates: use more chips, or raise mesh\.fsdp"):
        Trainer(config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: Mosaic failed to compile",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.1M of 16.0M vmem.",
    ],
)
def test_another_error_of_a_step_stays_as_it_is(data, tmp_path, monkeypatch, message):
    monkeypatch.setattr(loop, "set_up", lambda *arguments: set_up(*arguments)._replace(train_step=raising(message)))
    trainer = Trainer(config(data, tmp_path / "run"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message[:20]):
        trainer.fit()


def test_an_option_that_the_compiler_does_not_know_ends_a_run_with_its_name(data, tmp_path):
    trainer = Trainer(config(data, tmp_path / "run", "--model.compiler_options={xla_no_such_option: 3}"))
    with pytest.raises(InputError, match=r"model\.compiler_options: .* has no option 'xla_no_such_option'"):
        trainer.fit()


def test_what_lowers_memory_may_change_when_a_run_resumes(data, tmp_path):
    output = tmp_path / "run"
    (output / "checkpoints/2").mkdir(parents=True)
    (output / "config.yaml").write_text(dump_config(config(data, output)))
    lower = [
        "--model.remat=offload", "--model.layer_rows=1", "--train.embedding_chunks=2", "--train.generative_chunks=2",
        "--model.compiler_options={}", "--mesh.fsdp=8",
    ]  # fmt: skip
    check_folder(config(data, output, *lower))
    with pytest.raises(InputError, match=r"holds a run with another config \(model\.compute_dtype"):
        check_folder(config(data, output, *lower, "--model.compute_dtype=bfloat16"))


@pytest.mark.parametrize("more", [[], ["--train.embedding_chunks=2"], ["--data.packing=false"]])
def test_no_batch_has_more_rows_than_texts_at_their_limits(data, tmp_path, more):
    trainer = Trainer(config(data, tmp_path / "run", *more, "--train.steps=3"))
    shards = sharding.axis_size(trainer.mesh, "batch")
    for objective in trained_objectives(trainer.config):
        most = packed_rows(objective.stream, objective.stream.full_step(), shards)
        assert most % (objective.stream.num_chunks * shards) == 0
        assert rows_at_once(objective.stream, most, shards) * objective.stream.num_chunks * shards == most
        for batch in trainer.batches(0):
            assert len(objective.inputs(batch[objective.name]).tokens) <= most


def test_the_compiler_tells_more_memory_for_more_rows_of_a_layer(data, tmp_path):
    def temporaries(layer_rows):
        wide = ["--model.architecture.mlp_dim=4096", "--train.mode=generative", f"--model.layer_rows={layer_rows}"]
        settings = config(data, tmp_path / "run", *wide)
        settings = resolved(settings, None, trainer.tokenizer)
        setup = set_up(settings, trainer.mesh)
        found = step_memory(lower_step(setup, trainer.mesh, {"generative": 64}).compile(), "cpu")
        assert found.peak_bytes == found.argument_bytes + found.temporary_bytes
        return found.temporary_bytes

    trainer = Trainer(config(data, tmp_path / "run"))
    one_layer = 7 * 64 * 4096 * 4  # of seven more rows of a device: 64 tokens and 4096 activations in float32
    assert temporaries(8) - temporaries(1) > one_layer
