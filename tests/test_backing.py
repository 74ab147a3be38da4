"""What a disk's header names, whether that is a file of this mount, and when a disk is gone."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import FormatError
from cachefs.formats.qcow2_backing import HEAD_BYTES, NAME_BYTES_MAX, backing_extent
from cachefs.namespace import base_name
from cachefs.plan.extents import Extent
from cachefs.plan.instances import Base, BaseNames, Walk, base_of, is_gone, standing
from cachefs.store.format import DiskEntry, ViewKind
from tests.instance_disks import NAME_AT, head
from tests.stores import examples, image_id

A, B = image_id(0xA), image_id(0xB)
MOUNT: Final = b"/mnt/cachefs"


# ── The header ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", [b"x", b"/mnt/cachefs/images/" + A.encode(), b"\xff\x80", b"n" * NAME_BYTES_MAX])
def test_a_name_is_found(version: int, name: bytes) -> None:
    data = head(name, version=version)
    extent = backing_extent(data[:HEAD_BYTES])
    assert extent == Extent(NAME_AT, NAME_AT + len(name))
    assert data[extent.start : extent.end] == name


def test_a_name_may_lie_far_behind_the_head() -> None:
    data = head(b"name", at=(1 << 16) - 4)
    assert backing_extent(data[:HEAD_BYTES]) == Extent((1 << 16) - 4, 1 << 16)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"Q", b"QFI", b"\0" * HEAD_BYTES, b"KDMV" + b"\0" * 508, head(b"name", magic=b"QFI\xfa"),
        head(b"name", at=0), head(b""),
    ],
)  # fmt: skip
def test_what_has_nothing_below_it(data: bytes) -> None:
    assert backing_extent(data) is None


REFUSED: Final = {
    "cut short": b"QFI\xfb",
    "cut within a field": head(b"name")[:23],
    "version 0": head(b"name", version=0),
    "version 1": head(b"name", version=1),
    "version 4": head(b"name", version=4),
    "version 2^32 - 1": head(b"name", version=2**32 - 1),
    "a name that is too long": head(b"", length=NAME_BYTES_MAX + 1),
    "a name of 4 GiB": head(b"", length=2**32 - 1),
    "a name in the header": head(b"name", at=8),
    "a name that ends behind its cluster": head(b"", at=(1 << 16) - 3, length=4),
    "a name behind its cluster": head(b"", at=1 << 16, length=1),
    "a name at the end of the world": struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 2**64 - 1, 4, 16, 0),
    "no cluster": head(b"name", cluster_bits=8),
    "clusters of the world": head(b"name", cluster_bits=2**32 - 1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_header_that_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(FormatError):
        backing_extent(REFUSED[what][:HEAD_BYTES])


@given(st.integers(2, 3), st.binary(max_size=NAME_BYTES_MAX), st.data())
@examples(300)
def test_whatever_is_flipped_no_byte_outside_the_first_cluster_is_asked_for(
    version: int, name: bytes, data: st.DataObject
) -> None:
    mutated = bytearray(head(name, version=version))
    for _ in range(data.draw(st.integers(0, 8))):
        mutated[data.draw(st.integers(0, min(len(mutated) - 1, 40)))] = data.draw(st.integers(0, 255))
    try:
        extent = backing_extent(bytes(mutated[: data.draw(st.integers(0, HEAD_BYTES))]))
    except FormatError:
        return
    if extent is not None:
        assert 24 <= extent.start < extent.end <= 1 << 21
        assert extent.length <= NAME_BYTES_MAX


@pytest.mark.parametrize(
    "options", ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "extended_l2=on"]
)
def test_the_name_is_where_qemu_img_puts_it(options: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    disk = tmp_path / "disk"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), "-o", options, str(disk)]
    subprocess.run(create, check=True)
    data = disk.read_bytes()
    extent = backing_extent(data[:HEAD_BYTES])
    assert extent is not None
    assert data[extent.start : extent.end] == str(base).encode()


# ── The name ──────────────────────────────────────────────────────────────────────────────────────────

ORIGINAL, RAW = Base(A, ViewKind.ORIGINAL), Base(A, ViewKind.RAW)
NAMES: Final = [
    (f"/mnt/cachefs/images/{A}", ORIGINAL),
    (f"/mnt/cachefs/raw/{A}", RAW),
    (f"/mnt/cachefs/resized/{A}/20G", RAW),
    (f"/mnt/cachefs/resized/{A}/1073741824", RAW),
    (f"file:/mnt/cachefs/raw/{A}", RAW),
    (f"//mnt//cachefs/./images/../raw/{A}", RAW),
    (f"../../../../../mnt/cachefs/images/{A}", ORIGINAL),
    (f"./../../../../../../../../mnt/cachefs/images/{A}", ORIGINAL),
    (f"/other/images/{A}", ORIGINAL),
    (f"/mnt/cachefs/images/{A}/", ORIGINAL),  # qemu could not open it; a lease too many is none too few.
    # Not ours, or nothing at all.
    (f"/mnt/cachefs/images/{A.upper()}", None),
    (f"/mnt/cachefs/images/{A}x", None),
    (f"/mnt/cachefs/images/{A}/x", None),
    (f"/mnt/cachefs/resized/{A}", None),
    (f"/mnt/cachefs/resized/{A}/20g", None),
    (f"/mnt/cachefs/resized/{A}/0", None),
    (f"/mnt/cachefs/by-name/{A}", None),
    (f"/mnt/cachefs/{A}", None),
    (f"/mnt/cachefs2/images/{A}", None),
    (f"/mnt/cachefs/images/../../x/images/{A}", None),
    (f"images/{A}", None),
    (f"/var/lib/nova/instances/_base/{A}", None),
    (f'json:{{"file.filename": "/mnt/cachefs/images/{A}"}}', None),
    (f"nbd:unix:/mnt/cachefs/images/{A}", None),
    (f"nbd://host/mnt/cachefs/images/{A}", None),
    (f"raw:/mnt/cachefs/images/{A}", None),
    ("/mnt/cachefs", None),
    ("/mnt/cachefs/", None),
    ("", None),
    ("/", None),
    ("..", None),
]


@pytest.mark.parametrize(("name", "base"), NAMES)
def test_what_a_name_means(name: str, base: Base | None) -> None:
    assert base_of(name.encode(), b"/var/lib/nova/instances/i", (MOUNT, b"/other")) == base


@given(st.binary(max_size=NAME_BYTES_MAX))
@examples(300)
def test_no_name_is_too_odd(name: bytes) -> None:
    assert base_of(name, b"/instances/i", (MOUNT,)) is None
    assert base_of(b"/mnt/cachefs/images/" + name, b"/instances/i", (MOUNT,)) is None


SHA1 = base_name(A).decode()
SCRATCH = base_name(B)
IN_NOVA: Final = [
    (f"/mnt/cachefs/nova/{SHA1}", RAW),
    (f"/var/lib/nova/instances/_base/{SHA1}", RAW),
    (f"../_base/{SHA1}", RAW),
    (f"file:/var/lib/nova/instances/_base/../_base//{SHA1}", RAW),
    (f"/mnt/cachefs/raw/{A}", RAW),
    (f"/var/lib/nova/instances/_base/{SCRATCH.decode()}", None),
    (f"/mnt/cachefs/nova/{base_name('nobody').decode()}", None),
    (f"/mnt/cachefs/nova/{SHA1.upper()}", None),
    (f"/mnt/cachefs/nova/{SHA1}_20", None),
    (f"/mnt/cachefs/nova/{SHA1}/x", None),
    (f"/mnt/cachefs/nova/{A}", None),
    (f"/var/lib/nova/instances/_base/x/{SHA1}", None),
    (f"/var/lib/nova/instances/_base2/{SHA1}", None),
    (f"/var/lib/nova/instances/_base/raw/{A}", None),
    (f"json:/var/lib/nova/instances/_base/{SHA1}", None),
    ("/var/lib/nova/instances/_base", None),
]


@pytest.mark.parametrize(("name", "base"), IN_NOVA)
def test_what_a_name_in_novas_folder_means(name: str, base: Base | None) -> None:
    names = BaseNames({base_name(A): A}.get, ViewKind.RAW, (b"/var/lib/nova/instances/_base",))
    assert base_of(name.encode(), b"/var/lib/nova/instances/i", (MOUNT,), names) == base


def test_without_that_folder_its_names_mean_nothing() -> None:
    for name, base in IN_NOVA:
        found = base_of(name.encode(), b"/var/lib/nova/instances/i", (MOUNT,))
        assert found == (base if "/raw/" in name and "_base" not in name else None)
    names = BaseNames({base_name(A): A}.get, ViewKind.ORIGINAL)
    assert base_of(f"/mnt/cachefs/nova/{SHA1}".encode(), b"/i", (MOUNT,), names) == ORIGINAL
    assert base_of(f"/var/lib/nova/instances/_base/{SHA1}".encode(), b"/i", (MOUNT,), names) is None


# ── Gone or not ───────────────────────────────────────────────────────────────────────────────────────

NOVA: Final = b"/nova"
DISK = DiskEntry(b"/nova/one/disk", ViewKind.RAW, 7)
OTHERS = {b"/nova/two/disk": Base(B, ViewKind.RAW)}


def walk(found: dict[bytes, Base] | None = None, *unread: bytes, place: int = 7, whole: bool = True) -> Walk:
    return Walk(NOVA, place, whole, found or {}, frozenset(unread))


GONE: Final = {
    "an empty walk on the same filesystem": ([walk()], True),
    "a walk that found others": ([walk(OTHERS)], True),
    "it names another image": ([walk({DISK.path: Base(B, ViewKind.RAW)})], True),
    "it names another file of the image": ([walk({DISK.path: Base(A, ViewKind.ORIGINAL)})], True),
    "it is there": ([walk({DISK.path: RAW})], False),
    "the walk came to no end": ([walk(OTHERS, whole=False)], False),
    "the disk could not be read": ([walk(OTHERS, b"/nova/one/disk")], False),
    "its folder could not be read": ([walk(OTHERS, b"/nova/one")], False),
    "the folder of all could not be read": ([walk(OTHERS, b"/nova")], False),
    "another disk could not be read": ([walk(OTHERS, b"/nova/two/disk", b"/nova/on", b"/nova/one/d")], True),
    "another filesystem lies there, with nothing of ours": ([walk(place=8)], False),
    "another filesystem lies there, with disks": ([walk(OTHERS, place=8)], True),
    "nobody knows what lies there": ([walk(place=0)], False),
    "no folder is looked at": ([], True),
    "only another folder is looked at": ([Walk(b"/nov", 7, False, {})], True),
    "a folder in a folder, and one does not see it": (
        [walk(), Walk(b"/nova/one", 7, False, {})],
        False,
    ),
}


@pytest.mark.parametrize("what", GONE)
def test_a_disk_is_gone_when_it_must_have_been_seen(what: str) -> None:
    walks, gone = GONE[what]
    assert is_gone(DISK, A, walks) is gone
    assert standing({A: [DISK]}, walks).get(A) == sorted(
        ([] if gone else [DISK])
        + [DiskEntry(p, b.kind, w.place) for w in walks for p, b in w.found.items() if b.image == A and gone]
    )


def test_a_disk_at_the_root_of_all() -> None:
    disk = DiskEntry(b"/disk", ViewKind.RAW, 0)
    assert not is_gone(disk, A, [Walk(b"/", 0, True, {}, frozenset((b"/",)))])
    assert is_gone(disk, A, [Walk(b"/", 0, True, {})])


def test_all_disks_of_all_images() -> None:
    known = {A: [DISK, DiskEntry(b"/nova/old/disk", ViewKind.RAW, 7)], B: []}
    found = {b"/nova/one/disk": RAW, b"/nova/new/disk": Base(B, ViewKind.ORIGINAL)}
    assert standing(known, [walk(found)]) == {
        A: [DISK],
        B: [DiskEntry(b"/nova/new/disk", ViewKind.ORIGINAL, 7)],
    }
