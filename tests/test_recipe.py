"""Recipes and span maps, against a plain list of pages."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan.extents import BLOCK, PAGE, Extent
from cachefs.store.format import Chunk, ChunkId, Entry, Kind, Recipe, SegmentNo
from cachefs.store.recipe import (
    ABSENT,
    HOLE,
    NO_CHUNK,
    Run,
    SpanMap,
    absent_recipe,
    absent_runs,
    pages_of,
    present_bytes,
    replaced,
)
from tests.stores import examples

BLOCK_PAGES = BLOCK // PAGE

# One page of a span: ("absent", 0), ("hole", 0), or a chunk's id and which page of the chunk it is.
Page = tuple[str, int] | tuple[int, int]


@st.composite
def entries(draw: st.DrawFn, pages: int) -> list[Entry]:
    """Entries that cover `pages` pages; chunk ids tell their length: id % 100."""
    made: list[Entry] = []
    while pages:
        count = draw(st.integers(1, min(pages, 64)))
        kind = draw(st.sampled_from(Kind))
        chunk = ChunkId(draw(st.integers(1, 5)) * 100 + count) if kind is Kind.CHUNK else NO_CHUNK
        made.append(Entry(kind, count, chunk))
        pages -= count
    return made


def normal(some: list[Entry]) -> Recipe:
    """With neighbours merged, by `replaced` itself: it is checked against the pages below."""
    return replaced(absent_recipe(sum(e.pages for e in some)), 0, sum(e.pages for e in some), some)


recipes = st.integers(1, 256).flatmap(entries).map(normal)


def flat(some: Recipe | list[Entry]) -> list[Page]:
    pages: list[Page] = []
    for kind, count, chunk in some:
        for n in range(count):
            pages.append((chunk, n) if kind is Kind.CHUNK else (kind.name.lower(), 0))
    return pages


def place(chunk: ChunkId) -> Chunk | None:
    """Chunks 1xx are gone, 2xx rotten, 3xx and 4xx side by side in a segment, 5xx in another."""
    pages = chunk % 100
    match chunk // 100:
        case 1:
            return None
        case 5:
            return Chunk(SegmentNo(2), 1000, pages, bytes(16), 1)
        case n:
            start = 5000 - pages if n == 3 else 5000
            return Chunk(SegmentNo(1), start, pages, bytes(16), 1, flags=int(n == 2))


def usable(chunk: ChunkId) -> bool:
    found = place(chunk)
    return found is not None and not found.rotten


def is_missing(page: Page) -> bool:
    return page[0] == "absent" or (isinstance(page[0], int) and not usable(ChunkId(page[0])))


def source(page: Page) -> tuple[int, int]:
    """Where a page's bytes are: segment and offset."""
    if is_missing(page):
        return ABSENT, 0
    if page[0] == "hole":
        return HOLE, 0
    assert isinstance(page[0], int)
    chunk = place(ChunkId(page[0]))
    assert chunk is not None
    return chunk.segment, chunk.offset + page[1] * PAGE


@given(st.integers(1, 256).flatmap(entries))
def test_merging_changes_no_page(some: list[Entry]) -> None:
    recipe = normal(some)
    assert flat(recipe) == flat(some)
    assert pages_of(recipe) == len(flat(some))
    assert not any(a.kind is b.kind is not Kind.CHUNK for a, b in pairwise(recipe))


@examples(300)
@given(recipes, st.data())
def test_replaced_pages_are_the_new_ones_and_the_others_stay(recipe: Recipe, data: st.DataObject) -> None:
    total = pages_of(recipe)
    # Edges: those of entries, and any page of what is no chunk.
    edges, at = {0, total}, 0
    for entry in recipe:
        edges.update((at, at + entry.pages) if entry.kind is Kind.CHUNK else range(at, at + entry.pages + 1))
        at += entry.pages
    first, end = sorted(data.draw(st.lists(st.sampled_from(sorted(edges)), min_size=2, max_size=2)))
    if first == end:
        return
    new = data.draw(entries(end - first))
    old = flat(recipe)
    result = replaced(recipe, first, end - first, new)
    assert flat(result) == old[:first] + flat(new) + old[end:]
    assert not any(a.kind is b.kind is not Kind.CHUNK for a, b in pairwise(result))


def test_a_chunk_is_never_kept_in_part() -> None:
    recipe = (Entry(Kind.CHUNK, 4, ChunkId(304)),)
    with pytest.raises(AssertionError, match="part of a chunk"):
        replaced(recipe, 1, 3, absent_recipe(3))


@given(recipes)
def test_absent_runs_are_the_pages_to_fetch(recipe: Recipe) -> None:
    runs = list(absent_runs(recipe, usable))
    missing = {page for first, count in runs for page in range(first, first + count)}
    assert missing == {n for n, page in enumerate(flat(recipe)) if is_missing(page)}
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))


@given(recipes, st.integers(0, 256 * PAGE))
def test_present_bytes_are_counted_up_to_the_views_end(recipe: Recipe, size: int) -> None:
    named = [page[0] != "absent" for page in flat(recipe)]
    assert present_bytes(recipe, size) == sum(
        max(0, min(size, (n + 1) * PAGE) - n * PAGE) for n, is_named in enumerate(named) if is_named
    )


@examples(300)
@given(recipes, st.data())
def test_a_map_locates_every_byte(recipe: Recipe, data: st.DataObject) -> None:
    span_map = SpanMap.of(recipe, place)
    pages = flat(recipe)
    assert span_map.end == len(pages) * PAGE
    start = data.draw(st.integers(0, span_map.end - 1))
    length = data.draw(st.integers(1, span_map.end - start))
    at = start
    for run in span_map.locate(start, length):
        assert run.length > 0
        for byte in {at, at + run.length // 2, at + run.length - 1}:
            segment, offset = source(pages[byte // PAGE])
            assert run.segment == segment
            if segment > 0:
                assert run.offset + byte - at == offset + byte % PAGE
        at += run.length
    assert at == start + length


def test_chunks_side_by_side_are_one_run() -> None:
    recipe = (Entry(Kind.CHUNK, 3, ChunkId(303)), Entry(Kind.CHUNK, 2, ChunkId(402)))
    assert list(SpanMap.of(recipe, place).locate(0, 5 * PAGE)) == [Run(1, 4997 * PAGE, 5 * PAGE)]


def test_a_chunk_of_another_length_than_its_record_says_is_absent() -> None:
    recipe = (Entry(Kind.CHUNK, 4, ChunkId(305)),)
    assert SpanMap.of(recipe, place).absent(Extent(0, 1)) == [Extent(0, 4 * PAGE)]


@examples(300)
@given(recipes, st.data())
def test_absent_blocks_are_those_with_a_missing_byte(recipe: Recipe, data: st.DataObject) -> None:
    span_map = SpanMap.of(recipe, place)
    start = data.draw(st.integers(0, span_map.end - 1))
    end = data.draw(st.integers(start + 1, span_map.end))
    found = span_map.absent(Extent(start, end))
    blocks = range(start // BLOCK, (end - 1) // BLOCK + 1)
    missing = {n // BLOCK_PAGES for n, page in enumerate(flat(recipe)) if is_missing(page)}
    assert {b for e in found for b in range(e.start // BLOCK, -(-e.end // BLOCK))} == missing & set(blocks)
    assert all(e.end % BLOCK == 0 or e.end == span_map.end for e in found)
    assert all(a.end < b.start for a, b in pairwise(found))


def test_maps_are_equal_by_content() -> None:
    recipe = (Entry(Kind.CHUNK, 3, ChunkId(303)), Entry(Kind.HOLE, 2, NO_CHUNK))
    assert SpanMap.of(recipe, place) == SpanMap.of(recipe, place)
    assert SpanMap.of(recipe, place) != SpanMap.of(absent_recipe(5), place)
    assert SpanMap.of(recipe, place) != recipe
