"""VMDK (VMware): its header and its descriptor. Rule: a file that could make a reader open another one is refused.

QEMU searches the descriptor for its words anywhere, also in comments, and reads more of it than the header says
when it looks for a parent. So the text is taken as far as QEMU could read it, every line of it must be
understood, and the words that matter may be there once.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces

SECTOR = 512
HEADER = "<4sIIQQQQIQQQB4sH"
DESCRIPTOR_AT = SECTOR
DESCRIPTOR_BYTES_MAX = (1 << 20) - 1
QEMU_READS = 20 * SECTOR  # For the parent, whatever the header says.
AT_END = (1 << 64) - 1  # The grain directory is told of in a footer, whose header goes before the first one.
FOOTER_BYTES = 3 * SECTOR
# Writers differ in the others: where the directories are is only known at the end.
SAME_IN_FOOTER = (
    "magic", "version", "capacity", "grain", "descriptor", "descriptor_sectors", "entries_per_table",
    "compression",
)  # fmt: skip

CREATE_TYPES = ("monolithicSparse", "streamOptimized")  # What Nova allows.
HAS_REDUNDANT = 2
GRAIN_SECTORS_MAX = 1 << 16  # 32 MiB; the usual is 64 KiB.
DISK_SIZE_MAX = 64 << 40

EXTENT = re.compile(r'(?:RW|RDONLY) [0-9]{1,20} SPARSE "[^"/\\:]{1,255}"')
FIELD = re.compile(r"[A-Za-z][A-Za-z0-9._]*\s*=.*")


class Header(NamedTuple):
    """The fields of a sparse header, as they are in the file. Places and sizes in sectors."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_sectors: int
    entries_per_table: int
    redundant_directory: int
    directory: int
    overhead: int
    unclean: int
    newlines: bytes
    compression: int


def virtual_size(pieces: Pieces) -> int:
    """In bytes. Raises FormatError and Lacking."""
    if not pieces.get(0, 4, "header") == b"KDMV":
        raise FormatError("it is a text that names other files, or an old kind that is not supported")
    header = Header(*pieces.unpack(HEADER, 0, "header"))
    _check_descriptor(pieces, header)
    if header.directory == AT_END:
        header = _footer(pieces, header)
    _check_header(header, pieces.size)
    return header.capacity * SECTOR


def _footer(pieces: Pieces, header: Header) -> Header:
    """The header that counts, from the end of the file."""
    if pieces.size % SECTOR:
        raise FormatError("its footer is not at a whole sector")
    footer = Header(*pieces.unpack(HEADER, pieces.size - FOOTER_BYTES + SECTOR, "footer"))
    if footer.directory == AT_END or any(
        getattr(footer, name) != getattr(header, name) for name in SAME_IN_FOOTER
    ):
        raise FormatError("its footer contradicts its header")
    return footer


def _check_header(header: Header, file_size: int) -> None:
    if header.version not in (1, 2, 3) or header.compression not in (0, 1):
        raise FormatError("its version or its compression is not one that is known")
    if header.capacity == 0:
        raise FormatError("it holds no disk, and sends a reader to other files")
    if header.capacity * SECTOR > DISK_SIZE_MAX:
        raise FormatError(f"its disk of {header.capacity} sectors is absurd")
    if header.grain & (header.grain - 1) or not 0 < header.grain <= GRAIN_SECTORS_MAX:
        raise FormatError(f"its grains of {header.grain} sectors are absurd")
    if not 0 < header.entries_per_table <= 512:
        raise FormatError(f"its grain tables of {header.entries_per_table} entries are absurd")
    tables = -(-header.capacity // (header.grain * header.entries_per_table))
    ends = [header.directory * SECTOR + 4 * tables, header.overhead * SECTOR]
    if header.flags & HAS_REDUNDANT:
        ends.append(header.redundant_directory * SECTOR + 4 * tables)
    if max(ends) > file_size:
        raise FormatError("a table of it lies outside the file")


def _check_descriptor(pieces: Pieces, header: Header) -> None:
    length = header.descriptor_sectors * SECTOR
    if header.descriptor * SECTOR != DESCRIPTOR_AT or not 0 < length <= DESCRIPTOR_BYTES_MAX:
        raise FormatError("its descriptor is not where one can be")
    readable = min(max(length, QEMU_READS), pieces.size - DESCRIPTOR_AT)
    text, end, _rest = pieces.get(DESCRIPTOR_AT, max(length, readable), "descriptor").partition(b"\x00")
    if not end or len(text) >= length or not text.isascii():
        raise FormatError("its descriptor is no text that ends")
    check_text(text.decode("ascii"))


def check_text(text: str) -> None:
    """Raises FormatError when the descriptor's text is not that of one file that stands alone."""
    folded = text.lower()
    if "parentfilenamehint" in folded:
        raise FormatError("it names a parent")
    if folded.count("createtype") != 1 or folded.count("parentcid") != 1:
        raise FormatError("its descriptor says a thing twice, or lacks one")
    fields: dict[str, str] = {}
    extents = 0
    for line in (line.strip(" \t\r") for line in text.split("\n")):
        if EXTENT.fullmatch(line):
            extents += 1
        elif FIELD.fullmatch(line):
            name, _, value = line.partition("=")
            fields[name.strip()] = value.strip()
        elif line and not line.startswith("#"):
            raise FormatError("its descriptor has a line that is not understood, or names an extent elsewhere")
    if fields.get("createType", "").strip('"') not in CREATE_TYPES:
        raise FormatError("its subformat is none of " + ", ".join(CREATE_TYPES))
    if fields.get("parentCID", "").lower() != "ffffffff":
        raise FormatError("it names a parent")
    if extents != 1:
        raise FormatError(f"its descriptor names {extents} extents, where one can be")
