"""A disk with a larger end: the raw view, and zeros behind it. Rule: holds no bytes of its own."""

from __future__ import annotations

from cachefs.store.content import READ_MAX
from cachefs.views import Buffer, View

_ZEROS = memoryview(bytes(READ_MAX))


class ResizedView:
    """One opened `resized/<uuid>/<size>`. `size` in bytes, not less than that of `base`."""

    __slots__ = ("_base", "_base_now", "_base_size", "size")

    def __init__(self, base: View, size: int) -> None:
        assert size >= base.size, "nothing of the disk is cut off"
        self._base, self.size = base, size
        self._base_now, self._base_size = base.read_now, base.size

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """See `View.read_now`."""
        if offset + length <= self._base_size:
            return self._base_now(offset, length)
        if offset < self._base_size or length > READ_MAX:
            return None  # Where the two meet, or more than anybody reads at once.
        return _ZEROS[: max(0, min(length, self.size - offset))]

    async def read(self, offset: int, length: int) -> Buffer:
        """See `View.read`."""
        length = max(0, min(length, self.size - offset))
        base = self._base_size
        if offset >= base:
            return bytes(length)
        inside = min(length, base - offset)
        return bytes(await self._base.read(offset, inside)) + bytes(length - inside)
