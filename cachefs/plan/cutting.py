"""Where landed bytes are cut into chunks and holes. Rule: the cut depends on the bytes alone, never on where
they lie, so that the same files at other offsets give the same chunks.

A page whose xxh3_64 has its low bits zero ends a chunk. The bounds are those of design §5: measured on two
builds of one Debian root disk, page-aligned chunks of 64 KiB within 4 MiB share 75 %, where fixed blocks of
64 KiB share 4 %. The hash only places the cuts: that it can be forged costs deduplication, not bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from cachefs.plan.extents import PAGE

CHUNK_PAGES_MIN = 4
CHUNK_PAGES_MAX = 64
# After the minimum of 4 pages, one page in 16 ends a chunk: about 16 pages, 64 KiB, with the bounds.
CUT_MASK = 0xF

ZERO_PAGE = bytes(PAGE)
_WORDS = PAGE // 8


class Piece(NamedTuple):
    """`pages` pages from page `start` (counted within what was cut): a chunk, or zeros."""

    start: int
    pages: int
    is_hole: bool


def cut(data: memoryview) -> list[Piece]:
    """Cuts `data` (whole pages) into chunks and holes that cover it without a gap, in order."""
    if len(data) % PAGE:
        raise ValueError("data to cut must be whole pages")
    pieces: list[Piece] = []
    words = data.cast("Q")
    begin = 0  # First page of the run under way.
    in_hole = False
    for page in range(len(data) // PAGE):
        at = page * PAGE
        # The first word says of nearly every page that it is not zero; comparing the whole costs a copy.
        zero = not words[page * _WORDS] and bytes(data[at : at + PAGE]) == ZERO_PAGE
        if zero != in_hole:
            if page > begin:
                pieces.append(Piece(begin, page - begin, in_hole))
            begin, in_hole = page, zero
        if zero:
            continue
        length = page + 1 - begin
        if length >= CHUNK_PAGES_MIN and (
            not xxh3_64_intdigest(data[at : at + PAGE]) & CUT_MASK or length == CHUNK_PAGES_MAX
        ):
            pieces.append(Piece(begin, length, False))
            begin = page + 1
    total = len(data) // PAGE
    if total > begin:
        pieces.append(Piece(begin, total - begin, in_hole))
    return pieces
