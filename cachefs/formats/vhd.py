"""VHD (Virtual PC): its footer and its table. Rule: answers with a size or refuses; no block is translated here.

A dynamic disk has a copy of its footer at the start of the file, a fixed one has it at the end only. The size
is the one that QEMU presents, which follows the footer's geometry unless the creator is known not to mean it.
"""

from __future__ import annotations

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces

SECTOR = 512
COOKIE = b"conectix"
FOOTER = ">8sII Q I 4s I 4s QQ HBB I I 16s".replace(" ", "")  # The 84 bytes that say something.
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4

# Creators whose geometry is only a fiction for old BIOSes: Hyper-V, QEMU with force_size, disk2vhd, XenServer.
SIZE_COUNTS = (b"win ", b"qem2", b"d2v ", b"tap\x00", b"CTXS")
GEOMETRY_SECTORS_MAX = 65535 * 16 * 255
SECTORS_MAX = 0xFF000000  # 2040 GiB
BLOCK_SIZE_MAX = 1 << 28
DYNAMIC_HEADER = ">8sQQIII I 16sII".replace(" ", "")
LOCATORS, LOCATOR_BYTES = 576, 24


def is_fixed(pieces: Pieces) -> bool:
    """Whether the file ends in a footer. Raises Lacking."""
    if pieces.size < SECTOR:
        return False
    return pieces.get(pieces.size - SECTOR, SECTOR, "footer").startswith(COOKIE)


def virtual_size(pieces: Pieces) -> int:
    """In bytes. Raises FormatError and Lacking."""
    if pieces.get(0, SECTOR, "header").startswith(COOKIE):
        size = _footer(pieces, 0, DYNAMIC)
        _check_table(pieces, size)
        return size
    at = pieces.size - SECTOR
    size = _footer(pieces, at, FIXED)
    if pieces.size % SECTOR:
        raise FormatError("its footer is not at a whole sector")
    if size > at:
        raise FormatError("its disk is larger than the file that holds all of it")
    return size


def _footer(pieces: Pieces, at: int, kind: int) -> int:
    """The size that the footer tells, when it is one of `kind`."""
    data = pieces.get(at, SECTOR, "footer")
    (
        cookie, _features, version, _next, _time, creator, _creator_version, _host, _original, size,
        cylinders, heads, sectors_per_track, found, checksum, _id,
    ) = pieces.unpack(FOOTER, at, "footer")  # fmt: skip
    if cookie != COOKIE or version >> 16 != 1:
        raise FormatError("its footer is none that is known")
    if checksum != ~sum(data[:64] + data[68:]) & 0xFFFFFFFF:
        raise FormatError("the checksum of its footer is wrong")
    if found == DIFFERENCING:
        raise FormatError("it is a differencing disk: its content depends on a parent")
    if found != kind:
        raise FormatError(f"its footer says disk type {found} where only {kind} can be")
    sectors = int(cylinders) * int(heads) * int(sectors_per_track)
    if creator in SIZE_COUNTS or sectors == GEOMETRY_SECTORS_MAX:
        sectors = size // SECTOR
    if sectors > SECTORS_MAX:
        raise FormatError(f"its disk of {sectors} sectors is larger than the format allows")
    return sectors * SECTOR


def _check_table(pieces: Pieces, size: int) -> None:
    """The header of a dynamic disk, and where its table of blocks is."""
    (at,) = pieces.unpack(">Q", 16, "footer")
    data = pieces.get(at, 1024, "dynamic disk header")
    magic, _next, table, version, entries, block_size, _checksum, parent, _time, _reserved = pieces.unpack(
        DYNAMIC_HEADER, at, "dynamic disk header"
    )
    if magic != b"cxsparse" or version >> 16 != 1:
        raise FormatError("its dynamic disk header is none that is known")
    if any(parent) or any(
        any(data[o : o + 4]) for o in range(LOCATORS, LOCATORS + 8 * LOCATOR_BYTES, LOCATOR_BYTES)
    ):
        raise FormatError("it names a parent")
    if block_size & (block_size - 1) or not SECTOR <= block_size <= BLOCK_SIZE_MAX:
        raise FormatError(f"its block size of {block_size} bytes is absurd")
    if entries * block_size < size:
        raise FormatError("its table of blocks is too small for its disk")
    if entries > SECTORS_MAX * SECTOR // block_size + 1:
        raise FormatError(f"its table of {entries} blocks is larger than the format allows")
    if table + 4 * entries > pieces.size:
        raise FormatError("its table of blocks lies outside the file")
