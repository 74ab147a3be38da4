"""What is known so far of a file's bytes. Rule: a byte that was not fed is asked for, never guessed.

A parser over `Pieces` is a plain function from the beginning to its answer. Where a byte is missing it ends in
`Lacking`, and is run again from the beginning when that byte is there.
"""

from __future__ import annotations

import struct
from typing import Any

from cachefs.errors import FormatError
from cachefs.plan.extents import Extent


class Lacking(Exception):
    """No failure but a question: `extent`, which lies inside the file, is needed first. Never leaves the
    inspection."""

    def __init__(self, extent: Extent) -> None:
        super().__init__(extent)
        self.extent = extent


class Pieces:
    """The pieces that were fed of a file of `size` bytes. `held`: how many bytes that are."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        self._pieces: list[tuple[Extent, bytes]] = []

    def add(self, extent: Extent, data: bytes) -> None:
        assert len(data) == extent.length, "a piece is what its extent says"
        self._pieces.append((extent, data))
        self.held += len(data)

    def get(self, start: int, length: int, what: str) -> bytes:
        """The bytes of `what`, in our own words. Raises FormatError when the file ends before they do, and
        Lacking."""
        extent = Extent(start, start + length)
        if extent.end > self.size:
            raise FormatError(f"its {what} lies outside the file")
        for held, data in self._pieces:
            if held.start <= extent.start and extent.end <= held.end:
                return data[extent.start - held.start : extent.end - held.start]
        raise Lacking(extent)

    def unpack(self, form: str, start: int, what: str) -> tuple[Any, ...]:
        """The fields at `start`, as `struct` has them. Raises as `get` does."""
        return struct.unpack(form, self.get(start, struct.calcsize(form), what))
