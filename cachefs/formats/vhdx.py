"""VHDX (Hyper-V): its region table and its metadata. Rule: answers with a size or refuses; no block is translated
here.

The first region table is read and no other, because that is the one QEMU reads. Its checksums are left to QEMU,
which opens no file without them; so is the log, which QEMU refuses to replay on a file that is read-only.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple
from uuid import UUID

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces
from cachefs.plan.extents import Extent

MIB = 1 << 20
REGION_TABLE, TABLE_BYTES = 192 * 1024, 64 * 1024
ENTRIES_MAX = 2047
# The table and, in every file seen, its items behind it: one piece instead of six.
METADATA_PIECE = 128 * 1024

BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le

FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
PAGE_83 = UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
LOGICAL_SECTOR = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
PHYSICAL_SECTOR = UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
ITEM_BYTES = {FILE_PARAMETERS: 8, DISK_SIZE: 8, PAGE_83: 16, LOGICAL_SECTOR: 4, PHYSICAL_SECTOR: 4}

REGION_REQUIRED, ITEM_REQUIRED, HAS_PARENT = 1, 4, 2
DISK_SIZE_MAX = 64 << 40
SECTORS_PER_CHUNK = 1 << 23


class Item(NamedTuple):
    """Where a metadata item is, from the start of the file, and how many bytes it has."""

    start: int
    length: int


def virtual_size(pieces: Pieces) -> int:
    """In bytes. Raises FormatError and Lacking."""
    bat, metadata = _regions(pieces)
    items = _items(pieces, metadata)
    block_size, flags = pieces.unpack("<II", items[FILE_PARAMETERS].start, "file parameters")
    (size,) = pieces.unpack("<Q", items[DISK_SIZE].start, "disk size")
    (sector,) = pieces.unpack("<I", items[LOGICAL_SECTOR].start, "sector size")
    if flags & HAS_PARENT:
        raise FormatError("it is a differencing disk: its content depends on a parent")
    if sector != 512:
        raise FormatError(f"its sectors of {sector} bytes are not supported")
    if block_size & (block_size - 1) or not MIB <= block_size <= 256 * MIB:
        raise FormatError(f"its block size of {block_size} bytes is absurd")
    if not 0 < size <= DISK_SIZE_MAX:
        raise FormatError(f"its disk of {size} bytes is not what the format allows")
    blocks = -(-size // block_size)
    if 8 * (blocks + (blocks - 1) * block_size // (SECTORS_PER_CHUNK * sector)) > bat.length:
        raise FormatError("its table of blocks is too small for its disk")
    return int(size // sector * sector)


def _regions(pieces: Pieces) -> tuple[Extent, Extent]:
    """Where the table of blocks and the metadata are."""
    table = pieces.get(REGION_TABLE, TABLE_BYTES, "region table")
    signature, _checksum, count, _reserved = struct.unpack_from("<4sIII", table)
    if signature != b"regi":
        raise FormatError("it has no region table")
    found: dict[bytes, Extent] = {}
    for kind, offset, length, flags in _entries(table, 16, "<16sQII", count):
        region = Extent(offset, offset + length)
        if offset < MIB or offset % MIB or length % MIB or region.end > pieces.size:
            raise FormatError("a region of it is not where one can be")
        if kind in found or any(region.meets(other) for other in found.values()):
            raise FormatError("two regions of it are in one place, or of one kind")
        if kind not in (BAT, METADATA) and flags & REGION_REQUIRED:
            raise FormatError("it has a region of a kind that is not known")
        found[kind] = region
    if BAT not in found or METADATA not in found:
        raise FormatError("it lacks a region that every such file has")
    return found[BAT], found[METADATA]


def _items(pieces: Pieces, region: Extent) -> dict[bytes, Item]:
    """Where the metadata items are."""
    piece = pieces.get(region.start, min(METADATA_PIECE, region.length), "metadata region")
    signature, _reserved, count = struct.unpack_from("<8sHH", piece)
    if signature != b"metadata":
        raise FormatError("its metadata region is none")
    found: dict[bytes, Item] = {}
    for kind, offset, length, flags, _rest in _entries(piece[:TABLE_BYTES], 32, "<16sIIII", count):
        if kind == PARENT_LOCATOR:
            raise FormatError("it names a parent")
        if kind in found:
            raise FormatError("two metadata items of it are of one kind")
        if kind not in ITEM_BYTES:
            if flags & ITEM_REQUIRED:
                raise FormatError("it has a metadata item of a kind that is not known")
            continue
        if length != ITEM_BYTES[kind] or offset < TABLE_BYTES or offset + length > region.length:
            raise FormatError("a metadata item of it is not where one can be")
        found[kind] = Item(region.start + offset, length)
    if found.keys() != ITEM_BYTES.keys():
        raise FormatError("it lacks a metadata item that every such file has")
    return found


def _entries(table: bytes, first: int, form: str, count: int) -> list[tuple[Any, ...]]:
    if count > ENTRIES_MAX or first + count * struct.calcsize(form) > len(table):
        raise FormatError(f"a table of it says {count} entries")
    return list(struct.iter_unpack(form, table[first : first + count * struct.calcsize(form)]))
