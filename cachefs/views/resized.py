"""A disk with a larger end: the raw view, and zeros behind it. Rule: holds no bytes of its own, and what lies in
the disk is read exactly as the disk's own file is.
"""

from __future__ import annotations

from cachefs.blocks import Blocks
from cachefs.store.view import READ_MAX, StoredView
from cachefs.views import Buffer
from cachefs.views.stored import StoredFile

_ZEROS = memoryview(bytes(READ_MAX))


class ResizedFile(StoredFile):
    """One opened `resized/<uuid>/<size>`. `size` in bytes, not less than that of `disk`."""

    __slots__ = ()

    def __init__(self, disk: StoredView, blocks: Blocks, size: int) -> None:
        assert size >= disk.size, "nothing of the disk is cut off"
        super().__init__(disk, blocks)
        self.size = size

    def _past_end_now(self, offset: int, length: int) -> Buffer | None:
        if offset < self._end or length > READ_MAX:
            return None  # Where the two meet, or more than anybody reads at once.
        return _ZEROS[: max(0, min(length, self.size - offset))]

    async def read(self, offset: int, length: int) -> Buffer:
        """See `View.read`."""
        length = max(0, min(length, self.size - offset))
        if offset >= self._end:
            return bytes(length)
        inside = min(length, self._end - offset)
        if inside == length:
            return await super().read(offset, inside)
        return bytes(await super().read(offset, inside)) + bytes(length - inside)
