"""What a scrub reads, how fast, and when: tables."""

from __future__ import annotations

import random

import pytest

from cachefs.option_types import Hours
from cachefs.plan import scrub as plan
from cachefs.plan.scrub import GAP_PAGES, READ_PAGES, Piece, Read, next_start, paid_until, reads, wait_for_hours

NIGHT = Hours(22, 6)
DAY_S = 86400.0


def piece(segment: int, page: int, pages: int = 1) -> Piece:
    return Piece(segment, page, pages, segment * 1000 + page, b"")


def spans(found: list[Read]) -> list[tuple[int, int, int]]:
    return [(read.segment, read.page, read.pages) for read in found]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([piece(1, 5, 3)], [(1, 5, 3)]),
        ([piece(1, 4, 4), piece(1, 0, 4)], [(1, 0, 8)]),  # Whatever the order of their numbers.
        ([piece(2, 0), piece(1, 0)], [(1, 0, 1), (2, 0, 1)]),
        ([piece(1, 0), piece(1, 1 + GAP_PAGES)], [(1, 0, 2 + GAP_PAGES)]),  # A short hole is read over.
        ([piece(1, 0), piece(1, 2 + GAP_PAGES)], [(1, 0, 1), (1, 2 + GAP_PAGES, 1)]),
        ([piece(1, 0, 64), piece(1, 8, 8), piece(1, 64, 8)], [(1, 0, 72)]),  # One inside another: a damaged index.
    ],
)
def test_pieces_become_reads(pieces: list[Piece], expected: list[tuple[int, int, int]]) -> None:
    assert spans(reads(pieces)) == expected


def test_every_piece_is_in_one_read_and_no_read_is_too_long() -> None:
    rng = random.Random(1)
    pieces = [piece(rng.randrange(1, 4), rng.randrange(1 << 18), rng.randrange(1, 65)) for _ in range(4096)]
    found = reads(pieces)
    assert sorted(p for read in found for p in read.pieces) == sorted(pieces)
    assert [(r.segment, r.page) for r in found] == sorted((r.segment, r.page) for r in found)
    for read in found:
        assert read.pages <= READ_PAGES
        assert all(read.page <= p.page and p.page + p.pages <= read.page + read.pages for p in read.pieces)


def test_a_dense_window_is_read_in_full_reads() -> None:
    found = reads(piece(1, page, 16) for page in range(0, 4 * READ_PAGES, 16))
    assert spans(found) == [(1, i * READ_PAGES, READ_PAGES) for i in range(4)]


def test_a_rate_is_kept_and_idle_time_is_not_saved_up() -> None:
    assert paid_until(0.0, 1 << 30, 0, 7.0) == 7.0  # No bound.
    assert paid_until(10.0, 100, 100, 10.0) == 11.0
    assert paid_until(11.0, 100, 100, 10.5) == 12.0  # A debt stays.
    assert paid_until(9.5, 100, 100, 10.0) == 10.5  # A little behind: made up for.
    assert paid_until(0.0, 100, 100, 1000.0) == 1000.0 - plan.CREDIT_S + 1.0  # After a long pause: no burst.


@pytest.mark.parametrize(
    ("hours", "now", "expected"),
    [
        (None, 12 * 3600, 0.0),
        (NIGHT, 22 * 3600, 0.0),
        (NIGHT, 5 * 3600 + 3599, 0.0),
        (NIGHT, 6 * 3600, 16 * 3600.0),
        (NIGHT, 21 * 3600 + 3000, 600.0),
        (Hours(1, 2), 2 * 3600, 23 * 3600.0),
    ],
)
def test_hours(hours: Hours | None, now: int, expected: float) -> None:
    assert wait_for_hours(hours, now) == expected


@pytest.mark.parametrize(
    ("began", "interval", "under_way", "now", "expected"),
    [
        (1000.0, 7 * DAY_S, False, 2000.0, 1000.0 + 7 * DAY_S),
        (1000.0, 7 * DAY_S, True, 2000.0, 2000.0),  # Goes on.
        (0.0, 7 * DAY_S, False, 2000.0, 2000.0),  # There was none.
        (0.0, 0.0, False, 2000.0, float("inf")),  # Only when asked for,
        (1000.0, 0.0, True, 2000.0, 2000.0),  # and what was asked for is brought to an end.
        (9e9, DAY_S, False, 2000.0, 2000.0 + DAY_S),  # The clock was put back.
    ],
)
def test_when_a_run_is_due(began: float, interval: float, under_way: bool, now: float, expected: float) -> None:
    assert next_start(began, interval, under_way, now) == expected
