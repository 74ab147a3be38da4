"""How long work leaves room for reads that go on meanwhile. Rule: it only waits, and knows nothing of the work.

Python runs one thread at a time. A thread that computes without end keeps the loop from a hit for a switch
interval each time when the loop has asked the kernel for something, which a hit does three times. So what is long,
and not urgent, is done on the loop itself, in short steps between which reads are answered; and while what has to
be in a thread goes on beside it, because it waits for the disk, threads change more often.

A thread pauses now and then besides, so that whoever waits for the lock has it at once; and after each step the
loop makes as many passes as a request needs, or it would meet a step in each of them.

Measured while 2 GiB are evicted (`make bench ARGS="--quick evict"`), several times in turn, as GiB/s and the 99th
percentile of warm reads beside the one without: all in threads, 1.0 to 1.5 and 4.4 to 6.2; in steps, with one pass
after each, 1.2 to 1.9 and 2.7 to 4.4; with three, and looking up with pauses and not beside a commit, 1.0 to 1.4
and 1.8 to 2.9.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import TypeVar

import trio

T = TypeVar("T")

# About one hit. Shorter ones would cost more in changing than they do.
STEP_S = 40e-6
# In so many passes of the loop a request is seen, read and answered; each would wait for a step else.
PASSES = 3
# A thread that is long at work beside reads stops so long now and then, and lets go of the lock by itself.
PAUSE_S = 20e-6
# How long a thread keeps Python's lock when another wants it. For always `daemon` has a longer one: each change
# costs both, and much of what is fetched goes through threads.
SWITCH_INTERVAL_S = 50e-6
# Work of a thread that nobody waits for stands still so long after each millisecond or two of it.
REST_S = 0.002

_quick = 0
_before_s = 0.0


class OnLoop:
    """Work on the loop, in steps that are each much shorter than STEP_S. Cancelling waits for its end."""

    def __init__(self) -> None:
        self._began_s = perf_counter()

    async def run(self, steps: Generator[None, None, T]) -> T:
        """What `steps` returns."""
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            if perf_counter() - self._began_s > STEP_S:
                for _ in range(PASSES):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                self._began_s = perf_counter()


class Pauses:
    """Of one piece of work in a thread: one after `every` so many bits of it, while threads are to change often
    (see `changing_often`). A bit that asks LMDB for something lets go of the lock by itself, for a moment only."""

    def __init__(self, every: int) -> None:
        self._every = self._left = every

    def may_come(self) -> None:
        """A bit of the work is done."""
        self._left -= 1
        if not self._left:
            self._left = self._every
            if _quick:
                sleep(PAUSE_S)


@contextmanager
def changing_often(*, wanted: bool = True) -> Iterator[None]:
    """Threads change often for the length of a `with`, which may hold others, if that is `wanted`. On the loop."""
    global _quick, _before_s
    if not wanted:
        yield
        return
    if not _quick:
        _before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
    _quick += 1
    try:
        yield
    finally:
        _quick -= 1
        if not _quick:
            sys.setswitchinterval(_before_s)


def rest() -> None:
    """Leaves Python's lock to others for REST_S. In a thread."""
    sleep(REST_S)
