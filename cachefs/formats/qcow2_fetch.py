"""In which requests the file's bytes for a range of the disk come best. Rule: it orders what `Mapping` answers,
and fetches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cachefs.formats.qcow2 import Compressed, Data, Mapping, Need, Piece, Zero
from cachefs.formats.qcow2_header import Header
from cachefs.plan.extents import Extent, ceil

FRONT_MAX = 512 << 10
"""Bytes that may be fetched for a guess: some cost of a request on a link of 200 Mbit/s."""


class Placed(NamedTuple):
    """A piece that is in the file, and the byte of the disk that it begins at."""

    disk_offset: int
    piece: Data | Compressed

    @property
    def file_extent(self) -> Extent:
        piece = self.piece
        length = piece.file_length if isinstance(piece, Compressed) else piece.length
        return Extent(piece.file_offset, piece.file_offset + length)


@dataclass(frozen=True)
class Fetch:
    """One request for `extent` of the file, and the pieces that lie in it whole, in the order of the file."""

    extent: Extent
    parts: tuple[Placed, ...]

    @property
    def is_wasteful(self) -> bool:
        """Whether less than half of it is wanted."""
        return sum(part.file_extent.length for part in self.parts) < self.extent.length // 2


@dataclass(frozen=True)
class Plan:
    """A range of the disk: the zeros in it, in order, and the requests for all else, the first needed first."""

    zeros: tuple[Extent, ...]
    fetches: tuple[Fetch, ...]

    @property
    def bytes(self) -> int:
        """What is fetched in all."""
        return sum(fetch.extent.length for fetch in self.fetches)


def front(header: Header) -> Extent | None:
    """Where the disk's first cluster is found: its L1 table, and what writers put right behind that, an L2 table
    and the cluster itself. A guess, which saves asking for one after the other. None where it would be more than
    FRONT_MAX, with large clusters or an L1 table of a huge disk; and for a disk without a byte."""
    start = header.l1.start
    end = min(ceil(header.l1.end, header.cluster_size) + 2 * header.cluster_size, header.file_size)
    return Extent(start, end) if header.size and end - start <= FRONT_MAX else None


def sequential_plan(offset: int, pieces: Iterable[Piece], gap_max: int, fetch_max: int) -> Plan:
    """Few large requests for `pieces`, which begin at `offset` of the disk. What is not wanted in between is
    fetched as well where it is at most `gap_max` bytes long. None is larger than `fetch_max` or its only piece.
    Best asked for whole clusters: a part of a compressed one costs as much."""
    zeros: list[Extent] = []
    fetches: list[Fetch] = []
    parts: list[Placed] = []
    extent = Extent(0, 0)
    for part in sorted(_placed(offset, pieces, zeros), key=_in_file):
        start, end = part.file_extent
        if parts and start <= extent.end + gap_max and max(end, extent.end) - extent.start <= fetch_max:
            extent = Extent(extent.start, max(end, extent.end))
        else:
            if parts:
                fetches.append(Fetch(extent, tuple(parts)))
            parts, extent = [], Extent(start, end)
        parts.append(part)
    if parts:
        fetches.append(Fetch(extent, tuple(parts)))
    fetches.sort(key=lambda fetch: min(part.disk_offset for part in fetch.parts))
    return Plan(tuple(zeros), tuple(fetches))


def reach(pieces: Iterable[Piece], cost: int) -> int:
    """How many bytes of the disk, from where `pieces` begin, cost at most `cost` bytes of the file."""
    reached = 0
    for piece in pieces:
        if isinstance(piece, Compressed):
            cost -= piece.file_length
        elif isinstance(piece, Data):
            cost -= piece.length
        if cost < 0:
            break
        reached += piece.length
    return reached


def everything(mapping: Mapping) -> Iterator[Need | Placed]:
    """All of the disk that is in the file, in the order of the disk. A Need that it yields is to be fed before it
    is asked on: else it yields it again."""
    at = 0
    while at < mapping.header.size:
        length = min(mapping.lookup_max - at % mapping.lookup_max, mapping.header.size - at)
        found = mapping.lookup(at, length)
        if isinstance(found, Need):
            yield found
            continue
        yield from _placed(at, found, [])
        at += length


def file_order(placed: Iterable[Placed], pieces_max: int) -> list[Placed] | None:
    """The pieces as one pass over the file meets them. None when there are more than `pieces_max`, of some 200
    bytes each: then the file is better stored first."""
    kept: list[Placed] = []
    for part in placed:
        if len(kept) == pieces_max:
            return None
        kept.append(part)
    kept.sort(key=_in_file)
    return kept


def _in_file(part: Placed) -> int:
    return part.piece.file_offset


def _placed(offset: int, pieces: Iterable[Piece], zeros: list[Extent]) -> Iterator[Placed]:
    """The pieces with their places on the disk; those of zeros go to `zeros`."""
    for piece in pieces:
        if isinstance(piece, Zero):
            zeros.append(Extent(offset, offset + piece.length))
        else:
            yield Placed(offset, piece)
        offset += piece.length
