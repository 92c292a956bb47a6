"""Clients that take more than their share: what others wait is counted in turns of the scheduler, not in seconds."""

import contextlib
import copy
import json
import re
import threading
import time
from pathlib import Path

import httpx2
import pytest

from grit_jax.serve import bodies
from grit_jax.serve.app import Server
from grit_jax.serve.service import Limits
from tests.serve.conftest import NAME, running, until
from tests.serve.test_hostile import EMBED, connected, head_of, received

GREEDY, HONEST = "10.0.0.1", "10.0.0.2"
MOST_TURNS = 2  # between a request's arrival at the scheduler and its beginning: the one under way, and one more
ROWS, CROWD = 4, 16


class Watched:
    """A server whose scheduler notes, turn by turn, whose texts and answers arrive, begin and end."""

    def __init__(self, model):
        self.notes, owners = [], {}
        watched = copy.copy(model)

        def begin_texts(texts):
            self.notes.extend(("begins", client) for client in {owners[id(text)] for text in texts})
            return model.start_embedding(texts)

        watched.start_embedding = begin_texts
        self.server = Server(watched, name=NAME, limits=Limits(max_length=1024, rows=ROWS))
        scheduler, engine = self.server._scheduler, self.server._engine
        start, submit, finish = engine.start, engine.submit, engine.finish
        put_text = scheduler._texts.put

        def arrive(caller, text):
            owners[id(text.prompt)] = caller.client
            self.notes.append(("arrives", caller.client))
            put_text(caller, text)

        def arrive_answer(put):
            def note(caller, continuation):
                owners[continuation] = caller.client
                self.notes.append(("arrives", caller.client))
                put(caller, continuation)

            return note

        def turn():
            self.notes.append(("turn", None))
            start()

        def begin(continuation):
            self.notes.append(("begins", owners[continuation]))
            submit(continuation)

        def end():
            blocks = finish()
            self.notes.extend(("ends", owners[block.continuation]) for block in blocks if block.finish)
            return blocks

        scheduler._texts.put = arrive
        for answers in scheduler._lanes:
            answers.waiting.put = arrive_answer(answers.waiting.put)
        engine.start, engine.submit, engine.finish = turn, begin, end

    def turns_waited(self, client):
        """Turns from the first arrival of a client to its first beginning."""
        arrived = self.notes.index(("arrives", client))
        return self.notes[arrived : self.notes.index(("begins", client), arrived)].count(("turn", None))


@pytest.fixture(scope="module")
def crowded(model):
    watched = Watched(model)
    with running(watched.server) as address:
        yield watched, address


@pytest.fixture
def watched(crowded):
    crowded[0].notes.clear()
    return crowded


def post(address, client, path, body):
    return httpx2.post(f"{address}/v1/{path}", json=body, headers={"x-forwarded-for": client}, timeout=120)


@contextlib.contextmanager
def at_work(request):
    """Runs a request beside the block; gives a list to which its response is added."""
    done = []
    thread = threading.Thread(target=lambda: done.append(request()))
    thread.start()
    yield done
    thread.join()


def test_bodies_that_drip_delay_nobody_and_are_given_up_at_their_deadline(watched, monkeypatch):
    watched, address = watched
    body = json.dumps(EMBED).encode().ljust(100_000)
    monkeypatch.setattr(bodies, "_SECONDS", 1e6)
    with contextlib.ExitStack() as clients:
        slow = [clients.enter_context(connected(address)) for _ in range(CROWD)]
        for connection in slow:
            connection.sendall(head_of("embeddings", len(body)))
        begun, stopped = time.monotonic(), threading.Event()

        def drip():
            for place in range(len(body)):
                for connection in slow:
                    with contextlib.suppress(OSError):  # it has been given up
                        connection.sendall(body[place : place + 1])
                if stopped.wait(0.01):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        clients.callback(dripping.join)
        clients.callback(stopped.set)
        for _ in range(5):
            watched.notes.clear()
            assert post(address, HONEST, "embeddings", EMBED).status_code == 200
            assert watched.turns_waited(HONEST) <= MOST_TURNS
        for connection in slow:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):  # they are all still on their way
                connection.recv(1)
            connection.settimeout(60)
        until(lambda: time.monotonic() > begun + 1)
        # It counts from the head: a byte that comes in between does not put it off.
        monkeypatch.setattr(bodies, "_SECONDS", 0.5)
        for connection in slow:
            assert re.match(rb"HTTP/1.1 408 ", received(connection))
    assert post(address, HONEST, "embeddings", EMBED).status_code == 200


def test_a_request_for_many_answers_does_not_keep_another_client_waiting(watched):
    watched, address = watched
    many = {"model": NAME, "prompt": ["Once"] * 16, "n": 16, "max_tokens": 400, "temperature": 0, "stream": True}
    headers = {"x-forwarded-for": GREEDY}
    with httpx2.stream("POST", f"{address}/v1/completions", json=many, headers=headers, timeout=120) as greedy:
        assert greedy.status_code == 200
        answer = post(address, HONEST, "completions", {"model": NAME, "prompt": "Once", "max_tokens": 4})
        notes = list(watched.notes)
    assert answer.status_code == 200 and notes.count(("arrives", GREEDY)) == 256
    assert watched.turns_waited(HONEST) <= MOST_TURNS
    arrived, ended = notes.index(("arrives", HONEST)), notes.index(("ends", HONEST))
    assert notes[arrived:ended].count(("ends", GREEDY)) <= ROWS  # of 256, those that were about to end anyway


def test_a_request_to_embed_many_texts_does_not_keep_another_client_waiting(watched):
    watched, address = watched
    many = EMBED | {"input": [f"{number} {'word ' * 20}" for number in range(2048)]}
    with at_work(lambda: post(address, GREEDY, "embeddings", many)) as greedy:
        until(lambda: ("begins", GREEDY) in watched.notes)
        assert post(address, HONEST, "embeddings", EMBED).status_code == 200
    assert greedy[0].status_code == 200 and len(greedy[0].json()["data"]) == 2048
    assert watched.turns_waited(HONEST) <= MOST_TURNS
    assert ("begins", GREEDY) in watched.notes[watched.notes.index(("begins", HONEST)) :]  # it was not done before


def most_memory():
    """The most bytes that this process has held since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


@pytest.mark.parametrize("part", ["{}", '{"text":""}'])
def test_half_a_million_empty_parts_are_refused_before_they_fill_the_memory(watched, part):
    watched, address = watched
    parts = ",".join([part] * 500_000)
    body = f'{{"model": "{NAME}", "messages": [{{"role": "user", "content": [{parts}]}}]}}'.encode()
    headers = {"content-type": "application/json"}
    most_memory()
    before = most_memory()
    refused = httpx2.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=60)
    grown = most_memory() - before
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "too_large"
    assert ("arrives", "127.0.0.1") not in watched.notes
    assert grown < 10 * len(body) + 50e6
