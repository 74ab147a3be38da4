"""Which segments are worth writing anew. Rule: pure, and never for less than it costs: a segment that is more than
half alive is left alone.

Freed chunks are holes, so a segment with little life left costs a descriptor, an inode and a long list of extents,
not space. Both are bounded: there are at most twice as many segments as the living bytes need, and `SPARE` more;
and none that is less than half alive keeps more than `EXTENTS_MAX` extents (ext4 holds four in an inode, and looks
the rest up in a tree; above some thousands deleting and punching become slow).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cachefs.store.format import SEGMENT_SIZE, SegmentNo

SPARE = 8
EXTENTS_MAX = 4096
# What one pass moves at most. Another follows.
AT_ONCE = 8


class Sealed(NamedTuple):
    """A segment to which nothing is appended: its length and what lives of it, in bytes; its extents on disk."""

    end: int
    live: int
    extents: int


def segments_max(live: int) -> int:
    """How many segments there may be for `live` bytes of chunks."""
    return 2 * -(-live // SEGMENT_SIZE) + SPARE


def worth_moving(sealed: Mapping[SegmentNo, Sealed], live: int) -> list[SegmentNo]:
    """Those whose chunks are to be moved now, the least alive first, at most `AT_ONCE`. `live` are the bytes of
    all chunks, also those in the segment that is appended to."""
    thin = sorted(
        (segment for segment, now in sealed.items() if 0 < now.live <= now.end // 2),
        key=lambda segment: sealed[segment].live,
    )
    too_many = max(0, len(sealed) + 1 - segments_max(live))
    return [segment for i, segment in enumerate(thin) if i < too_many or sealed[segment].extents > EXTENTS_MAX][
        :AT_ONCE
    ]
