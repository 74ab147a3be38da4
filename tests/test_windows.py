"""What is asked for: the link's measures, the reader's pattern, and the extent of one request. Tables for what
was decided, hypothesis for what must hold of any link and any reader."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan.extents import BLOCK, Extent, subtract
from cachefs.plan.windows import (
    EQUAL_COSTS,
    NEVER,
    RANDOM_FIRST,
    RANDOM_MAX,
    RANDOM_MIN,
    REORDER,
    SEQUENTIAL_MAX,
    Link,
    Pattern,
    request,
    window,
)
from tests.stores import examples

MIB = 1 << 20

# ── The link ──────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_measured_is_a_guess_of_one_window() -> None:
    assert Link().random_window == RANDOM_FIRST


@pytest.mark.parametrize(
    ("cost_s", "rate", "equal_bytes"),
    [
        (0.020, 312.5e6, 6_250_000),  # 2.5 Gbit/s beside Glance
        (0.050, 25e6, 1_250_000),  # 200 Mbit/s through a tunnel
        (0.020, 50e6, 1_000_000),
        (0.001, 1e6, 1_000),
        (0.0, 1e9, 0),
    ],
)
def test_a_random_window_costs_about_what_a_request_does(cost_s: float, rate: float, equal_bytes: int) -> None:
    found = Link(cost_s, rate).random_window
    exact = min(max(equal_bytes * EQUAL_COSTS, RANDOM_MIN), RANDOM_MAX)
    assert exact - 1 <= found < exact + BLOCK


@given(st.floats(0, 1e4), st.floats(0, 1e13))
@examples(200)
def test_any_link_gives_whole_blocks_within_the_bounds(cost_s: float, rate: float) -> None:
    found = Link(cost_s, rate).random_window
    assert RANDOM_MIN <= found <= RANDOM_MAX
    assert found % BLOCK == 0


def test_the_rate_is_that_of_the_last_bodies_together() -> None:
    link = Link()
    link.observe(0.040, 10 * MIB, 1.0)
    assert (link.cost_s, link.rate) == (0.040, 10 * MIB)
    link.observe(0.040, 2 * MIB, 1.0)
    assert link.rate == pytest.approx(6 * MIB)
    for _ in range(8):
        link.observe(0.040, 20 * MIB, 1.0)
    assert link.rate == pytest.approx(20 * MIB)


def test_the_cost_is_the_least_of_the_last_ones() -> None:
    """Most are measured behind the tail of the window before."""
    link = Link()
    for first_byte_s in (0.120, 0.040, 0.090):
        link.observe(first_byte_s, MIB, 0.04)
    assert link.cost_s == 0.040
    for _ in range(16):
        link.observe(0.080, MIB, 0.04)
    assert link.cost_s == 0.080


def test_ten_requests_teach_a_changed_link() -> None:
    link = Link(0.001, 1e9)
    for _ in range(10):
        link.observe(0.050, MIB, MIB / 25e6)
    assert link.cost_s == pytest.approx(0.050, rel=0.1)
    assert link.rate == pytest.approx(25e6)


def test_a_short_body_says_nothing_of_the_rate() -> None:
    link = Link(0.020, 50e6)
    link.observe(0.020, BLOCK, 1e-6)
    assert link.rate == 50e6


def test_bytes_that_waited_while_nobody_looked_are_no_rate_by_themselves() -> None:
    link = Link()
    link.observe(0.300, 9 * BLOCK, 0.0016)
    assert not link.rate
    link.observe(0.040, MIB, 0.0404)
    assert link.rate == pytest.approx((9 * BLOCK + MIB) / 0.0420)


def test_short_bodies_of_a_fast_link_are_measured_together() -> None:
    link = Link()
    link.observe(0.001, MIB // 2, MIB / 2 / 300e6)
    assert not link.rate
    link.observe(0.001, MIB // 2, MIB / 2 / 300e6)
    assert link.rate == pytest.approx(300e6)


def test_a_body_in_no_time_does_not_divide_by_it() -> None:
    link = Link()
    link.observe(0.0, MIB, 0.0)
    assert link.random_window == RANDOM_FIRST


# ── The reader ────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_who_just_opened_a_file_is_sequential() -> None:
    for offset in (0, MIB, 1 << 50):
        assert window(Link(), Pattern(), offset) == (RANDOM_FIRST, False)


@pytest.mark.parametrize("jump", [0, 1, -1, REORDER, -REORDER])
def test_going_on_where_the_window_ended_doubles_it(jump: int) -> None:
    pattern = Pattern()
    pattern.follow(Extent(8 * MIB, 12 * MIB), sequential=False)
    assert window(Link(), pattern, 12 * MIB + jump) == (8 * MIB, True)


@pytest.mark.parametrize("jump", [REORDER + 1, -REORDER - 1, 1 << 40])
def test_a_jump_is_random_whatever_was_read_before(jump: int) -> None:
    pattern = Pattern()
    pattern.follow(Extent((1 << 41) - 64 * MIB, 1 << 41), sequential=True)
    assert window(Link(), pattern, (1 << 41) + jump) == (RANDOM_FIRST, False)


def test_windows_grow_to_the_maximum_and_stay_there() -> None:
    pattern, link, at, sizes = Pattern(), Link(), 0, []
    for _ in range(12):
        want, sequential = window(link, pattern, at)
        pattern.follow(Extent(at, at + want), sequential)
        at += want
        sizes.append(want // MIB)
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 32, 32, 32, 32, 32]


def test_a_window_cut_short_does_not_make_the_next_one_small() -> None:
    pattern = Pattern()
    pattern.follow(Extent(0, 32 * MIB), sequential=True)
    pattern.follow(Extent(32 * MIB, 32 * MIB + BLOCK), sequential=True)
    assert window(Link(), pattern, 32 * MIB + BLOCK) == (SEQUENTIAL_MAX, True)


def test_half_way_through_a_sequential_window_is_the_time_for_the_next() -> None:
    pattern = Pattern()
    pattern.follow(Extent(8 * MIB, 16 * MIB), sequential=True)
    assert pattern.mark == 12 * MIB


def test_random_reading_never_reads_ahead() -> None:
    pattern = Pattern()
    pattern.follow(Extent(8 * MIB, 16 * MIB), sequential=False)
    assert pattern.mark == NEVER


@given(st.data())
@examples(100)
def test_a_random_reader_never_asks_for_more_than_the_bound(data: st.DataObject) -> None:
    link = Link(data.draw(st.floats(0, 10)), data.draw(st.floats(1, 1e12)))
    pattern = Pattern()
    for _ in range(20):
        offset = data.draw(st.integers(0, 1 << 40)) // BLOCK * BLOCK
        if pattern.is_next(offset):
            continue
        want, sequential = window(link, pattern, offset)
        assert not sequential
        assert want <= RANDOM_MAX
        pattern.follow(Extent(offset, offset + want), sequential)


# ── The request ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("miss", "absent", "want", "expected"),
    [
        # Nothing around is here: the window.
        ((4, 5), [(0, 100)], 16, (4, 20)),
        # It ends where something is here, or on its way.
        ((4, 5), [(0, 9), (10, 100)], 16, (4, 9)),
        # What the reader waits for is asked for, however small the window.
        ((4, 30), [(0, 100)], 16, (4, 30)),
        ((4, 30), [(0, 12), (14, 100)], 16, (4, 12)),
        # The reader's own first block came meanwhile.
        ((4, 30), [(6, 100)], 16, None),
        ((4, 5), [], 16, None),
    ],
)
def test_a_request_begins_at_the_miss_and_ends_at_what_is_there(
    miss: tuple[int, int], absent: list[tuple[int, int]], want: int, expected: tuple[int, int] | None
) -> None:
    def blocks(of: tuple[int, int]) -> Extent:
        return Extent(of[0] * BLOCK, of[1] * BLOCK)

    found = request(blocks(miss), [blocks(a) for a in absent], want * BLOCK)
    assert found == (blocks(expected) if expected else None)


_extents = st.tuples(st.integers(0, 200), st.integers(1, 60)).map(lambda e: Extent(e[0], e[0] + e[1]))


@given(_extents, st.lists(_extents, max_size=5), st.integers(1, 100))
@examples(300)
def test_a_request_asks_for_nothing_that_is_there(miss: Extent, there: list[Extent], want: int) -> None:
    absent = subtract(Extent(0, 400), there)
    found = request(miss, absent, want)
    if found is None:
        assert any(e.start <= miss.start < e.end for e in there)
        return
    assert found.start == miss.start
    assert found.length > 0
    assert not any(e.meets(found) for e in there)
    assert found.end <= max(miss.end, miss.start + want)
