"""Ploop (Parallels): its header. Rule: answers with a size or refuses; no block is translated here."""

from __future__ import annotations

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces

SECTOR = 512
HEADER = "<16sIIIIIQIIIQ"
HEADER_BYTES = 64
OLD_MAGIC = b"WithoutFreeSpace"
CLUSTER_SECTORS_MAX = 1 << 17  # 64 MiB; the format's own is 1 MiB.
DISK_SIZE_MAX = 64 << 40


def virtual_size(pieces: Pieces) -> int:
    """In bytes. Raises FormatError and Lacking."""
    magic, version, _heads, _cylinders, cluster, entries, sectors, _in_use, data, _flags, extension = (
        pieces.unpack(HEADER, 0, "header")
    )
    if version != 2:
        raise FormatError(f"its version {version} is not one that is known")
    if magic == OLD_MAGIC:
        sectors &= 0xFFFFFFFF  # What is behind them was never cleared in those days.
    if not 0 < cluster <= CLUSTER_SECTORS_MAX:
        raise FormatError(f"its clusters of {cluster} sectors are absurd")
    if sectors * SECTOR > DISK_SIZE_MAX or sectors > entries * cluster:
        raise FormatError(f"its {entries} clusters do not make its disk of {sectors} sectors")
    outside = (HEADER_BYTES + 4 * entries, data * SECTOR, extension * SECTOR)
    if max(outside) > pieces.size:
        raise FormatError("a table of it lies outside the file")
    return int(sectors) * SECTOR
