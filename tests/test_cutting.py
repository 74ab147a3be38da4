"""Where chunks begin and end: bounds, holes, and that a cut depends on nothing but the bytes."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from cachefs.plan.cutting import CHUNK_PAGES_MAX, CHUNK_PAGES_MIN, CUT_MASK, Piece, cut
from cachefs.plan.extents import PAGE
from tests.stores import examples, patchwork, random_bytes


def page(ends_a_chunk: bool, seed: int) -> bytes:
    """A random page whose hash ends a chunk, or not."""
    tried = (random_bytes(n, PAGE) for n in range(seed, seed + 1000))
    return next(p for p in tried if (not xxh3_64_intdigest(p) & CUT_MASK) == ends_a_chunk)


# A page is known by one letter: Z is zero and E ends a chunk; y is nearly zero.
LETTERS = {letter: page(False, ord(letter) * 1000) for letter in "abcd"}
LETTERS["E"] = page(True, 0)
LETTERS["Z"] = bytes(PAGE)
LETTERS["y"] = bytes(PAGE - 1) + b"w"
assert xxh3_64_intdigest(LETTERS["y"]) & CUT_MASK

scripts = st.lists(st.tuples(st.sampled_from("abcdEZy"), st.integers(1, 70)), max_size=8).map(
    lambda runs: "".join(letter * count for letter, count in runs)
) | st.text("abcdEZy", max_size=40)


def pages(script: str) -> memoryview:
    return memoryview(b"".join(LETTERS[letter] for letter in script))


def shapes(script: str) -> list[tuple[int, bool]]:
    return [(piece.pages, piece.is_hole) for piece in cut(pages(script))]


def test_nothing_is_cut_into_nothing() -> None:
    assert cut(memoryview(b"")) == []


def test_only_whole_pages_are_cut() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        cut(memoryview(bytes(PAGE + 1)))


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("Z", [(1, True)]),
        ("Z" * 300, [(300, True)]),
        ("y", [(1, False)]),
        ("abcE", [(4, False)]),
        ("abE" + "aaaa", [(7, False)]),  # Too early to end there.
        ("abcE" + "abcE", [(4, False), (4, False)]),
        ("a" * 64 + "a", [(64, False), (1, False)]),
        ("a" * 63 + "E" + "a", [(64, False), (1, False)]),
        ("aZZb", [(1, False), (2, True), (1, False)]),
        ("ZEZ", [(1, True), (1, False), (1, True)]),
        ("aaaE" + "Z", [(4, False), (1, True)]),
    ],
)
def test_cuts(script: str, wanted: list[tuple[int, bool]]) -> None:
    assert shapes(script) == wanted


@examples(200)
@given(scripts)
def test_pieces_cover_everything_in_order(script: str) -> None:
    at = 0
    for piece in cut(pages(script)):
        assert piece.start == at
        assert piece.pages > 0
        at += piece.pages
    assert at == len(script)


@examples(200)
@given(scripts)
def test_zero_pages_are_holes_and_nothing_else_is(script: str) -> None:
    for start, count, is_hole in cut(pages(script)):
        assert {letter == "Z" for letter in script[start : start + count]} == {is_hole}


@examples(200)
@given(scripts)
def test_chunks_keep_their_bounds(script: str) -> None:
    pieces = cut(pages(script))
    for piece, after in zip_longest(pieces, pieces[1:]):
        if piece.is_hole:
            assert after is None or not after.is_hole, "neighbouring holes are one"
            continue
        assert piece.pages <= CHUNK_PAGES_MAX
        ended = after is not None and not after.is_hole
        if ended:
            last = script[piece.start + piece.pages - 1]
            assert piece.pages == CHUNK_PAGES_MAX or (piece.pages >= CHUNK_PAGES_MIN and last == "E")


@examples(200)
@given(scripts, st.data())
def test_from_any_edge_on_the_cut_is_that_of_the_rest_alone(script: str, data: st.DataObject) -> None:
    pieces = cut(pages(script))
    if not pieces:
        return
    edge = data.draw(st.sampled_from([piece.start for piece in pieces]))
    rest = [Piece(p.start - edge, p.pages, p.is_hole) for p in pieces if p.start >= edge]
    assert cut(pages(script[edge:])) == rest


@examples(30)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(0, 100))
def test_what_is_inserted_moves_few_cuts(seed: int, inserted: int, at: int) -> None:
    before = random_bytes(seed, 400 * PAGE)
    after = before[: at * PAGE] + random_bytes(seed + 5000, inserted * PAGE) + before[at * PAGE :]

    def chunks(content: bytes) -> set[bytes]:
        return {content[p.start * PAGE : (p.start + p.pages) * PAGE] for p in cut(memoryview(content))}

    old, new = chunks(before), chunks(after)
    lost = sum(map(len, old - new)) // PAGE
    # The chunk that was torn, and those until the two cuts meet again: never 256 pages in all these examples.
    assert lost < 4 * CHUNK_PAGES_MAX


def test_the_average_is_near_the_16_pages_of_the_design() -> None:
    pieces = cut(memoryview(random.Random(1).randbytes(8192 * PAGE)))
    assert 14 < 8192 / len(pieces) < 22


def test_a_span_of_an_image_is_cut_the_same_from_any_buffer() -> None:
    content = patchwork(3, 1 << 20)
    assert cut(memoryview(bytearray(content))) == cut(memoryview(content))
    assert cut(memoryview(b"x" * PAGE + content)[PAGE:]) == cut(memoryview(content))
