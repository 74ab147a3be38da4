"""A stored file that notes which blocks were read of it first, for a boot trace. Rule: it reads as the file under
it does; when the recording ends the handle goes on with that file, and nothing of this stays in its way.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from cachefs.plan.extents import BLOCK
from cachefs.plan.trace import AT_MAX
from cachefs.views import Buffer, View


class RecordingFile:
    """One opened file, of which the store has the bytes before `end`. `touches`: blocks of them in the order in
    which they were first read, each with the tenths of a second since `began_s`. `on_many` is called when there
    are `look_at` of them."""

    __slots__ = ("_began_s", "_end", "_file_now", "_is_over", "_on_many", "file", "look_at", "size", "touches")

    def __init__(
        self, file: View, end: int, began_s: float, look_at: int, on_many: Callable[[RecordingFile], None]
    ) -> None:
        self.file, self.size, self._end = file, file.size, end
        self.look_at = look_at
        self.touches: dict[int, int] = {}
        self._file_now = file.read_now
        self._began_s, self._on_many = began_s, on_many
        self._is_over = False

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """See `View.read_now`."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first not in self.touches or last not in self.touches or last > first + 1:
            self._note(offset, length)
        return self._file_now(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        """See `View.read`."""
        self._note(offset, length)
        return await self.file.read(offset, length)

    def end(self) -> None:
        """From now on it notes nothing more."""
        self._is_over = True

    @property
    def is_over(self) -> bool:
        return self._is_over

    def _note(self, offset: int, length: int) -> None:
        end = min(offset + length, self._end)
        if self._is_over or end <= offset:
            return
        touches = self.touches
        for block in range(offset // BLOCK, (end - 1) // BLOCK + 1):
            if block not in touches:
                touches[block] = min(int((trio.current_time() - self._began_s) * 10), AT_MAX)
        if len(touches) >= self.look_at:
            self._on_many(self)
