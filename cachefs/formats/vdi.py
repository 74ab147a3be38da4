"""VDI (VirtualBox): its header. Rule: answers with a size or refuses; no block is translated here."""

from __future__ import annotations

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces

SECTOR, BLOCK_SIZE = 512, 1 << 20
VERSION = 0x00010001
DYNAMIC, STATIC = 1, 2
BLOCKS_MAX = 0x3FFFFFFF
AT_TYPE, AT_PLACES, AT_DISK, AT_LINKS = 0x4C, 0x154, 0x168, 0x1A8


def virtual_size(pieces: Pieces) -> int:
    """In bytes, whole sectors. Raises FormatError and Lacking."""
    (version,) = pieces.unpack("<I", 0x44, "header")
    (kind,) = pieces.unpack("<I", AT_TYPE, "header")
    table, data = pieces.unpack("<II", AT_PLACES, "header")
    sector, _unused, size, block_size, _extra, blocks, _allocated = pieces.unpack("<IIQIIII", AT_DISK, "header")
    if version != VERSION or sector != SECTOR or block_size != BLOCK_SIZE:
        raise FormatError("its version, sector size or block size is not one that is known")
    if any(pieces.get(AT_LINKS, 32, "header")):
        raise FormatError("it is a differencing disk: its content depends on a parent")
    if kind not in (DYNAMIC, STATIC):
        raise FormatError(f"its image type {kind} is not one that stands alone")
    size = -(-size // SECTOR) * SECTOR
    if blocks > BLOCKS_MAX or size > blocks * BLOCK_SIZE:
        raise FormatError(f"its {blocks} blocks do not make its disk of {size} bytes")
    if table % SECTOR or data % SECTOR or table + 4 * blocks > pieces.size or data > pieces.size:
        raise FormatError("its table of blocks lies outside the file")
    return int(size)
