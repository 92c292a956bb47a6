"""The search for settings, with a stand-in for the compiler that knows the memory and time of every program."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import pytest

from grit_jax.config import TrainConfig
from grit_jax.errors import InputError
from grit_jax.plan import program, tuning
from grit_jax.plan.cost import Cost
from grit_jax.plan.tuning import TARGET, bisected, layouts, tune
from tests.plan.test_program import CONFIG, TOPOLOGY, at_limits, plan

LIMIT = TOPOLOGY.chip.hbm_bytes
# 192 passages of 256 tokens and the queries of 64: 24 rows of a device and 6, on 8 devices.
SEARCHED = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, embedding_batch=96))
ROWS = 27


@pytest.fixture(autouse=True)
def no_libtpu(monkeypatch):
    monkeypatch.setattr(program, "devices", lambda topology: jax.devices())


def rows_of_layer(config):
    """Rows that go through a layer at once."""
    return min(config.model.layer_rows or ROWS, -(-ROWS // config.train.embedding_chunks))


class Compiler:
    """Stands in for `make_plan`: memory grows with the rows of a layer, and time with what is computed again.

    Args:
      least: Share of a device's memory that a mode takes, by mode, with no row.
      per_row: Share for each row.
      state: Share of state and one gradient.
    """

    TIMES: ClassVar = {"dots": 1.0, "full": 1.3, "offload": 1.35}

    def __init__(self, monkeypatch, least, per_row=0.02, state=0.1):
        self.least, self.per_row, self.state, self.configs = least, per_row, state, []
        monkeypatch.setattr(tuning, "make_plan", self)

    def share(self, config):
        return self.least[config.model.remat] / config.mesh.tensor + self.per_row * rows_of_layer(config)

    def seconds(self, config):
        pieces = ROWS / rows_of_layer(config)
        return self.TIMES[config.model.remat] * (1 + 0.02 * pieces) * config.train.embedding_chunks * config.mesh.tensor

    def __call__(self, config, topology, lengths):
        self.configs.append(config)
        seconds, peak = self.seconds(config), int(self.share(config) * LIMIT)
        cost = Cost({"products": seconds}, 0.1, 0.1, 0.0, 0.0, 10, 0, 5, (), 0, ())
        state = int(self.state * LIMIT)
        return plan(cost=cost if peak < 1.5 * LIMIT else None, peak_bytes=peak, state_bytes=state)


def searched(config=SEARCHED, most=100):
    said = []
    return tune(config, TOPOLOGY, at_limits(config), most=most, say=said.append), said


def settings(config):
    model, train = config.model, config.train
    return model.remat, model.layer_rows, train.embedding_chunks, train.generative_chunks, config.mesh.tensor


def first_layout(config=SEARCHED):
    return next(layouts(config, TOPOLOGY, at_limits(config)))


def test_a_layer_takes_at_once_what_divides_the_rows_of_a_stream():
    assert first_layout().limits == [1, 3, 9, None]  # 27 embedding rows of a device and 1 generative


@pytest.mark.parametrize("size", range(6))
def test_bisection_finds_as_many_as_trying_all(size):
    for low, threshold in itertools.product(range(size + 1), range(size + 2)):
        asked = []

        def fits(i, threshold=threshold, asked=asked):
            asked.append(i)
            return i < threshold

        assert bisected(low, size, fits) == max(low, min(size, threshold))
        assert all(low <= i < size for i in asked)


@pytest.mark.parametrize("full", [0.3, 0.5, 0.6, 0.75, 0.85])
def test_the_recommended_plan_is_the_fastest_of_all_that_fit(monkeypatch, full):
    compiler = Compiler(monkeypatch, {"dots": full + 0.2, "full": full, "offload": full - 0.25})
    found, said = searched()
    programs = [
        dataclasses.replace(layout.config, model=dataclasses.replace(CONFIG.model, remat=remat, layer_rows=limit))
        for layout in (first_layout(),)
        for remat, limit in itertools.product(compiler.least, layout.limits)
    ]
    fitting = [config for config in programs if compiler.share(config) <= TARGET]
    assert settings(found.config) == settings(min(fitting, key=compiler.seconds))
    assert found.config in compiler.configs
    assert found.fits
    assert found.plan.peak_bytes <= TARGET * LIMIT
    assert len(said) == len(compiler.configs) < len(programs)
    assert len(set(map(repr, compiler.configs))) == len(compiler.configs)  # none is compiled twice


def test_what_fits_with_least_recomputation_and_all_rows_needs_no_other_program(monkeypatch):
    compiler = Compiler(monkeypatch, {"dots": 0.1, "full": 0.1, "offload": 0.1})
    found, _ = searched()
    assert settings(found.config) == ("dots", None, 1, 1, 1)
    assert len(compiler.configs) == 2


def test_rows_go_through_the_model_in_chunks_only_where_nothing_else_fits(monkeypatch):
    compiler = Compiler(monkeypatch, dict.fromkeys(("dots", "full", "offload"), 0.3))
    monkeypatch.setattr(compiler, "share", lambda config: 1.7 / config.train.embedding_chunks)
    found, said = searched()
    assert settings(found.config) == ("dots", None, 3, 1, 1)
    assert [config.train.embedding_chunks for config in compiler.configs] == [1, 1, 1, 3, 3]
    assert "--train.embedding_chunks=3" in found.overrides
    assert said[0].startswith("--mesh.data=1 --mesh.fsdp=-1 --mesh.tensor=1 --train.embedding_chunks=1")
    assert "does not fit" in said[0]


def test_tensor_parallelism_is_tried_only_where_no_chunks_help(monkeypatch):
    Compiler(monkeypatch, dict.fromkeys(("dots", "full", "offload"), 1.0))
    found, said = searched()
    assert found.config.mesh.tensor == 2
    assert sum("tensor=1" in line for line in said) == 3 * len([27, 13, 6, 3, 1])


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_no_more_programs_are_compiled_than_may_be(monkeypatch, most):
    compiler = Compiler(monkeypatch, {"dots": 0.95, "full": 0.6, "offload": 0.2})
    found, said = searched(most=most)
    assert len(compiler.configs) == most
    assert found.fits == (most > 1)  # the second is `full` with a row at a time
    assert said[-1] == f"{most} programs are compiled; --compile allows more"


def test_where_nothing_fits_the_program_with_the_least_memory_is_returned(monkeypatch):
    compiler = Compiler(monkeypatch, {"dots": 5.0, "full": 4.6, "offload": 4.4})
    found, _ = searched()
    assert found.plan.peak_bytes == min(int(compiler.share(config) * LIMIT) for config in compiler.configs)
    assert not found.fits


def test_a_state_that_no_setting_makes_smaller_ends_the_search(monkeypatch):
    compiler = Compiler(monkeypatch, {"dots": 1.0, "full": 1.0, "offload": 1.0}, state=0.95)
    _, said = searched()
    assert len(compiler.configs) == 1
    assert said[-1] == "state and gradients alone are too much for these chips"


def test_the_smallest_tensor_parallelism_is_that_which_divides_the_batch(monkeypatch):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, embedding_batch=4, generative_batch=4))
    Compiler(monkeypatch, {"dots": 0.1, "full": 0.1, "offload": 0.1})
    assert searched(config)[0].config.mesh.tensor == 2
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, embedding_batch=3))
    with pytest.raises(InputError, match=r"data\.embedding_batch=3 is not divisible by the mesh's 8 batch"):
        searched(odd)


def test_a_stream_that_is_not_trained_has_no_chunks(monkeypatch):
    Compiler(monkeypatch, {"dots": 0.1, "full": 0.1, "offload": 0.1})
    found, _ = searched(dataclasses.replace(SEARCHED, train=TrainConfig(mode="embedding")))
    assert not any("generative_chunks" in override for override in found.overrides)
