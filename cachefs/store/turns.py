"""How long work leaves room for reads that go on meanwhile. Rule: it only waits, and knows nothing of the work.

Python runs one thread at a time. A thread that computes without end keeps the loop from a hit for a switch
interval each time when the loop has asked the kernel for something, which a hit does three times. So what is long,
and not urgent, is done on the loop itself, in short steps between which reads are answered; and while what has to
be in a thread goes on beside it, because it waits for the disk, threads change more often.

Measured while 2 GiB are evicted (`make bench ARGS="--quick evict"`), several times in turn: when all was in
threads, 1.0 to 1.5 GiB/s and a 99th percentile of warm reads of 4.4 to 6.2 times the one without; like this, 1.4
to 1.9 and 2.7 to 4.4. Threads that slept after every 40 µs besides gave 2.2 to 2.8, and half the rate.
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
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._began_s = perf_counter()


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
