"""When Python looks for objects that only hold one another. Rule: never through all of memory while guests read.

With 10,000 images known that takes 40 to 60 ms, in which nobody is answered, and Python does it whenever it likes.
Here young objects are looked at as ever, in a millisecond at most, and the rest once in a while when no guest
reads. What is alive then is set aside (`gc.freeze`), so that the next look is over new objects alone.
"""

from __future__ import annotations

import gc

import trio

from cachefs.leisure import Leisure

LOOK_S, EVERY_S = 10.0, 600.0
# Guests that never pause: then only what is new is looked through.
PATIENCE_S = 3600.0
# New objects that start a look at the youngest; of the next generation after so many; of the last never.
YOUNG, MIDDLE, OLD = 2_000, 20, 1_000_000


class Collector:
    """`run` is the task."""

    def __init__(self, leisure: Leisure) -> None:
        self._leisure = leisure
        self.collections = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; Python does as it likes again then."""
        before = gc.get_threshold()
        gc.set_threshold(YOUNG, MIDDLE, OLD)
        gc.freeze()  # Modules, and what was loaded from the store.
        task_status.started()
        try:
            due_s = trio.current_time() + LOOK_S  # The first listing will have come.
            while True:
                await trio.sleep(LOOK_S)
                calm = not self._leisure.guests_read
                if trio.current_time() < due_s + (0 if calm else PATIENCE_S):
                    continue
                if calm:
                    gc.unfreeze()
                gc.collect()
                gc.freeze()
                self.collections += 1
                due_s = trio.current_time() + EVERY_S
        finally:
            gc.unfreeze()
            gc.set_threshold(*before)
