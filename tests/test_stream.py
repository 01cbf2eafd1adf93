"""Consumers are woken a few at a time, all of them, in order, and others get their turn in between."""

from __future__ import annotations

import asyncio

from nanovllm.engine.stream import WOKEN_AT_ONCE, Stream, Waker


async def read(streams: list[Stream], woken: list[int]) -> list[asyncio.Task[None]]:
    """Wait for all of the streams; ``woken`` gets the number of each that wakes."""

    async def wait(number: int) -> None:
        await streams[number].wait()
        woken.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(len(streams))]
    await asyncio.sleep(0)
    return tasks


def test_whoever_asks_meanwhile_does_not_wait_for_a_thousand_streams():
    async def main() -> None:
        streams, woken, seen = [Stream() for _ in range(1000)], [], []
        tasks = await read(streams, woken)
        Waker().wake(streams)
        while len(woken) < 1000:
            before = len(woken)
            await asyncio.sleep(0)  # as a request that has just come
            seen.append(len(woken) - before)
        await asyncio.gather(*tasks)
        assert max(seen) <= WOKEN_AT_ONCE
        assert woken == list(range(1000))

    asyncio.run(main())


def test_a_few_are_woken_at_once():
    async def main() -> None:
        streams, woken = [Stream() for _ in range(WOKEN_AT_ONCE)], []
        await read(streams, woken)
        Waker().wake(streams)
        await asyncio.sleep(0)
        assert len(woken) == WOKEN_AT_ONCE

    asyncio.run(main())


def test_what_comes_while_others_are_being_woken_is_woken_after_them():
    async def main() -> None:
        streams, woken = [Stream() for _ in range(500)], []
        tasks = await read(streams, woken)
        waker = Waker()
        waker.wake(streams[:300])
        await asyncio.sleep(0)
        waker.wake(streams[300:])
        waker.wake([])
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert woken == list(range(500))

    asyncio.run(main())


def test_a_loop_that_ended_in_between_holds_up_nobody_on_the_next():
    waker, woken = Waker(), []

    async def leave() -> None:
        waker.wake([Stream() for _ in range(100)])  # and ends before their turns

    async def main() -> None:
        streams = [Stream() for _ in range(3)]
        tasks = await read(streams, woken)
        waker.wake(streams)
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    asyncio.run(leave())
    asyncio.run(main())
    assert woken == [0, 1, 2]
