"""When cycles are looked for: in virtual time, with Python's own collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock

from cachefs.collector import EVERY_S, LOOK_S, PATIENCE_S, YOUNG, Collector
from cachefs.leisure import Leisure


class Cycle:
    def __init__(self) -> None:
        self.itself = self


class Reads:
    """Guests whose reads are hits: `more` tells whether there were some since somebody asked."""

    waiting = 0

    def __init__(self) -> None:
        self.more, self._count = False, 0

    async def until_calm(self, at_most_s: float) -> None: ...

    def __call__(self) -> int:
        self._count += self.more
        return self._count


def garbage() -> weakref.ref[Cycle]:
    return weakref.ref(Cycle())


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    assert gc.get_freeze_count() == 0


def test_cycles_go_when_no_guest_reads() -> None:
    reads = Reads()

    async def main() -> None:
        collector = Collector(Leisure(reads, reads))
        async with trio.open_nursery() as nursery:
            await nursery.start(collector.run)
            assert gc.get_threshold()[0] == YOUNG
            lost = garbage()
            reads.more = True
            await trio.sleep(EVERY_S)
            assert lost() is not None, "guests read"
            reads.more = False
            await trio.sleep(2 * LOOK_S)
            assert lost() is None
            assert collector.collections == 1
            # What was set aside while it was in use is found as well, the next time.
            cycle = Cycle()
            lost = weakref.ref(cycle)
            await trio.sleep(EVERY_S + LOOK_S)
            assert (lost() is cycle, collector.collections) == (True, 2)
            del cycle
            await trio.sleep(EVERY_S + LOOK_S)
            assert lost() is None
            nursery.cancel_scope.cancel()

    before = gc.get_threshold()
    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert gc.get_threshold() == before


def test_guests_that_never_pause_do_not_keep_them_for_ever() -> None:
    reads = Reads()
    reads.more = True

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(Collector(Leisure(reads, reads)).run)
            lost = garbage()
            await trio.sleep(PATIENCE_S + 2 * LOOK_S)
            assert lost() is None
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
