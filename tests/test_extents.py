"""Ranges of bytes, against sets of bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan.extents import BLOCK, PAGE, Extent, aligned, ceil, coalesce, floor, pieces, subtract
from tests.stores import examples

numbers = st.integers(0, 60)
units = st.sampled_from((1, 2, 4, 16))


@st.composite
def extents(draw: st.DrawFn) -> Extent:
    start = draw(numbers)
    return Extent(start, start + draw(st.integers(0, 20)))


def members(*some: Extent) -> set[int]:
    return {x for e in some for x in range(*e)}


def test_units() -> None:
    assert (PAGE, BLOCK) == (4096, 65536)


@given(extents(), extents())
def test_extents_meet_when_they_share_a_byte(one: Extent, other: Extent) -> None:
    if one.length and other.length:
        assert one.meets(other) == bool(members(one) & members(other))


@given(extents(), extents())
def test_clamp_keeps_what_both_have(one: Extent, other: Extent) -> None:
    both = one.clamp(other)
    assert members(both) == members(one) & members(other)
    assert other.start <= both.start <= both.end <= other.end


@given(numbers, units)
def test_floor_and_ceil_are_the_nearest_multiples(value: int, unit: int) -> None:
    assert floor(value, unit) % unit == ceil(value, unit) % unit == 0
    assert value - unit < floor(value, unit) <= value <= ceil(value, unit) < value + unit


@given(extents(), units, numbers)
def test_aligned_holds_the_extent_and_ends_with_the_view(extent: Extent, unit: int, size: int) -> None:
    inside = extent.clamp(Extent(0, size))
    grown = aligned(inside, unit, size)
    assert members(inside) <= members(grown) <= members(Extent(0, size))
    assert grown.start % unit == 0
    assert grown.end % unit == 0 or grown.end == size


@given(st.lists(extents(), max_size=8))
def test_coalesced_extents_are_the_same_bytes_sorted_and_apart(some: list[Extent]) -> None:
    merged = coalesce(some)
    assert members(*merged) == members(*some)
    assert all(e.length for e in merged)
    assert all(a.end < b.start for a, b in pairwise(merged))


@given(st.lists(extents(), max_size=8), st.integers(0, 10))
def test_coalescing_over_gaps_leaves_only_larger_ones(some: list[Extent], gap: int) -> None:
    merged = coalesce(some, gap)
    assert members(*some) <= members(*merged)
    assert all(a.end + gap < b.start for a, b in pairwise(merged))
    assert all(added.length <= gap for e in merged for added in subtract(e, some))


@examples(200)
@given(extents(), st.lists(extents(), max_size=8))
def test_subtract_leaves_what_is_in_no_hole(extent: Extent, holes: list[Extent]) -> None:
    rest = subtract(extent, holes)
    assert members(*rest) == members(extent) - members(*holes)
    assert rest == coalesce(rest)


@given(extents(), units)
def test_pieces_cover_and_cross_no_multiple(extent: Extent, unit: int) -> None:
    parts = list(pieces(extent, unit))
    assert [x for part in parts for x in range(*part)] == list(range(*extent))
    assert all(part.length and floor(part.start, unit) == floor(part.end - 1, unit) for part in parts)


@pytest.mark.parametrize("empty", [Extent(0, 0), Extent(7, 7)])
def test_empty_extents_are_no_pieces(empty: Extent) -> None:
    assert list(pieces(empty, 4)) == []
    assert coalesce([empty]) == []
    assert subtract(empty, [Extent(0, 9)]) == []
