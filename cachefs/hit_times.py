"""When hits are timed: a few of them, now and then. Rule: whoever reads meanwhile pays nothing, and nobody at all
between two samples.
"""

from __future__ import annotations

import random
from typing import Final, Protocol

import trio

SAMPLE_HITS: Final = 50
EVERY_S: Final = 5.0  # On average: what happens in step with a clock is not to be met each time, or never.


class Timeable(Protocol):
    """What serves hits."""

    def time_hits(self, hits: int) -> None:
        """The next so many hits are timed."""
        ...


class HitTimes:
    """`run` is the task."""

    def __init__(self, filesystem: Timeable) -> None:
        self._filesystem = filesystem

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(EVERY_S * random.uniform(0.5, 1.5))
            self._filesystem.time_hits(SAMPLE_HITS)
