"""Where a qcow2 keeps each byte of its disk. Rule: it never fetches: what it lacks it names (`Need`), and what it
is given (`feed`) it keeps within a bound, believing no entry of a table before it is used.

The disk is described by an L1 table, whose entries name L2 tables, whose entries name clusters. Tables are
handled in slices of at most 64 KiB, so that one read needs little of a large table. A slice of L1 is checked whole
when it is fed; entries of L2 are checked as reads touch them: a bad one refuses every read that needs it, in
whatever order tables came or were forgotten.

What qemu would read and this refuses: entries with reserved bits, and tables or clusters that begin beyond the
end of the file (zeros, to qemu) or lie in the header, the L1 or refcount table, or in an L2 table that the same
slice of L1 names. The tail of the last cluster may be missing, and is zeros, as to qemu.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from functools import reduce
from itertools import groupby, pairwise
from operator import or_
from typing import NamedTuple

from cachefs.errors import FormatError
from cachefs.formats.qcow2_header import ENTRY, SECTOR, SUBCLUSTERS, Header
from cachefs.plan.extents import Extent

SLICE_MAX = 64 * 1024
"""Of a table, in bytes: with 64 KiB clusters a whole L2 table, which describes 512 MiB."""

LOOKUP_MAX = 64 << 20
"""Of the disk in one lookup, in bytes, where one L2 slice does not describe more."""

TABLES_MAX = 16 << 20
"""What one image's tables may occupy: with 64 KiB clusters those of 128 GiB."""

# A lookup of LOOKUP_MAX finds all its tables (1 MiB of them at 512-byte clusters), and leaves room for others.
_TABLES_MIN = 4 << 20
# Of a slice besides its entries: an object, a place in the order.
_SLICE_OVERHEAD = 256

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


class Zero(NamedTuple):
    """`length` zero bytes of the disk."""

    length: int


class Data(NamedTuple):
    """`length` bytes of the disk, as they are in the file."""

    file_offset: int
    length: int


class Compressed(NamedTuple):
    """`length` bytes of the disk: from `within` of the one cluster that is compressed in `file_length` bytes of
    the file, or in fewer (the format counts sectors)."""

    file_offset: int
    file_length: int
    within: int
    length: int


Piece = Zero | Data | Compressed


class Need(NamedTuple):
    """The extents of the file to feed before the question can be answered; each is fed by itself."""

    extents: tuple[Extent, ...]


class _L1Slice(NamedTuple):
    """The L2 tables that a slice of the L1 table names: in its order (0: none), and sorted."""

    tables: array[int]
    ordered: array[int]


class _Pieces:
    """Collects the pieces of one lookup: cuts them to `wanted`, an extent of the disk, and joins neighbours."""

    def __init__(self, header: Header, wanted: Extent) -> None:
        self._file_size = header.file_size
        self._start, self._end = wanted
        self.found: list[Piece] = []

    def zero(self, start: int, end: int) -> None:
        """The bytes from `start` to `end` of the disk are zeros."""
        length = min(end, self._end) - max(start, self._start)
        if length <= 0:
            return
        if self.found and isinstance(last := self.found[-1], Zero):
            self.found[-1] = Zero(last.length + length)
        else:
            self.found.append(Zero(length))

    def data(self, start: int, end: int, host: int) -> None:
        """They are in the file from `host`; zeros from its end on."""
        held = max(min(end, start + self._file_size - host), start)
        begin, length = max(start, self._start), min(held, self._end) - max(start, self._start)
        host += begin - start
        if length > 0:
            if self.found and isinstance(last := self.found[-1], Data) and last.file_offset + last.length == host:
                self.found[-1] = Data(last.file_offset, last.length + length)
            else:
                self.found.append(Data(host, length))
        self.zero(held, end)

    def compressed(self, start: int, end: int, packed: Extent) -> None:
        """They are the cluster that is compressed in `packed`."""
        begin, length = max(start, self._start), min(end, self._end) - max(start, self._start)
        if length > 0:
            self.found.append(Compressed(packed.start, packed.length, begin - start, length))


class Mapping:
    """The tables of one image, as far as they are known. They take at most `tables_max` bytes (but for what Python
    adds); those that were not needed for longest are forgotten, and asked for again."""

    def __init__(self, header: Header, tables_max: int = TABLES_MAX) -> None:
        if tables_max < _TABLES_MIN:
            raise ValueError(f"{tables_max} bytes do not hold the tables of one lookup")
        self.header = header
        self._cluster = header.cluster_size
        self._slice = min(header.cluster_size, SLICE_MAX)
        self._slice_entries = self._slice // header.entry_size
        self._slice_cover = self._slice_entries * self._cluster
        self._slices_per_table = self._cluster // self._slice
        self._tables_max = tables_max
        self._tables: OrderedDict[int, array[int] | _L1Slice] = OrderedDict()
        self.tables_bytes = 0

    @property
    def lookup_max(self) -> int:
        """The longest range of the disk that one lookup takes."""
        return max(LOOKUP_MAX, self._slice_cover)

    # ── Questions ─────────────────────────────────────────────────────────────────────────────────────

    def lookup(self, offset: int, length: int) -> list[Piece] | Need:
        """What `length` bytes of the disk from `offset` are made of, in order, or what is needed to tell.

        Once every extent of a Need was fed, with no other call between, the same question has its answer or
        (once: L1 before L2) another Need. Raises FormatError for a table that says what cannot be, ValueError
        for a range outside the disk or longer than `lookup_max`.
        """
        wanted = Extent(offset, offset + length)
        if offset < 0 or length < 0 or wanted.end > self.header.size or length > self.lookup_max:
            raise ValueError(f"{length} bytes from {offset} of a disk of {self.header.size}")
        needs: list[Extent] = []
        pieces = _Pieces(self.header, wanted)
        for number in range(offset // self._slice_cover, -(-wanted.end // self._slice_cover)):
            self._slice_pieces(number, wanted, pieces, needs)
        return Need(tuple(needs)) if needs else pieces.found

    def _slice_pieces(self, number: int, wanted: Extent, pieces: _Pieces, needs: list[Extent]) -> None:
        """Adds what L2 slice `number` says of `wanted`, or what is needed to read it."""
        index, part = divmod(number, self._slices_per_table)
        l1_at = self.header.l1.start + index * ENTRY // SLICE_MAX * SLICE_MAX
        l1 = self._recall(l1_at)
        if not isinstance(l1, _L1Slice):
            need = Extent(l1_at, min(l1_at + SLICE_MAX, self.header.l1.end))
            if not needs or needs[-1] != need:
                needs.append(need)
            return None
        start = number * self._slice_cover
        table = l1.tables[index - (l1_at - self.header.l1.start) // ENTRY]
        if not table:
            return pieces.zero(start, start + self._slice_cover)
        at = table + part * self._slice
        entries = self._recall(at)
        if not isinstance(entries, array):
            return needs.append(Extent(at, at + self._slice))
        first = max(wanted.start - start, 0) // self._cluster
        last = min(-(-(wanted.end - start) // self._cluster), self._slice_entries)
        read = self._read_extended if self.header.extended else self._read_standard
        if not needs:  # Else there is another round, which tells all.
            read(entries, range(first, last), start, l1, pieces)
        return None

    def _recall(self, at: int) -> array[int] | _L1Slice | None:
        found = self._tables.get(at)
        if found is not None:
            self._tables.move_to_end(at)
        return found

    # ── Tables ────────────────────────────────────────────────────────────────────────────────────────

    def l1_extents(self) -> Iterator[Extent]:
        """The whole L1 table as extents to feed: worth fetching when the image is opened."""
        l1 = self.header.l1
        return (Extent(at, min(at + SLICE_MAX, l1.end)) for at in range(l1.start, l1.end, SLICE_MAX))

    def feed(self, file_offset: int, data: bytes | memoryview) -> None:
        """The bytes of the file from `file_offset`: one extent that a Need named, or `l1_extents`.

        Raises FormatError for an L1 table that says what cannot be, ValueError for anything but such an extent.
        """
        l1 = self.header.l1
        in_l1 = l1.start <= file_offset < l1.end
        begin = l1.start if in_l1 else 0
        unit = SLICE_MAX if in_l1 else self._slice
        whole = min(unit, l1.end - file_offset) if in_l1 else unit
        if (file_offset - begin) % unit or len(data) != whole:
            raise ValueError(f"{len(data)} bytes from {file_offset} are no slice of a table")
        entries = array("Q", bytes(data))
        if sys.byteorder == "little":
            entries.byteswap()
        self._forget(file_offset)
        self._tables[file_offset] = self._l1_slice(entries) if in_l1 else entries
        self.tables_bytes += self._footprint(self._tables[file_offset])
        while self.tables_bytes > self._tables_max:
            self._forget(next(iter(self._tables)))

    def _forget(self, at: int) -> None:
        if (table := self._tables.pop(at, None)) is not None:
            self.tables_bytes -= self._footprint(table)

    @staticmethod
    def _footprint(table: array[int] | _L1Slice) -> int:
        words = len(table.tables) + len(table.ordered) if isinstance(table, _L1Slice) else len(table)
        return words * ENTRY + _SLICE_OVERHEAD

    def _l1_slice(self, entries: array[int]) -> _L1Slice:
        """Checks a slice of L1, by few passes: it may have 8192 entries."""
        wrong = _L1_RESERVED | (self._cluster - 1)
        if reduce(or_, entries, 0) & wrong:
            entry = next(entry for entry in entries if entry & wrong)
            raise FormatError(f"an L1 entry ({entry:#x}) has reserved bits, or names no cluster")
        tables = array("Q", [entry & _OFFSET for entry in entries])
        ordered = array("Q", sorted(filter(None, tables)))
        if ordered and ordered[-1] + self._cluster > self.header.file_size:
            raise FormatError(f"an L2 table at byte {ordered[-1]} is not within the file")
        if any(one == following for one, following in pairwise(ordered)):
            raise FormatError("two parts of the disk share one L2 table")
        for extent in self.header.metadata:
            if self._holds_table(ordered, extent):
                raise FormatError("an L2 table overlaps the header, the L1 table or the refcount table")
        return _L1Slice(tables, ordered)

    def _holds_table(self, ordered: array[int], extent: Extent) -> bool:
        """Whether one of these L2 tables has a byte in `extent`."""
        before = bisect_left(ordered, extent.end)
        return before > 0 and ordered[before - 1] + self._cluster > extent.start

    # ── Entries ───────────────────────────────────────────────────────────────────────────────────────

    def _read_standard(self, entries: array[int], which: range, start: int, l1: _L1Slice, pieces: _Pieces) -> None:
        """Adds what `which` entries of an L2 slice say; the slice's first cluster is at `start` of the disk."""
        cluster, at, stop = self._cluster, which.start, which.stop
        while at < stop:
            entry = entries[at]
            begin, first = start + at * cluster, at
            at += 1
            if entry & _COMPRESSED:
                pieces.compressed(begin, begin + cluster, self._packed(entry, l1))
                continue
            # Clusters of one kind that go on in the file where the last one ends: checked and added as one.
            step = cluster if entry & _OFFSET else 0
            following = entry + step
            while at < stop and entries[at] == following:
                at += 1
                following += step
            end = begin + (at - first) * cluster
            host = self._host(entry)
            if entry & _ZERO or not host:
                pieces.zero(begin, end)
            else:
                self._check_data(host, end - begin, l1)
                pieces.data(begin, end, host)

    def _read_extended(self, entries: array[int], which: range, start: int, l1: _L1Slice, pieces: _Pieces) -> None:
        """The same where a bitmap follows each entry: of subclusters that are in the file, and that are zeros."""
        cluster, at, stop = self._cluster, which.start, which.stop
        while at < stop:
            entry, bitmap = entries[2 * at], entries[2 * at + 1]
            begin, first = start + at * cluster, at
            at += 1
            if entry & _COMPRESSED:
                if bitmap:
                    raise FormatError("a compressed cluster has subclusters")
                pieces.compressed(begin, begin + cluster, self._packed(entry, l1))
                continue
            host = self._host(entry)
            held = self._held(host, bitmap)
            alike = stop if held in (0, _ALL_SUBCLUSTERS) else at
            step = cluster if host else 0
            following = entry + step
            while at < alike and entries[2 * at] == following and entries[2 * at + 1] == bitmap:
                at += 1
                following += step
            end = begin + (at - first) * cluster
            if not held:
                pieces.zero(begin, end)
                continue
            self._check_data(host, end - begin, l1)
            if held == _ALL_SUBCLUSTERS:
                pieces.data(begin, end, host)
            else:
                self._add_subclusters(begin, host, held, pieces)

    def _held(self, host: int, bitmap: int) -> int:
        """The subclusters, as bits, that are in the file; all others are zeros."""
        allocated, zeros = bitmap & _ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
        if allocated & zeros or (allocated and not host):
            raise FormatError(f"a bitmap of subclusters ({bitmap:#x}) contradicts itself or its cluster")
        return allocated

    def _add_subclusters(self, begin: int, host: int, held: int, pieces: _Pieces) -> None:
        size = self._cluster // SUBCLUSTERS
        for is_held, group in groupby(range(SUBCLUSTERS), key=lambda number: bool(held >> number & 1)):
            numbers = list(group)
            start, end = numbers[0] * size, (numbers[-1] + 1) * size
            if is_held:
                pieces.data(begin + start, begin + end, host + start)
            else:
                pieces.zero(begin + start, begin + end)

    def _host(self, entry: int) -> int:
        """Where the cluster of an entry is in the file; 0 for nowhere."""
        host = entry & _OFFSET
        if entry & _L2_RESERVED or host % self._cluster:
            raise FormatError(f"an L2 entry ({entry:#x}) has reserved bits, or names no cluster")
        if entry & _ZERO and (self.header.version < 3 or self.header.extended):
            raise FormatError(f"an L2 entry ({entry:#x}) has a flag that images of its kind do not have")
        return host

    def _check_data(self, host: int, length: int, l1: _L1Slice) -> None:
        last = host + length - self._cluster
        if last >= self.header.file_size:
            raise FormatError(f"a cluster at byte {last} is beyond the end of the file")
        self._check_free(Extent(host, host + length), l1)

    def _check_free(self, extent: Extent, l1: _L1Slice) -> None:
        """Refuses clusters that overlap what is known to lie there."""
        for table in self.header.metadata:
            if extent.meets(table):
                what = "the header, the L1 table or the refcount table"
                raise FormatError(f"a cluster at byte {extent.start} overlaps {what}")
        if self._holds_table(l1.ordered, extent):
            raise FormatError(f"a cluster at byte {extent.start} overlaps an L2 table")

    def _packed(self, entry: int, l1: _L1Slice) -> Extent:
        """Where the bytes of a compressed cluster are: from any byte on, to the end of a sector or of the file."""
        count_bits = self.header.cluster_bits - 8
        shift = 62 - count_bits
        host = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << count_bits) - 1)) + 1
        packed = Extent(host, min(host - host % SECTOR + sectors * SECTOR, self.header.file_size))
        if packed.start >= packed.end:
            raise FormatError(f"a compressed cluster at byte {host} is beyond the end of the file")
        # Writers that count one sector too many do no harm: the last one may be another's.
        self._check_free(Extent(host, max(host + 1, packed.end - SECTOR)), l1)
        return packed
