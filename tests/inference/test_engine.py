"""Continuous batching: who shares a batch, when, and in which pieces a prompt is read changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.errors import InputError
from grit_jax.inference.engine import Continuation, LaneSize
from grit_jax.model.transformer import KVCache, abstract_model, bind
from tests.models import make


@pytest.fixture(scope="module")
def model():
    return make(max_length=1024)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def run(engine, *, arriving=()):
    """What is written of each continuation; `arriving` join one a step."""
    arriving, found = list(arriving), {}
    while engine.is_busy or arriving:
        if arriving:
            engine.submit(arriving.pop(0))
        for block in engine.step():
            found.setdefault(block.continuation, []).append(block)
    return found


def tokens(blocks):
    return np.concatenate([block.tokens for block in blocks]).tolist()


def alone(model, continuation):
    engine = model.engine([LaneSize(1, 1024)])
    engine.submit(continuation)
    return tokens(run(engine)[continuation])


def log_probabilities(model, text):
    bound = bind(abstract_model(model.architecture), model.params)
    mask = bound.mask(jnp.ones((1, len(text)), int), jnp.arange(len(text))[None], causal=True)
    hidden, _ = bound(jnp.asarray(text)[None], mask)
    return jax.nn.log_softmax(bound.output_layer(hidden.dtype)(hidden[0]), axis=-1)


@pytest.mark.parametrize(("fewer_rows", "devices"), [(False, 1), (True, 1), (True, 4)])
def test_texts_that_come_and_go_are_written_as_if_alone(model, fewer_rows, devices):
    lengths = [3, 40, 700, 9, 130, 2, 33, 300]
    many = [
        Continuation(prompt(length, seed), 5 + 6 * seed, temperature=float(seed % 2), top_p=0.9, seed=seed)
        for seed, length in enumerate(lengths)
    ]
    shared = make(devices, max_length=1024)
    engine = shared.engine([LaneSize(3, 256), LaneSize(2, 1024)], fewer_rows=fewer_rows)
    found = run(engine, arriving=many)
    for continuation in many:
        assert tokens(found[continuation]) == alone(model, continuation)
        assert found[continuation][-1].finish in ("length", "stop")
        assert [block.finish for block in found[continuation][:-1]] == [None] * (len(found[continuation]) - 1)
    assert engine.num_active == engine.num_waiting == 0


def test_a_row_that_was_left_is_used_again_without_a_trace(model):
    engine = model.engine([LaneSize(1, 256)])
    first, second = Continuation(prompt(100, 1), 100), Continuation(prompt(20, 2), 20)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert (engine.num_active, engine.num_waiting) == (1, 1)
    engine.cancel(first)
    engine.cancel(first)
    assert tokens(run(engine)[second]) == alone(model, second)


def test_a_text_that_is_cancelled_while_its_block_is_written_has_none(model):
    engine = model.engine([LaneSize(2, 256)])
    left, stays = Continuation(prompt(30, 1), 40), Continuation(prompt(20, 2), 20)
    engine.submit(left)
    engine.submit(stays)
    engine.start()
    engine.cancel(left)
    blocks = engine.finish()
    assert [block.continuation for block in blocks] == [stays] and engine.num_active == 1
    assert tokens([*blocks, *run(engine)[stays]]) == alone(model, stays)


def test_a_lane_may_be_shorter_than_what_is_read_at_a_time(model):
    engine = model.engine([LaneSize(2, 16)])
    engine.warm_up()
    fits = Continuation(prompt(9, 1), 7)
    engine.submit(fits)
    assert tokens(run(engine)[fits]) == alone(model, fits)


def test_a_text_continues_from_keys_and_values_that_it_is_given(model):
    whole = prompt(90, 3)
    reader = model.engine([LaneSize(1, 1024)])
    reader.submit(Continuation(whole, 8))
    reader.step()
    cache = reader._lanes[0].state.cache
    prefix = KVCache(*(np.stack([np.asarray(layer[field][0, :70]) for layer in cache]) for field in (0, 1)))
    continued = Continuation(whole[70:], 12, prefix=prefix)
    assert (continued.num_cached, continued.num_slots) == (70, 102)
    assert alone(model, continued) == alone(model, Continuation(whole, 12))


def test_log_p_is_that_of_all_logits(model):
    continuation = Continuation(prompt(30, 4), 20, logprobs=True)
    engine = model.engine([LaneSize(2, 256)])
    engine.submit(continuation)
    engine.submit(Continuation(prompt(5), 10))
    blocks = run(engine)[continuation]
    written = tokens(blocks)
    text = np.concatenate([continuation.tokens, written]).astype(np.int32)
    log_p = np.asarray(log_probabilities(model, text))[29:-1]
    chosen, likeliest, values = (np.concatenate(x) for x in zip(*(block.logprobs for block in blocks), strict=True))
    assert np.allclose(chosen, log_p[np.arange(len(written)), written], rtol=1e-4, atol=1e-4)
    assert likeliest[:, 0].tolist() == written  # temperature 0
    assert np.allclose(values, -np.sort(-log_p, axis=-1)[:, :20], rtol=1e-4, atol=1e-4)


def test_nothing_is_compiled_after_warming_up(model):
    engine = model.engine([LaneSize(3, 64), LaneSize(1, 256)], fewer_rows=True)
    assert engine.warm_up() > 0
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )
    config = model.architecture
    prefix = KVCache(*[np.zeros((config.num_layers, 70, config.num_kv_heads, config.head_dim), np.float16)] * 2)
    asked = [Continuation(prompt(length), 9, logprobs=length > 40) for length in (1, 3, 50, 33, 200, 2)]
    run(engine, arriving=[*asked, Continuation(prompt(9), 9, prefix=prefix)])
    assert compiled == []


def test_what_does_not_fit_is_refused(model):
    engine = model.engine([LaneSize(1, 64)])
    with pytest.raises(InputError, match="a prompt of 60 tokens and 5 new ones are over the limit of 64"):
        engine.submit(Continuation(prompt(60), 5))
    with pytest.raises(InputError, match="the prompt has no token"):
        engine.submit(Continuation(prompt(0), 5))
    assert not engine.is_busy


@pytest.fixture(scope="module")
def sick():
    """A model whose numbers are not finite once it has read token 37."""
    model = make(max_length=1024, tie_embeddings=False)
    model.params["embedding"] = model.params["embedding"].at[37].set(np.nan)
    return model


def test_a_text_whose_logits_are_not_finite_fails_alone(sick):
    good, bad = Continuation(prompt(9) % 30, 12), Continuation(np.array([5, 37, 6], np.int32), 12)
    found = run(sick.engine([LaneSize(2, 256)]), arriving=[bad, good])
    assert [(len(block.tokens), block.finish) for block in found[bad]] == [(0, "failed")]
    assert tokens(found[good]) == alone(sick, good)
    with pytest.raises(InputError, match="logits are not finite; its weights are damaged"):
        list(sick.write([bad]))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_row_does_not_feel_what_another_text_has_left_in_it(sick, leaves):
    good, bad = Continuation(prompt(9) % 30, 12), Continuation(np.array([5, 6, 37, 7] * 9, np.int32), 12)
    engine = sick.engine([LaneSize(1, 256)])
    engine.submit(bad)
    engine.start()
    if leaves:
        engine.cancel(bad)
    engine.finish()
    assert not engine.is_busy
    assert tokens(run(engine, arriving=[good])[good]) == alone(sick, good)
