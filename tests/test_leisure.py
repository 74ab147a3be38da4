"""How work in the background makes room for guests, in virtual time."""

from __future__ import annotations

import pytest
import trio

from cachefs.leisure import COURTESY_S, REST_FACTOR, STILL_S, Leisure
from tests.flow import virtual_time


class Guests:
    """Some that read, and some that wait."""

    def __init__(self) -> None:
        self.reads = self.waiting = 0
        self.calm = trio.Event()

    async def until_calm(self, at_most_s: float) -> None:
        with trio.move_on_after(at_most_s):
            while self.waiting:
                await self.calm.wait()


async def paused(leisure: Leisure, worked_s: float) -> float:
    began_s = trio.current_time()
    await leisure.pause(worked_s)
    return trio.current_time() - began_s


@virtual_time
async def test_alone_it_rests_never() -> None:
    guests = Guests()
    leisure = Leisure(guests, lambda: guests.reads)
    assert await paused(leisure, 10.0) < 0.001


@virtual_time
async def test_while_guests_read_it_takes_a_quarter() -> None:
    guests = Guests()
    leisure = Leisure(guests, lambda: guests.reads)
    guests.reads += 1
    assert await paused(leisure, 0.01) == pytest.approx(0.01 * REST_FACTOR, abs=0.001)
    # One who is between two reads still reads, and one who went away does not.
    assert await paused(leisure, 0.01) == pytest.approx(0.01 * REST_FACTOR, abs=0.001)
    await trio.sleep(STILL_S)
    assert await paused(leisure, 0.01) < 0.001


@virtual_time
async def test_guests_that_wait_are_waited_for_and_not_for_ever() -> None:
    guests = Guests()
    leisure = Leisure(guests, lambda: guests.reads)
    guests.waiting = 1
    assert await paused(leisure, 0.0) == pytest.approx(COURTESY_S, abs=0.01)
    async with trio.open_nursery() as nursery:

        async def served() -> None:
            await trio.sleep(0.5)
            guests.waiting = 0
            guests.calm.set()

        nursery.start_soon(served)
        assert await paused(leisure, 0.0) == pytest.approx(0.5, abs=0.01)
