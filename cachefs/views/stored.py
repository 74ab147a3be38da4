"""A file that the store has a view of: an image as Glance has it, or the disk inside. Rule: nothing here
interprets its bytes.
"""

from __future__ import annotations

from cachefs.blocks import Blocks
from cachefs.plan.windows import NEVER, Pattern
from cachefs.store.view import READ_MAX, StoredView
from cachefs.views import Buffer


class StoredFile:
    """One opened file. Remembers how it is being read, to read ahead."""

    __slots__ = ("_blocks", "_end", "_pattern", "_stored", "size")

    def __init__(self, stored: StoredView, blocks: Blocks) -> None:
        self._stored, self._blocks = stored, blocks
        self._pattern = Pattern()
        self.size = self._end = stored.size

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """See `View.read_now`."""
        if offset + length > self._end:
            return self._past_end_now(offset, length)
        if offset >= self._pattern.mark:
            self._pattern.mark = NEVER
            self._blocks.reached_mark(self._stored, self._pattern, offset)
        return self._stored.read_now(offset, length) if length <= READ_MAX else None

    def _past_end_now(self, offset: int, length: int) -> Buffer | None:
        """`read_now` of what does not end before the store's bytes do."""
        return self.read_now(offset, self._end - offset) if offset < self._end else b""

    async def read(self, offset: int, length: int) -> Buffer:
        """See `View.read`."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        arrived = self._blocks.arrived(self._stored, offset, length)
        if arrived is not None:
            return arrived
        return await self._blocks.read(self._stored, offset, length, self._pattern)
