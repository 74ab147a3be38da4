"""Which images instance disks stand on: what a backing file's name means, and which disks are gone. Rule: pure; a
name is compared as text, and that a disk is gone is believed only of a walk that must have seen it.

Paths and names are bytes, as the kernel has them. Times are in seconds.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cachefs.namespace import image_id, is_base_name, size_of
from cachefs.store.format import DiskEntry, ViewKind

_FILE = b"file:"
_FOLDERS = {b"images": ViewKind.ORIGINAL, b"raw": ViewKind.RAW}
_RESIZED, _NOVA = b"resized", b"nova"


class Base(NamedTuple):
    """What a name means: a file of this mount, of `image`. `kind`: ORIGINAL in `images/`, RAW in `raw/` and
    `resized/`, whose sizes hold nothing of their own; in `nova/`, one of them."""

    image: str
    kind: ViewKind


@dataclass(frozen=True)
class BaseNames:
    """What names in `nova/` mean. `image_of`: the image whose file is read by a name, None for none and for a
    scratch file. `kind`: the folder whose file that is. `binds`: where else that folder lies."""

    image_of: Callable[[bytes], str | None]
    kind: ViewKind
    binds: tuple[bytes, ...] = ()

    def below(self, folder: bytes, real: bytes) -> BaseNames:
        """The same for disks in `folder`, which is `real` where it is a link, or lies behind one: a bind is known
        by its real place, and disks name it as whoever made them did."""
        folder, real = normal(folder).rstrip(b"/"), real.rstrip(b"/")
        spelt = (folder + place[len(real) :] for place in self.binds if place.startswith(real + b"/"))
        return replace(self, binds=tuple(dict.fromkeys((*self.binds, *spelt))))

    def base_of(self, name: bytes) -> Base | None:
        image = self.image_of(name) if is_base_name(name) else None
        return None if image is None else Base(image, self.kind)


def base_of(
    name: bytes, folder: bytes, mountpoints: Iterable[bytes], names: BaseNames | None = None
) -> Base | None:
    """The file of this mount that a disk in `folder` names; None for whatever else. Nothing is asked of the
    filesystem: a name that goes through a link of any kind is another name."""
    if name.startswith(_FILE):
        name = name.removeprefix(_FILE)
    elif b":" in name.partition(b"/")[0]:
        return None  # "json:", "nbd:", "rbd:" ...: to qemu, a protocol.
    path = normal(posixpath.join(folder, name))
    if names is not None and posixpath.dirname(path) in names.binds:
        return names.base_of(posixpath.basename(path))
    for mountpoint in mountpoints:
        if path.startswith(mountpoint + b"/"):
            return _in_mount(path[len(mountpoint) + 1 :], names)
    return None


def normal(path: bytes) -> bytes:
    path = posixpath.normpath(path)
    return path[1:] if path.startswith(b"//") else path  # POSIX lets two slashes stand.


def _in_mount(path: bytes, names: BaseNames | None) -> Base | None:
    match path.split(b"/"):
        case [folder, name] if folder == _NOVA and names is not None:
            return names.base_of(name)
        case [folder, name] if folder in _FOLDERS:
            image = image_id(name)
            return None if image is None else Base(image, _FOLDERS[folder])
        case [folder, name, size] if folder == _RESIZED and size_of(size) is not None:
            image = image_id(name)
            return None if image is None else Base(image, ViewKind.RAW)
    return None


# ── What was seen ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Walk:
    """One walk over a folder and all below it. `whole`: it came to its end, and met something. `unread`: folders
    and files of which it could not be seen what they are, whatever the reason."""

    folder: bytes
    place: int
    whole: bool
    found: Mapping[bytes, Base]
    unread: frozenset[bytes] = frozenset()


def is_gone(disk: DiskEntry, image: str, walks: Sequence[Walk]) -> bool:
    """Whether the disk names the image no more, as far as these walks, one for each folder that is looked at, can
    say. One that lies in none of them is gone: nobody would ever see it again.

    A folder whose filesystem is not mounted is a folder with something else in it, or nothing. So a walk must have
    been on the filesystem on which the disk was seen, or have found others that name this mount."""
    for walk in walks:
        if not is_under(disk.path, walk.folder):
            continue
        if not walk.whole or (walk.place != disk.place and not walk.found):
            return False
        if any(part in walk.unread for part in _and_parents(disk.path, walk.folder)):
            return False
        base = walk.found.get(disk.path)
        if base is not None and base == Base(image, disk.kind):
            return False
    return True


def is_under(path: bytes, folder: bytes) -> bool:
    return path.startswith(folder.rstrip(b"/") + b"/")


def _and_parents(path: bytes, end: bytes) -> Iterable[bytes]:
    while len(path) > len(end):
        yield path
        path = posixpath.dirname(path)
    yield end


def standing(known: Mapping[str, Sequence[DiskEntry]], walks: Sequence[Walk]) -> dict[str, list[DiskEntry]]:
    """The disks that stand on each image: those that the walks found, and of those that are `known` all that are
    not gone. An image without any is there, with none."""
    disks: dict[str, dict[tuple[bytes, ViewKind], DiskEntry]] = {image: {} for image in known}
    for image, before in known.items():
        for disk in before:
            if not is_gone(disk, image, walks):
                disks[image][disk.path, disk.kind] = disk
    for walk in walks:
        for path, (image, kind) in walk.found.items():
            disks.setdefault(image, {})[path, kind] = DiskEntry(path, kind, walk.place)
    return {image: sorted(by_path.values()) for image, by_path in disks.items()}
