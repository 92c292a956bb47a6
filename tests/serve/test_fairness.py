"""Who has the next turn."""

import asyncio

from grit_jax.serve.fairness import Caller, FairQueue, FairSemaphore


def in_turn(queue):
    found = []
    while caller := queue.first():
        found.append(queue.pop(caller))
        queue.rotate(caller)
    return found


def filled(*waiting):
    queue = FairQueue()
    for client, request, items in waiting:
        for item in items:
            queue.put(Caller(client, request), item)
    return queue


def test_clients_take_turns_and_so_do_their_requests():
    queue = filled(("one", 1, "aaaa"), ("one", 2, "b"), ("two", 3, "cc"), ("three", 4, "d"))
    assert "".join(in_turn(queue)) == "acdbcaaa"
    assert len(queue) == 0


def test_a_client_that_comes_again_is_behind_those_that_wait():
    queue = filled(("one", 1, "a"), ("two", 2, "b"))
    assert queue.pop(queue.first()) == "a"
    queue.put(Caller("one", 3), "c")
    assert in_turn(queue) == ["b", "c"]


def test_a_request_keeps_its_turn_until_it_gives_it_up():
    queue = filled(("one", 1, "aaa"), ("two", 2, "b"))
    first = queue.first()
    assert [queue.pop(first), queue.pop(first)] == ["a", "a"]
    assert queue.first() == first and queue.peek(first) == "a"
    queue.rotate(first)
    assert in_turn(queue) == ["b", "a"]


def test_those_that_may_not_have_a_turn_keep_their_place():
    queue = filled(("one", 1, "a"), ("one", 2, "b"), ("two", 3, "c"))
    assert queue.first(lambda caller: caller.request > 1) == Caller("one", 2)
    assert queue.first(lambda caller: caller.request > 3) is None
    assert in_turn(queue) == ["a", "c", "b"]


def test_what_is_discarded_has_no_turn():
    queue = filled(("one", 1, "ab"), ("two", 2, "c"))
    queue.discard(Caller("one", 1), "a")
    queue.discard(Caller("two", 2), "c")
    queue.discard(Caller("two", 2), "c")
    assert in_turn(queue) == ["b"]


def test_room_is_given_in_turn_and_what_is_cancelled_takes_none():
    async def run():
        semaphore, entered, leave = FairSemaphore(1), [], asyncio.Event()

        async def enter(client, request):
            async with semaphore.room(Caller(client, request)):
                entered.append(request)
                await leave.wait()

        tasks = [asyncio.create_task(enter(*who)) for who in [("a", 1), ("b", 2), ("b", 3), ("c", 4), ("c", 5)]]
        await asyncio.sleep(0)
        tasks[3].cancel()
        leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return entered

    assert asyncio.run(run()) == [1, 2, 5, 3]


def test_room_that_is_given_to_what_is_cancelled_at_once_is_given_on():
    async def run():
        semaphore, entered = FairSemaphore(1), []

        async def enter(request):
            async with semaphore.room(Caller("a", request)):
                entered.append(request)

        async with semaphore.room(Caller("a", 0)):
            tasks = [asyncio.create_task(enter(request)) for request in (1, 2)]
            await asyncio.sleep(0)
        tasks[0].cancel()  # it has its turn by now, and has not run yet
        await asyncio.gather(*tasks, return_exceptions=True)
        return entered

    assert asyncio.run(asyncio.wait_for(run(), 10)) == [2]
