"""The thread that owns the model, with requests that keep others waiting, leave or fail."""

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections import deque

import jax
import numpy as np
import pytest
from safetensors import SafetensorError

from grit_jax.inference.embedder import StartedEmbedding
from grit_jax.inference.engine import Block, Continuation, LaneSize
from grit_jax.serve.counters import Counters
from grit_jax.serve.fairness import Caller
from grit_jax.serve.request_errors import RequestError
from grit_jax.serve.scheduler import Scheduler
from grit_jax.text.prompts import TokenizedPrompt
from tests.models import make
from tests.serve.conftest import until

numbers = itertools.count()


def caller(client="one"):
    return Caller(client, next(numbers))


@contextlib.contextmanager
def running(model, **options):
    scheduler = Scheduler(model, model.engine([LaneSize(1, 32)]), Counters(), queue=2, **options)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()


def test_a_large_request_does_not_keep_a_small_one_waiting(model):
    async def both():
        ended = []

        async def embed(name, texts):
            await scheduler.embed(texts, caller(name))
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
        return await asyncio.gather(scheduler.embed(texts, caller()), scheduler.embed(texts[::-1], caller()))

    with running(model) as scheduler:
        forwards, backwards = asyncio.run(both())
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-5)
    np.testing.assert_allclose(forwards, [model.embed([text])[0] for text in texts], atol=1e-5)


def test_a_vector_that_is_not_finite_is_not_felt_by_texts_of_other_requests(model):
    sick = make(max_length=1024)
    (token,) = sick.tokenizer.encode("%").ids.tolist()
    sick.params["embedding"] = sick.params["embedding"].at[token].set(np.nan)
    bad, good = (sick.embedding_prompts([text]) for text in ("50 %", "x"))

    async def both():
        tasks = [asyncio.create_task(scheduler.embed(texts, caller())) for texts in (bad, good)]
        await asyncio.sleep(0)
        scheduler.start()
        return await asyncio.gather(*tasks)

    scheduler = Scheduler(sick, model.engine([LaneSize(1, 32)]), Counters(), queue=2)
    of_bad, of_good = asyncio.run(both())
    scheduler.stop()
    assert np.isnan(of_bad).all()
    np.testing.assert_allclose(of_good, model.embed(good), atol=1e-6)


@pytest.mark.parametrize("error", [OSError("gone"), SafetensorError("cut"), ValueError("no JSON"), KeyError("text")])
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
            await scheduler.call(fail, caller())
        return await scheduler.call(lambda: 3, caller())

    with running(model, idle=idle) as scheduler:
        assert asyncio.run(calls()) == 3
        until(lambda: len(idled) > 1)


def test_a_device_that_fails_in_a_call_is_told_to_everyone(model):
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: gone")

    async def calls():
        for function in (fail, lambda: 3):
            with pytest.raises(RequestError, match="the model has failed"):
                await scheduler.call(function, caller())

    with running(model) as scheduler:
        asyncio.run(calls())


def test_what_nobody_waits_for_any_more_is_not_done(model):
    done = []

    async def calls():
        left = asyncio.create_task(scheduler.call(lambda: done.append("left"), caller()))
        await asyncio.sleep(0)
        left.cancel()
        scheduler.start()
        await scheduler.call(lambda: done.append("last"), caller())

    scheduler = Scheduler(model, model.engine([LaneSize(1, 32)]), Counters(), queue=2)
    asyncio.run(calls())
    scheduler.stop()
    assert done == ["last"]


def test_requests_beyond_the_queue_are_refused_until_one_ends(model):
    def refused(client):
        with pytest.raises(RequestError) as error:
            scheduler.admit("embed", client).__enter__()
        return error.value.status

    with running(model) as scheduler, scheduler.admit("embed", "a"):
        with scheduler.admit("write", "a"), scheduler.admit("embed", "a"):
            assert refused("a") == 429
            with scheduler.admit("embed", "b"), scheduler.admit("embed", "c"):  # they have none yet
                assert [refused(client) for client in "abcd"] == [429] * 4
        with scheduler.admit("embed", "a"):
            pass


class Device:
    """A model and an engine that say what they do; what `fails` raises."""

    batch_tokens = 100

    def __init__(self, *, fails=None, rows=4):
        self.fails, self.said, self.lane_rows = fails, [], [rows]
        self.submitted, self.written, self.most_written = [], deque(), 0

    def say(self, what):
        self.said.append(what)
        if what == self.fails:
            raise RuntimeError(what)

    def start_embedding(self, texts):
        self.say("embed")
        yield StartedEmbedding(list(range(len(texts))), [0] * len(texts), self)

    def __array__(self, dtype=None, copy=None):
        self.say("vectors")
        return np.ones((1, 1, 2), np.float32)

    shape = (1, 1, 2)

    @property
    def is_busy(self):
        return bool(self.written)

    def submit(self, continuation):
        self.submitted.append(continuation)
        self.written.append(continuation)
        self.most_written = max(self.most_written, len(self.written))

    def lane(self, continuation):
        return 0

    def cancel(self, continuation):
        pass

    def start(self):
        if self.written:
            self.say("write")

    def finish(self):
        if not self.written:
            return []
        self.say("blocks")
        return [Block(self.written.popleft(), np.ones(1, np.int32), None, "length")]


TEXT = TokenizedPrompt(np.ones(3, np.int32), np.array([[0, 3]]))


async def both(scheduler):
    """What becomes of a text that is embedded and an answer."""

    async def written():
        return [block.finish async for block in scheduler.write(Continuation(np.ones(3, np.int32), 1), caller())]

    tasks = [asyncio.create_task(scheduler.embed([TEXT], caller())), asyncio.create_task(written())]
    await asyncio.sleep(0)  # both wait before the thread starts
    scheduler.start()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_the_device_writes_while_vectors_are_taken():
    device = Device()
    scheduler = Scheduler(device, device, Counters(), queue=2)
    vectors, finish = asyncio.run(both(scheduler))
    scheduler.stop()
    assert vectors.tolist() == [[1, 1]] and finish == ["length"]
    assert device.said == ["embed", "write", "vectors", "blocks"]


def test_texts_of_several_requests_are_embedded_together():
    device = Device()
    scheduler = Scheduler(device, device, Counters(), queue=9)

    async def run():
        requests = [asyncio.create_task(scheduler.embed([TEXT] * count, caller())) for count in (2, 1, 3)]
        await asyncio.sleep(0)
        scheduler.start()
        return await asyncio.gather(*requests)

    assert [len(vectors) for vectors in asyncio.run(run())] == [2, 1, 3]
    scheduler.stop()
    assert device.said == ["embed", "vectors"]


@pytest.mark.parametrize("fails", ["embed", "vectors", "write", "blocks"])
def test_a_device_that_fails_late_or_early_is_told_to_everyone(fails):
    device = Device(fails=fails)
    scheduler = Scheduler(device, device, Counters(), queue=2)
    answers = asyncio.run(both(scheduler))
    scheduler.stop()
    assert {error.status for error in answers if isinstance(error, RequestError)} == {503}
    assert fails == "blocks" or all(isinstance(error, RequestError) for error in answers)
    assert scheduler.failure.status == 503


def test_vectors_that_are_there_do_not_wait_for_a_call_that_came_later():
    device, called = Device(), threading.Event()

    def call():
        device.say("call")
        called.wait()

    async def run():
        embedded = asyncio.create_task(scheduler.embed([TEXT], caller()))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(scheduler.call(call, caller()))
        await asyncio.sleep(0)
        scheduler.start()
        await embedded
        called.set()
        await waiting

    scheduler = Scheduler(device, device, Counters(), queue=2)
    asyncio.run(asyncio.wait_for(run(), 60))
    scheduler.stop()
    assert device.said == ["embed", "vectors", "call"]


@pytest.mark.parametrize(("rows", "of_one"), [(1, 1), (2, 1), (4, 3), (16, 14)])
def test_a_request_for_many_answers_leaves_a_row_to_others(rows, of_one):
    device, many = Device(rows=rows), caller()

    async def answer():
        return [block.finish async for block in scheduler.write(Continuation(np.ones(3, np.int32), 1), many)]

    async def run():
        tasks = [asyncio.create_task(answer()) for _ in range(40)]
        await asyncio.sleep(0)
        scheduler.start()
        await asyncio.gather(*tasks)

    scheduler = Scheduler(device, device, Counters(), queue=99)
    asyncio.run(asyncio.wait_for(run(), 60))
    scheduler.stop()
    assert device.most_written == of_one
    assert len(device.submitted) == 40 and scheduler.num_waiting == 0


def test_rows_are_given_to_clients_and_their_requests_in_turn():
    device = Device(rows=1)
    callers = {"a": caller("one"), "b": caller("one"), "c": caller("two")}
    texts = {name: Continuation(np.ones(3, np.int32), 1, seed=ord(name)) for name in callers}

    async def answer(name):
        text = dataclasses.replace(texts[name])
        return [block.finish async for block in scheduler.write(text, callers[name])]

    async def run():
        tasks = [asyncio.create_task(answer(name)) for name in "aaaabbcc"]
        await asyncio.sleep(0)
        scheduler.start()
        await asyncio.gather(*tasks)

    scheduler = Scheduler(device, device, Counters(), queue=99)
    asyncio.run(asyncio.wait_for(run(), 60))
    scheduler.stop()
    assert "".join(chr(text.seed) for text in device.submitted) == "acbcabaa"


def test_an_answer_that_nobody_waits_for_any_more_frees_its_place():
    device = Device(rows=1)

    async def answer():
        return [block.finish async for block in scheduler.write(Continuation(np.ones(3, np.int32), 1), caller())]

    async def run():
        tasks = [asyncio.create_task(answer()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        scheduler.start()
        return await tasks[2]

    scheduler = Scheduler(device, device, Counters(), queue=9)
    assert asyncio.run(asyncio.wait_for(run(), 60)) == ["length"]
    scheduler.stop()
    assert len(device.submitted) == 1 and scheduler.num_waiting == 0
