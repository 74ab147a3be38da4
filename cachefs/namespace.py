"""The tree as numbers and names. Rule: pure, and without a state of its own: an inode number says what it is.

Numbers follow from an image's number, which the store gives once and remembers, so that a daemon that starts
anew gives every file the inode that it had. Nothing is counted: the kernel may forget and look up as it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from hashlib import sha1
from typing import NamedTuple
from uuid import UUID

NAME_BYTES_MAX = 255


class Folder(IntEnum):
    """The folders, by inode."""

    ROOT = 1
    IMAGES = 2
    BY_NAME = 3
    RAW = 4
    RESIZED = 5
    NOVA = 6


FOLDERS = {
    b"images": Folder.IMAGES,
    b"raw": Folder.RAW,
    b"resized": Folder.RESIZED,
    b"by-name": Folder.BY_NAME,
    b"nova": Folder.NOVA,
}

_SLOTS = 16


class Slot(IntEnum):
    """What of an image an inode stands for. SIZES is the folder of its resized views."""

    ORIGINAL = 1
    RAW = 2
    SIZES = 3
    LINK = 4


class Node(NamedTuple):
    """One inode that belongs to an image."""

    slot: Slot
    image_number: int


class Overlay(NamedTuple):
    """The inode of one resized view, by the number that the store gave it."""

    view: int


class ScratchNode(NamedTuple):
    """The inode of one scratch file in `nova/`, by that of the file on the store's filesystem."""

    number: int


# Above the inodes of 2^44 images, which no store will have had.
_OVERLAYS = 1 << 48
# Above those of as many views, and below what somebody would take for a negative number.
_SCRATCH, _END = 1 << 62, 1 << 63
SCRATCH_MAX = _END - _SCRATCH - 1


def overlay_inode(view: int) -> int:
    return _OVERLAYS + view


def scratch_inode(number: int) -> int:
    assert 0 < number <= SCRATCH_MAX, "what has another number is not shown"
    return _SCRATCH + number


def inode_of(slot: Slot, image_number: int) -> int:
    assert image_number >= 1, "image numbers begin at 1, so that no folder's inode is taken"
    return image_number * _SLOTS + slot


def node_of(inode: int) -> Folder | Node | Overlay | ScratchNode | None:
    """What `inode` stands for; None for a number that nobody was given."""
    if inode >= _SCRATCH:
        return ScratchNode(inode - _SCRATCH) if _SCRATCH < inode < _END else None
    if inode >= _OVERLAYS:
        return Overlay(inode - _OVERLAYS)
    if inode < _SLOTS:
        return Folder(inode) if inode in Folder.__members__.values() else None
    number, slot = divmod(inode, _SLOTS)
    return Node(Slot(slot), number) if slot in Slot.__members__.values() else None


def image_id(name: bytes) -> str | None:
    """The UUID that `name` is, in the one spelling that files have; None for any other name. `name` is what
    somebody asked for: it never becomes a part of a path or a URL unless it is this."""
    try:
        text = name.decode("ascii")
        return text if str(UUID(text)) == text else None
    except ValueError:
        return None


_BASE = re.compile(rb"[0-9a-f]{40}")


def base_name(image: str) -> bytes:
    """What Nova calls an image's file in its `_base` folder: the SHA-1 of the id."""
    return sha1(image.encode(), usedforsecurity=False).hexdigest().encode()


# What Nova looks for where an instance has no image (it was booted from a volume): the SHA-1 of nothing.
NO_BASE = base_name("")


def is_base_name(name: bytes) -> bool:
    """Whether Nova could mean an image by it."""
    return _BASE.fullmatch(name) is not None and name != NO_BASE


_GIB = 1 << 30
_SIZE = re.compile(rb"([1-9][0-9]{0,18})(G?)")


def size_of(name: bytes) -> int | None:
    """The bytes that a name in `resized/<uuid>` says: `20G` (GiB), or a number of bytes. None for others."""
    match = _SIZE.fullmatch(name)
    if match is None:
        return None
    size = int(match[1]) * (_GIB if match[2] else 1)
    return size if size < 1 << 63 else None


def size_name(size: int) -> bytes:
    """The name under which a resized view is listed."""
    return b"%dG" % (size // _GIB) if size % _GIB == 0 else b"%d" % size


def link_name(name: str | None) -> bytes | None:
    """What an image's name is called in `by-name`; None where it cannot be a file's name."""
    if not name:
        return None
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return None
    if encoded in (b".", b"..") or b"/" in encoded or b"\0" in encoded or len(encoded) > NAME_BYTES_MAX:
        return None
    return encoded


def unique_links(named: Iterable[tuple[str | None, int]]) -> dict[bytes, int]:
    """`by-name`: the names that exactly one image has, with its number."""
    links: dict[bytes, int] = {}
    twice: set[bytes] = set()
    for name, number in named:
        encoded = link_name(name)
        if encoded is None:
            continue
        if encoded in links:
            twice.add(encoded)
        links[encoded] = number
    return {name: number for name, number in links.items() if name not in twice}
