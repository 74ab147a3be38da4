"""What a scrub reads next, how fast, and when one is due. Rule: no clock and no I/O; the caller says what time
it is.

A disk is read best in its own order and in long pieces. Chunks get their numbers in the order in which they
are appended, so a window of neighbouring numbers lies close together, but for what compaction has moved; sorted
by place, it becomes a few reads that go forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

# 4 MiB at a time. With one more under way, reads of 1 to 8 MiB came to the same 0.9 to 1.3 GB/s; shorter ones cost
# more processor time (0.9 s for 3 GiB, and 0.5 s like this), longer ones are only longer for a guest to wait for.
READ_PAGES = 1024
# What was freed between two chunks is read over when it is no longer than this: a request costs as much.
GAP_PAGES = 16
# How far behind its rate a scrub may fall and still make up for it. Beyond that a pause is a pause.
CREDIT_S = 1.0


# ── Where to read ─────────────────────────────────────────────────────────────────────────────────────


class Piece(NamedTuple):
    """One chunk and where it lies, so that sorting is by place. `page` and `pages` are of the segment."""

    segment: int
    page: int
    pages: int
    chunk: int
    digest: bytes


class Read(NamedTuple):
    """One read of a segment, and the chunks that it brings."""

    segment: int
    page: int
    pages: int
    pieces: tuple[Piece, ...]


def reads(pieces: Iterable[Piece], pages_max: int = READ_PAGES, gap_pages: int = GAP_PAGES) -> list[Read]:
    """The reads that bring all `pieces`, in the order of the disk, none longer than `pages_max` (of which a piece
    must not have more)."""
    found: list[Read] = []
    run: list[Piece] = []
    begin = end = 0

    def close() -> None:
        if run:
            found.append(Read(run[0].segment, begin, end - begin, tuple(run)))
            run.clear()

    for piece in sorted(pieces):
        piece_end = piece.page + piece.pages
        if not run or (
            piece.segment != run[0].segment
            or piece.page > end + gap_pages
            or max(end, piece_end) - begin > pages_max
        ):
            close()
            begin = end = piece.page
        run.append(piece)
        end = max(end, piece_end)
    close()
    return found


# ── How fast ──────────────────────────────────────────────────────────────────────────────────────────


def paid_until(before_s: float, n: int, rate: int, now_s: float) -> float:
    """Until when a scrub is to pause after `n` more bytes, when it was paid up to `before_s`. `rate` is in bytes
    per second, 0 for no bound."""
    return now_s if rate == 0 else max(before_s, now_s - CREDIT_S) + n / rate


class Hours(Protocol):
    """Some hours of the day, of 0 to 23."""

    def include(self, hour: int) -> bool: ...


def wait_for_hours(hours: Hours | None, second_of_day: float) -> float:
    """Seconds until an hour begins in which work may be done; 0 when this is one. None are all hours."""
    hour, rest = divmod(second_of_day, 3600)
    for more in range(24):
        if hours is None or hours.include((int(hour) + more) % 24):
            return more * 3600 - rest if more else 0.0
    return float("inf")


# ── When ──────────────────────────────────────────────────────────────────────────────────────────────


def next_start(began_s: float, interval_s: float, under_way: bool, now_s: float) -> float:
    """When a run by interval is to begin, or to go on: an interval after the last one began (`began_s`, 0 for
    never), at once when one is under way, and never (infinity) with an interval of 0, unless a run is under
    way. A clock that was put back does not put a run off for longer than an interval."""
    if under_way or (began_s == 0 and interval_s > 0):
        return now_s
    return min(began_s, now_s) + interval_s if interval_s > 0 else float("inf")
