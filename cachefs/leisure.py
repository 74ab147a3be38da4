"""When work in the background does its next bit: guests first. Rule: it knows that guests read, never what they
read.

Guests that wait for a miss are given way to altogether, for a while. Guests whose reads are hits wait for nobody,
but each bit of work takes the loop's core, and Python's lock, from them: so work that could go on for minutes at
full speed rests after each bit while they read, three times as long as the bit took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

# While guests wait, nothing begins for so long at most.
COURTESY_S = 5.0
# A quarter of one core while guests read.
REST_FACTOR = 3.0
# Guests that made a pause of less are still reading.
STILL_S = 0.25


class Guests(Protocol):
    """Those whose reads wait. `Blocks` is one."""

    @property
    def waiting(self) -> int:
        """How many reads wait at this moment."""
        ...

    async def until_calm(self, at_most_s: float) -> None:
        """Returns when none does, or after `at_most_s`."""
        ...


class Leisure:
    """The pace of one who works in the background. `reads` counts the reads of all guests so far."""

    def __init__(self, guests: Guests, reads: Callable[[], int]) -> None:
        self._guests, self._reads = guests, reads
        self._seen = reads()
        self._seen_s = -float("inf")

    @property
    def guests_read(self) -> bool:
        """Whether a guest reads, or did a moment ago."""
        reads = self._reads()
        if reads != self._seen or self._guests.waiting:
            self._seen, self._seen_s = reads, trio.current_time()
        return trio.current_time() < self._seen_s + STILL_S

    async def pause(self, worked_s: float) -> None:
        """Returns when the next bit of work may begin; the last one took `worked_s`. Always a checkpoint."""
        if self.guests_read:
            await trio.sleep(worked_s * REST_FACTOR)
        else:
            await trio.lowlevel.checkpoint()
        await self._guests.until_calm(COURTESY_S)
