"""Images that lie, each made from a good one by a small change, with a word of the reason it is refused for. Rule:
a case changes as little as its lie needs, so that nothing else can be what it is refused for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

SECTOR, KIB, MIB = 512, 1 << 10, 1 << 20

QCOW2_MAGIC, VHD_COOKIE, VDI_MARK = b"QFI\xfb", b"conectix", b"\x7f\x10\xda\xbe"
VMDK_TEXT_AT, VMDK_TEXT_SECTORS = SECTOR, 20
VHDX_REGIONS, VHDX_METADATA = 192 * KIB, 3 * MIB  # As qemu-img places them.


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """`data` with other bytes at these places; negative ones count from the end."""
    changed = bytearray(data)
    for at, new in changes:
        start = at if at >= 0 else len(data) + at
        changed[start : start + len(new)] = new
    return bytes(changed)


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value)


def le16(value: int) -> bytes:
    return struct.pack("<H", value)


def le32(value: int) -> bytes:
    return struct.pack("<I", value)


def le64(value: int) -> bytes:
    return struct.pack("<Q", value)


def at(*changes: tuple[int, bytes]) -> Callable[[bytes], bytes]:
    """The image with other bytes at these places."""
    return lambda data: patched(data, *changes)


# ── Raw disks ─────────────────────────────────────────────────────────────────────────────────────────


def partitioned(size: int = MIB, kind: int = 0x83, boot: int = 0x80) -> bytes:
    """A disk with an MBR of one partition; of `kind` 0xEE it is the one that protects a GPT."""
    start = b"\x00\x02\x00"
    entry = struct.pack("<B3sB3sII", boot, start, kind, b"\xff\xff\xff", 1, size // SECTOR - 1)
    return patched(bytes(size), (446, entry), (510, b"\x55\xaa"))


def iso(size: int = MIB, front: bytes = b"") -> bytes:
    """An ISO 9660 file system's first descriptor, behind a system area that begins with `front`."""
    return patched(bytes(size), (0, front), (32 * KIB, b"\x01CD001\x01"))


def text_vmdk(name: str = "/etc/shadow") -> bytes:
    """A VMDK that is nothing but a text, and makes its reader open `name`."""
    return (
        "# Disk DescriptorFile\nversion=1\nCID=b96f8a6a\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\n\nRW 20480 FLAT "{name}" 0\n'
    ).encode()


# ── VMDK ──────────────────────────────────────────────────────────────────────────────────────────────


def vmdk_text(data: bytes) -> str:
    return data[VMDK_TEXT_AT:].split(b"\x00", 1)[0].decode()


def with_text(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """The image with another descriptor."""

    def made(data: bytes) -> bytes:
        text = change(vmdk_text(data)).encode()
        return patched(data, (VMDK_TEXT_AT, text.ljust(VMDK_TEXT_SECTORS * SECTOR, b"\x00")))

    return made


def adding(line: str) -> Callable[[bytes], bytes]:
    return with_text(lambda text: text + line + "\n")


def replacing(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return with_text(change)


def with_footer(*changes: tuple[int, bytes]) -> Callable[[bytes], bytes]:
    """As a stream is written: the directory is told of at the end. `changes`: to the footer's header."""

    def made(data: bytes) -> bytes:
        header = data[:SECTOR]
        marker = struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\x00")
        front = patched(data, (56, le64((1 << 64) - 1)))
        return front + marker + patched(header, *changes) + bytes(SECTOR)

    return made


# ── VHD ───────────────────────────────────────────────────────────────────────────────────────────────


def sealed(footer: bytes) -> bytes:
    """With the checksum that it should have."""
    return patched(footer, (64, be32(~sum(footer[:64] + footer[68:SECTOR]) & 0xFFFFFFFF)))


def vhd(*changes: tuple[int, bytes]) -> Callable[[bytes], bytes]:
    """A dynamic disk with other fields in the footer at its start."""
    return lambda data: sealed(patched(data[:SECTOR], *changes)) + data[SECTOR:]


def fixed_vhd(*changes: tuple[int, bytes]) -> Callable[[bytes], bytes]:
    return lambda data: data[:-SECTOR] + sealed(patched(data[-SECTOR:], *changes))


# ── VHDX ──────────────────────────────────────────────────────────────────────────────────────────────


def guid(text: str) -> bytes:
    return UUID(text).bytes_le


def vhdx_item(data: bytes, kind: str) -> int:
    """Where the value of a metadata item is."""
    entry = data.index(guid(kind), VHDX_METADATA)
    return VHDX_METADATA + int.from_bytes(data[entry + 16 : entry + 20], "little")


SIZE_ITEM: Final = "2fa54224-cd1b-4876-b211-5dbed83bf4b8"
PARAMETERS_ITEM: Final = "caa16737-fa36-4d43-b3b6-33f0aa44e76b"
SECTOR_ITEM: Final = "8141bf1d-a96f-4709-ba47-f233a8faab5f"
PARENT_ITEM: Final = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"
NO_ITEM: Final = "00000000-0000-0000-0000-000000000000"


def vhdx_value(kind: str, value: bytes, within: int = 0) -> Callable[[bytes], bytes]:
    return lambda data: patched(data, (vhdx_item(data, kind) + within, value))


def vhdx_entry(
    number: int, kind: str, start: int = 0, length: int = 0, flags: int = 0
) -> Callable[[bytes], bytes]:
    """The metadata with entry `number` (from 0) added or replaced."""
    entry = guid(kind) + struct.pack("<IIII", start, length, flags, 0)

    def made(data: bytes) -> bytes:
        (count,) = struct.unpack_from("<H", data, VHDX_METADATA + 10)
        places = (VHDX_METADATA + 32 * (1 + number), entry), (VHDX_METADATA + 10, le16(max(count, number + 1)))
        return patched(data, *places)

    return made


# ── The cases ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Hostile:
    """`change` makes it from the good image `good` of the zoo. `reason`: a part of what it is refused for."""

    name: str
    good: str
    change: Callable[[bytes], bytes]
    reason: str


FOOTER_TYPE, FOOTER_SIZE, FOOTER_GEOMETRY, FOOTER_CREATOR = 60, 48, 56, 28
TWICE, PARENT = "twice", "names a parent"

VMDK = (
    Hostile("a parent", "vmdk", adding('parentFileNameHint="/etc/shadow"'), PARENT),
    Hostile("a parent in a comment", "vmdk", adding('# parentFileNameHint="x.vmdk"'), PARENT),
    Hostile("a parent's content ID", "vmdk", replacing("parentCID=ffffffff", "parentCID=12345678"), PARENT),
    Hostile("a flat extent", "vmdk", replacing("SPARSE", "FLAT"), "not understood"),
    Hostile("an absolute extent", "vmdk", replacing('SPARSE "', 'SPARSE "/'), "elsewhere"),
    Hostile("an extent elsewhere", "vmdk", replacing('SPARSE "', 'SPARSE "../'), "elsewhere"),
    Hostile("an extent by protocol", "vmdk", replacing('SPARSE "', 'SPARSE "nbd:'), "elsewhere"),
    Hostile("a second extent", "vmdk", adding('RW 1 SPARSE "other.vmdk"'), "2 extents"),
    Hostile("no extent", "vmdk", with_text(lambda t: t.replace("RW 20480", "#")), "0 extents"),
    Hostile("another subformat", "vmdk", replacing("monolithicSparse", "monolithicFlat"), "subformat"),
    Hostile("a subformat that does not end", "vmdk", replacing('monolithicSparse"', "monolithicSparse"), ""),
    Hostile(
        "two subformats, of which oslo.utils reads one and qemu the other", "vmdk",
        with_text(lambda t: 'createtype="monolithicSparse"\n' + t.replace("Sparse", "Flat")), TWICE,
    ),
    Hostile("a subformat in a comment", "vmdk", with_text(lambda t: '# createType="vmfs"\n' + t), TWICE),
    Hostile("a line of nonsense", "vmdk", adding("what else"), "not understood"),
    Hostile("a text that is none", "vmdk", at((VMDK_TEXT_AT + 3, b"\xff")), "no text"),
    Hostile("a text without end", "vmdk", with_text(lambda t: t.ljust(10240, "\n")), "no text"),
    Hostile(
        "a text that goes on behind the descriptor", "vmdk",
        lambda d: patched(with_text(lambda t: t.ljust(512, "\n") + "parentFileNameHint")(d), (36, le64(1))),
        "no text",
    ),
    Hostile("no descriptor", "vmdk", at((28, le64(0))), "descriptor"),
    Hostile("a descriptor elsewhere", "vmdk", at((28, le64(40))), "descriptor"),
    Hostile("a descriptor of no size", "vmdk", at((36, le64(0))), "descriptor"),
    Hostile("a descriptor of 1 GiB", "vmdk", at((36, le64(1 << 21))), "descriptor"),
    Hostile("a descriptor beyond the file", "vmdk", at((36, le64(1000))), "descriptor"),
    Hostile("no disk, but a text that qemu follows", "vmdk", at((12, le64(0))), "no disk"),
    Hostile("a disk of 4 ZiB", "vmdk", at((12, le64(1 << 63))), "absurd"),
    Hostile("grains of no size", "vmdk", at((20, le64(0))), "grains"),
    Hostile("grains of 3 sectors", "vmdk", at((20, le64(3))), "grains"),
    Hostile("grains of 1 GiB", "vmdk", at((20, le64(1 << 21))), "grains"),
    Hostile("no grain tables", "vmdk", at((44, le32(0))), "grain tables"),
    Hostile("large grain tables", "vmdk", at((44, le32(1 << 31))), "grain tables"),
    Hostile("a directory outside", "vmdk", at((56, le64(1 << 40))), "outside"),
    Hostile("a redundant directory outside", "vmdk", at((48, le64(1 << 40))), "outside"),
    Hostile("a directory too large for the file", "vmdk", at((12, le64(1 << 34))), "outside"),
    Hostile("an overhead outside", "vmdk", at((64, le64(1 << 40))), "outside"),
    Hostile("version 4", "vmdk", at((4, le32(4))), "version"),
    Hostile("version 0", "vmdk", at((4, le32(0))), "version"),
    Hostile("a compression of its own", "vmdk", at((77, le16(2))), "compression"),
    Hostile("the old kind", "vmdk", at((0, b"COWD")), "old kind"),
    Hostile("a footer with another size", "vmdk-stream", with_footer((12, le64(1 << 20))), "contradicts"),
    Hostile("a footer with another descriptor", "vmdk-stream", with_footer((28, le64(2))), "contradicts"),
    Hostile("a footer that names a footer", "vmdk-stream", with_footer((56, le64((1 << 64) - 1))), "contradicts"),
    Hostile("no footer", "vmdk-stream", at((56, le64((1 << 64) - 1))), "contradicts"),
    Hostile("a footer at no sector", "vmdk-stream", lambda d: with_footer()(d) + b"\x00", "whole sector"),
    Hostile(
        "a footer without its marker", "vmdk-stream",
        lambda d: patched(with_footer()(d), (-3 * SECTOR, bytes(SECTOR))), "contradicts",
    ),
)  # fmt: skip

VHD = (
    Hostile("a differencing disk", "vhd", vhd((FOOTER_TYPE, be32(4))), "differencing"),
    Hostile("a fixed disk's footer in front", "vhd", vhd((FOOTER_TYPE, be32(2))), "disk type 2"),
    Hostile("an unknown type", "vhd", vhd((FOOTER_TYPE, be32(99))), "disk type 99"),
    Hostile("a wrong checksum", "vhd", at((FOOTER_SIZE, b"\x01")), "checksum"),
    Hostile("version 2", "vhd", vhd((12, be32(2 << 16))), "known"),
    Hostile("a disk of 16 EiB", "vhd", vhd((FOOTER_CREATOR, b"win "), (FOOTER_SIZE, b"\xff" * 8)), "larger"),
    Hostile("a header outside", "vhd", vhd((16, be64(1 << 50))), "outside"),
    Hostile("a header beyond every number", "vhd", vhd((16, b"\xff" * 8)), "outside"),
    Hostile("no header", "vhd", at((SECTOR, b"cxdense!")), "known"),
    Hostile("a parent's id", "vhd", at((SECTOR + 40, b"\x01")), PARENT),
    Hostile("a parent locator", "vhd", at((SECTOR + 576, b"W2ku")), PARENT),
    Hostile("blocks of no size", "vhd", at((SECTOR + 32, be32(0))), "block size"),
    Hostile("blocks of 3 MiB", "vhd", at((SECTOR + 32, be32(3 * MIB))), "block size"),
    Hostile("blocks of 2 GiB", "vhd", at((SECTOR + 32, be32(1 << 31))), "block size"),
    Hostile("a small table", "vhd", at((SECTOR + 28, be32(1))), "too small"),
    Hostile("a table outside", "vhd", at((SECTOR + 16, be64(1 << 40))), "outside"),
    Hostile("a huge table", "vhd", at((SECTOR + 28, be32(0xFFFFFFFF))), "larger"),
    Hostile("a fixed disk that is differencing", "vhd-fixed", fixed_vhd((FOOTER_TYPE, be32(4))), "differencing"),
    Hostile("a fixed disk that is dynamic", "vhd-fixed", fixed_vhd((FOOTER_TYPE, be32(3))), "disk type 3"),
    Hostile("a fixed disk larger than its file", "vhd-fixed", lambda d: d[MIB:], "larger than the file"),
    Hostile("a fixed disk at no sector", "vhd-fixed", lambda d: b"\x00" * 100 + d, "whole sector"),
    Hostile("a fixed disk that is a qcow2", "vhd-fixed", at((0, QCOW2_MAGIC)), "several formats"),
)

VHDX = (
    Hostile("a parent", "vhdx", vhdx_value(PARAMETERS_ITEM, b"\x02", 4), "differencing"),
    Hostile("a parent locator", "vhdx", vhdx_entry(5, PARENT_ITEM, 65600), PARENT),
    Hostile("an unknown item", "vhdx", vhdx_entry(5, NO_ITEM, 65600, 4, 4), "known"),
    Hostile("an item twice", "vhdx", vhdx_entry(5, SIZE_ITEM, 65544, 8, 6), "one"),
    Hostile("an item in the table", "vhdx", vhdx_entry(1, SIZE_ITEM, 64, 8), "where"),
    Hostile("an item outside", "vhdx", vhdx_entry(1, SIZE_ITEM, 1 << 31, 8), "where"),
    Hostile("an item of 4 GiB", "vhdx", vhdx_entry(1, SIZE_ITEM, 65544, 0xFFFFFFFF), "where"),
    Hostile("an item less", "vhdx", vhdx_entry(1, NO_ITEM), "lacks"),
    Hostile("65535 items", "vhdx", at((VHDX_METADATA + 10, b"\xff\xff")), "65535 entries"),
    Hostile("no metadata", "vhdx", at((VHDX_METADATA, b"METADATA")), "metadata region"),
    Hostile("no disk", "vhdx", vhdx_value(SIZE_ITEM, bytes(8)), "0 bytes"),
    Hostile("a disk of 16 EiB", "vhdx", vhdx_value(SIZE_ITEM, b"\xff" * 8), "format allows"),
    Hostile("a table too small for its disk", "vhdx", vhdx_value(SIZE_ITEM, le64(64 << 40)), "too small"),
    Hostile("blocks of no size", "vhdx", vhdx_value(PARAMETERS_ITEM, bytes(4)), "block size"),
    Hostile("blocks of 3 MiB", "vhdx", vhdx_value(PARAMETERS_ITEM, le32(3 * MIB)), "block size"),
    Hostile("sectors of 4 KiB", "vhdx", vhdx_value(SECTOR_ITEM, le32(4096)), "sectors"),
    Hostile("no region table", "vhdx", at((VHDX_REGIONS, b"gone")), "region table"),
    Hostile("too many regions", "vhdx", at((VHDX_REGIONS + 8, b"\xff" * 4)), "entries"),
    Hostile("no region", "vhdx", at((VHDX_REGIONS + 8, le32(0))), "lacks"),
    Hostile("a new region", "vhdx", at((VHDX_REGIONS + 16, bytes(16)), (VHDX_REGIONS + 44, b"\x01")), "known"),
    Hostile("a region outside", "vhdx", at((VHDX_REGIONS + 64, le64(1 << 40))), "where"),
    Hostile("a region beyond every number", "vhdx", at((VHDX_REGIONS + 64, b"\xff" * 8)), "where"),
    Hostile("a region in the header", "vhdx", at((VHDX_REGIONS + 64, le64(0))), "where"),
    Hostile("two regions in one place", "vhdx", at((VHDX_REGIONS + 64, le64(2 * MIB))), "one place"),
)  # fmt: skip

VDI = (
    Hostile("a link", "vdi", at((0x1A8, b"\x01")), "differencing"),
    Hostile("a parent", "vdi", at((0x1B8, b"\x01")), "differencing"),
    Hostile("a differencing type", "vdi", at((0x4C, le32(4))), "type 4"),
    Hostile("version 2", "vdi", at((0x44, le32(0x20000))), "version"),
    Hostile("small sectors", "vdi", at((0x168, le32(1))), "sector size"),
    Hostile("small blocks", "vdi", at((0x178, le32(512))), "block size"),
    Hostile("a disk of 16 EiB", "vdi", at((0x170, b"\xff" * 8)), "blocks"),
    Hostile("a disk larger than its blocks", "vdi", at((0x170, le64(11 * MIB))), "blocks"),
    Hostile("too many blocks", "vdi", at((0x180, b"\xff" * 4)), "blocks"),
    Hostile("a table outside", "vdi", at((0x154, le32(1 << 30))), "outside"),
    Hostile("a table at no sector", "vdi", at((0x154, le32(1000))), "outside"),
    Hostile("data outside", "vdi", at((0x158, le32(1 << 31))), "outside"),
)

PLOOP = (
    Hostile("version 3", "ploop", at((16, le32(3))), "version"),
    Hostile("clusters of no size", "ploop", at((28, le32(0))), "clusters"),
    Hostile("clusters of 2 TiB", "ploop", at((28, le32(0xFFFFFFFF))), "clusters"),
    Hostile("a disk larger than its clusters", "ploop", at((36, le64(1 << 30))), "clusters"),
    Hostile("a disk of 8 ZiB", "ploop", at((36, b"\xff" * 8)), "clusters"),
    Hostile("a table outside", "ploop", at((32, le32(1 << 28))), "outside"),
    Hostile("data outside", "ploop", at((48, le32(1 << 31))), "outside"),
    Hostile("an extension outside", "ploop", at((56, le64(1 << 40))), "outside"),
)

QCOW2 = (
    Hostile("a backing file", "qcow2", at((8, be64(600)), (16, be32(11)), (600, b"/etc/shadow")), "backing file"),
    Hostile("a data file", "qcow2", at((72, be64(4))), "another file"),
    Hostile("encryption", "qcow2", at((32, be32(2))), "encrypted"),
    Hostile("the old encryption", "qcow2", at((32, be32(1))), "encrypted"),
    Hostile("an unknown feature", "qcow2", at((72, be64(1 << 5))), "not known"),
    Hostile("an unknown high feature", "qcow2", at((72, be64(1 << 63))), "not known"),
    Hostile("version 1", "qcow2", at((4, be32(1))), "version 1"),
    Hostile("version 4", "qcow2", at((4, be32(4))), "version 4"),
    Hostile("clusters of 2^60", "qcow2", at((20, be32(60))), "cluster size"),
    Hostile("a disk of 16 EiB", "qcow2", at((24, b"\xff" * 8)), "larger"),
    Hostile("an L1 table outside", "qcow2", at((40, be64(1 << 40))), "beyond"),
    Hostile("also an ISO", "qcow2", at((32 * KIB, b"\x01CD001\x01")), "several formats"),
    Hostile("also a VDI", "qcow2", at((0x40, VDI_MARK)), "several formats"),
)

HOSTILE = VMDK + VHD + VHDX + VDI + PLOOP + QCOW2
