"""The thread that owns the model, with requests that keep others waiting, leave or fail."""

import asyncio
import contextlib

import numpy as np
import pytest
from safetensors import SafetensorError

from grit_jax.engine import LaneSize
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.protocol import RequestError
from grit_jax.serve.scheduler import Scheduler


@contextlib.contextmanager
def running(model, **options):
    scheduler = Scheduler(model, model.engine([LaneSize(1, 32)]), Metrics(), queue=2, **options)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()


def test_a_large_request_does_not_keep_a_small_one_waiting(model):
    async def both():
        ended = []

        async def embed(name, texts):
            await scheduler.embed(texts)
            ended.append(name)

        large = asyncio.create_task(embed("large", (model.embedding_prompts(["word " * 50]) * 400)))
        await asyncio.sleep(0)
        await embed("small", model.embedding_prompts(["x"]))
        await large
        return ended

    with running(model) as scheduler:
        assert asyncio.run(both()) == ["small", "large"]


def test_vectors_of_many_batches_come_in_the_order_of_their_texts(model):
    texts = model.embedding_prompts(["word " * (1 + number % 60) + str(number) for number in range(300)])
    assert sum(len(text.tokens) for text in texts) > 3 * model.batch_tokens

    async def both():
        return await asyncio.gather(scheduler.embed(texts), scheduler.embed(texts[::-1]))

    with running(model) as scheduler:
        forwards, backwards = asyncio.run(both())
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-5)
    np.testing.assert_allclose(forwards, [model.embed([text])[0] for text in texts], atol=1e-5)


@pytest.mark.parametrize("error", [OSError("gone"), SafetensorError("cut")])
def test_a_file_that_cannot_be_read_fails_one_call(model, error):
    idled = []

    def idle():
        idled.append(1)
        if len(idled) == 1:
            raise error
        return False

    def fail():
        raise error

    async def calls():
        with pytest.raises(type(error)):
            await scheduler.call(fail)
        return await scheduler.call(lambda: 3)

    with running(model, idle=idle) as scheduler:
        assert asyncio.run(calls()) == 3
    assert len(idled) > 1


def test_what_nobody_waits_for_any_more_is_not_done(model):
    done = []

    async def calls():
        left = asyncio.create_task(scheduler.call(lambda: done.append("left")))
        await asyncio.sleep(0)
        left.cancel()
        scheduler.start()
        await scheduler.call(lambda: done.append("last"))

    scheduler = Scheduler(model, model.engine([LaneSize(1, 32)]), Metrics(), queue=2)
    asyncio.run(calls())
    scheduler.stop()
    assert done == ["last"]


def test_requests_beyond_the_queue_are_refused_until_one_ends(model):
    with running(model) as scheduler, scheduler.place("embed"):
        with scheduler.place("write"), scheduler.place("embed"), pytest.raises(RequestError) as refused:
            scheduler.place("embed").__enter__()
        assert refused.value.status == 429
        with scheduler.place("embed"):
            pass
