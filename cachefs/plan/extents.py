"""Half-open ranges of bytes, and what follows from their alignment. Rule: no I/O, no state.

Units: every offset and length is in bytes unless its name says pages or blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

PAGE = 4096
"""The unit of cutting and of placement in segments: what a hypervisor's disk and the kernel's cache use."""

BLOCK = 64 * 1024
"""The unit of fetching and of presence (design §2)."""


class Extent(NamedTuple):
    """The bytes `start <= x < end`. Empty when they are equal; never reversed."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def meets(self, other: Extent) -> bool:
        """Whether the two share a byte."""
        return self.start < other.end and other.start < self.end

    def clamp(self, other: Extent) -> Extent:
        """The part of this that lies in `other`; empty (at an edge of `other`) when none does."""
        start = min(max(self.start, other.start), other.end)
        return Extent(start, min(max(self.end, start), other.end))


def floor(value: int, unit: int) -> int:
    return value - value % unit


def ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def aligned(extent: Extent, unit: int, size: int) -> Extent:
    """The smallest extent of whole units that holds `extent`, cut at `size` (the end of the view)."""
    return Extent(floor(extent.start, unit), min(ceil(extent.end, unit), size))


def coalesce(extents: Iterable[Extent], gap: int = 0) -> list[Extent]:
    """Sorted, disjoint extents that hold all of `extents`; those at most `gap` bytes apart become one."""
    merged: list[Extent] = []
    begin = reached = -1  # Of the one that is growing; of very many extents most are part of another.
    for start, end in sorted(extents):
        if end <= start:
            continue
        if begin >= 0 and start <= reached + gap:
            if end > reached:
                reached = end
            continue
        if begin >= 0:
            merged.append(Extent(begin, reached))
        begin, reached = start, end
    if begin >= 0:
        merged.append(Extent(begin, reached))
    return merged


def subtract(extent: Extent, holes: Iterable[Extent]) -> list[Extent]:
    """What of `extent` is in none of `holes`, in order."""
    rest: list[Extent] = []
    at = extent.start
    for hole in coalesce(holes):
        cut = hole.clamp(extent)
        if not cut.length:
            continue
        if cut.start > at:
            rest.append(Extent(at, cut.start))
        at = max(at, cut.end)
    if at < extent.end:
        rest.append(Extent(at, extent.end))
    return rest


def pieces(extent: Extent, unit: int) -> Iterator[Extent]:
    """`extent` cut at every multiple of `unit`."""
    at = extent.start
    while at < extent.end:
        end = min(floor(at, unit) + unit, extent.end)
        yield Extent(at, end)
        at = end
