"""The header of a qcow2 image, read with distrust. Rule: what it says is believed when the file can hold it and
this project can follow it; everything else is refused, by number, never guessed.

Only what reading the active disk needs is kept: internal snapshots, refcounts and bitmaps are not looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntFlag

from cachefs.errors import FormatError
from cachefs.plan.extents import Extent, ceil

MAGIC = b"QFI\xfb"

HEAD_MAX = 64 * 1024
"""Bytes of the file from its start that hold the header and its extensions: qemu-img's take less than 1 KiB."""

SIZE_MAX = 64 << 40
"""Of the disk, in bytes: as large as the volumes that clouds sell, and 16 Mi spans of 4 MiB in the store."""

# qemu's own bounds: 2 PB of disk at 64 KiB clusters.
L1_BYTES_MAX = 32 << 20
REFCOUNT_TABLE_BYTES_MAX = 8 << 20
CLUSTER_BITS_MIN, CLUSTER_BITS_MAX = 9, 21
REFCOUNT_ORDER_MAX = 6

SECTOR = 512
SUBCLUSTERS = 32
ENTRY = 8
"""Bytes of an entry of the L1 table, and of the L2 tables but for extended ones."""

# magic, version, backing file's name (offset, bytes), cluster bits, size, encryption, L1 (entries, offset),
# refcount table (offset, clusters), snapshots (number, offset)
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
# features: incompatible, compatible, autoclear; refcount order, header length
_V3 = struct.Struct(">QQQII")
_V3_LENGTH_MIN = _V2.size + _V3.size
_COMPRESSION_AT = _V3_LENGTH_MIN
_EXTENSION = struct.Struct(">II")

_EXTENSION_END = 0
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_ENCRYPTION = 0x0537BE77

_AUTOCLEAR_RAW_DATA_FILE = 1 << 1


class Feature(IntFlag):
    """Those that a reader must know."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


# Dirty says that refcounts may be wrong, which only writers use.
_FOLLOWED = Feature.DIRTY | Feature.COMPRESSION | Feature.EXTENDED_L2


class Compression(Enum):
    """How an image's compressed clusters are. The values are the format's."""

    ZLIB = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Header:
    """What the tables of an image are, all checked against the size of its file. In bytes.

    `size`: of the disk, whole sectors, as qemu rounds it. `l1`: the entries of the L1 table that this size
    needs. `metadata`: where neither an L2 table nor a cluster can be.
    """

    version: int
    size: int
    file_size: int
    cluster_bits: int
    extended: bool
    compression: Compression
    l1: Extent
    metadata: tuple[Extent, ...]

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_size(self) -> int:
        """Of an entry of an L2 table."""
        return 2 * ENTRY if self.extended else ENTRY

    @property
    def table_entries(self) -> int:
        """Of one L2 table, which fills a cluster."""
        return self.cluster_size // self.entry_size

    @property
    def table_cover(self) -> int:
        """How much of the disk one L2 table describes."""
        return self.table_entries << self.cluster_bits

    @classmethod
    def parse(cls, data: bytes, file_size: int) -> Header:
        """Reads the first bytes of a file of `file_size`: HEAD_MAX of them, or all.

        Raises FormatError for what is refused, ValueError for less `data` than that.
        """
        if len(data) < min(HEAD_MAX, file_size):
            raise ValueError(f"{len(data)} bytes are not the head of a file of {file_size}")
        if data[: len(MAGIC)] != MAGIC:
            raise FormatError("it is not a qcow2 image")
        if len(data) < _V2.size:
            raise FormatError("its header is cut short")
        (_, version, backing, _, cluster_bits, size, encryption, l1_entries, l1_at, *rest) = _V2.unpack_from(data)
        refcounts_at, refcount_clusters, _, _ = rest
        if version not in (2, 3):
            raise FormatError(f"its qcow2 version {version} is neither 2 nor 3")
        if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
            raise FormatError(f"a cluster size of 2^{cluster_bits} bytes is not within 2^9 and 2^21")
        if backing:
            raise FormatError("it has a backing file")
        if encryption:
            raise FormatError(f"it is encrypted (method {encryption})")
        if size > SIZE_MAX:
            raise FormatError(f"a disk of {size} bytes is larger than {SIZE_MAX}")
        cluster_size = 1 << cluster_bits
        length, features, compression = _V2.size, Feature(0), Compression.ZLIB
        if version == 3:
            length, features, compression = _version_3(data, cluster_size)
        _check_extensions(data[length : min(cluster_size, HEAD_MAX)])
        extended = Feature.EXTENDED_L2 in features
        if extended and cluster_size < SUBCLUSTERS * SECTOR:
            raise FormatError(f"clusters of {cluster_size} bytes have no subclusters")
        cover = cluster_size // (2 * ENTRY if extended else ENTRY) * cluster_size
        l1 = _l1(l1_at, l1_entries, ceil(size, cover) // cover)
        metadata = [Extent(0, cluster_size), l1, _refcounts(refcounts_at, refcount_clusters, cluster_size)]
        for table in metadata[1:]:
            _check_table(table, cluster_size, file_size)
        if l1.meets(metadata[2]):
            raise FormatError("its L1 and refcount tables overlap")
        used = Extent(l1.start, l1.start + ceil(size, cover) // cover * ENTRY)
        disk = size - size % SECTOR
        return cls(version, disk, file_size, cluster_bits, extended, compression, used, tuple(metadata))


def _version_3(data: bytes, cluster_size: int) -> tuple[int, Feature, Compression]:
    """The header's length, its features and how its clusters are compressed."""
    if len(data) < _V3_LENGTH_MIN:
        raise FormatError("its header is cut short")
    incompatible, _, autoclear, refcount_order, length = _V3.unpack_from(data, _V2.size)
    if length < _V3_LENGTH_MIN or length % 8 or length > min(cluster_size, len(data)):
        raise FormatError(f"a header of {length} bytes is too short, too long or no multiple of 8")
    if refcount_order > REFCOUNT_ORDER_MAX:
        raise FormatError(f"refcounts of 2^{refcount_order} bits are wider than 64")
    if incompatible & Feature.DATA_FILE or autoclear & _AUTOCLEAR_RAW_DATA_FILE:
        raise FormatError("its data is in another file")
    if incompatible & Feature.CORRUPT:
        raise FormatError("it is marked as corrupt")
    if unknown := incompatible & ~int(_FOLLOWED):
        raise FormatError(f"it has features that are not known here ({unknown:#x})")
    features = Feature(incompatible)
    kind = data[_COMPRESSION_AT] if length > _COMPRESSION_AT else Compression.ZLIB.value
    if kind not in (Compression.ZLIB.value, Compression.ZSTD.value):
        raise FormatError(f"its compression type {kind} is not known here")
    compression = Compression(kind)
    if (compression is not Compression.ZLIB) != (Feature.COMPRESSION in features):
        raise FormatError("its compression type contradicts its features")
    return length, features, compression


def _check_extensions(area: bytes) -> None:
    """Refuses what names another file or keys. `area`: from the header's end to that of its cluster, as far as it
    is known: whoever needs more than HEAD_MAX for extensions is refused."""
    at = 0
    while at + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, at)
        at += _EXTENSION.size
        # Also of the end, which has no length: to qemu as well.
        if at + length > len(area):
            raise FormatError(f"a header extension of {length} bytes does not fit in the header")
        if kind == _EXTENSION_END:
            return
        if kind == _EXTENSION_DATA_FILE:
            raise FormatError("it names a data file")
        if kind == _EXTENSION_ENCRYPTION:
            raise FormatError("it holds the keys of an encrypted image")
        at += ceil(length, 8)


def _l1(at: int, entries: int, needed: int) -> Extent:
    if entries * ENTRY > L1_BYTES_MAX:
        raise FormatError(f"an L1 table of {entries} entries is larger than {L1_BYTES_MAX} bytes")
    if entries < needed:
        raise FormatError(f"an L1 table of {entries} entries is too small for its disk, which needs {needed}")
    return Extent(at, at + entries * ENTRY)


def _refcounts(at: int, clusters: int, cluster_size: int) -> Extent:
    """Never read; but an image without them is none, and nothing else may lie there."""
    if not clusters or clusters * cluster_size > REFCOUNT_TABLE_BYTES_MAX:
        raise FormatError(f"a refcount table of {clusters} clusters is none, or too large")
    return Extent(at, at + clusters * cluster_size)


def _check_table(table: Extent, cluster_size: int, file_size: int) -> None:
    if not table.length:
        return  # The L1 table of an empty disk.
    if not table.start or table.start % cluster_size:
        raise FormatError(f"a table at byte {table.start} is not at a cluster of its own")
    if table.end > file_size:
        raise FormatError(f"a table ends at byte {table.end}, beyond the end of the file")
