"""Walks over real folders, with all that may lie there."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from cachefs import instance_walk
from cachefs.formats.qcow2_backing import HEAD_BYTES
from cachefs.instance_walk import Walker
from cachefs.namespace import base_name
from cachefs.plan.instances import Base, BaseNames
from cachefs.store.format import ViewKind
from tests.instance_disks import head, make_disk
from tests.stores import image_id

MOUNT: Final = Path("/mnt/cachefs-of-no-test")
A, B = image_id(0xA), image_id(0xB)


def image(name: str = A, folder: str = "raw") -> Path:
    return MOUNT / folder / name


def walked(folder: Path, *mountpoints: Path, device: int | None = None) -> Walker:
    """A walk to its end, in as many steps as it takes."""
    spelt = [os.fsencode(path) for path in mountpoints or (MOUNT,)]
    before = set(os.listdir("/proc/self/fd"))
    walker = Walker(os.fsencode(folder), spelt, lambda: device)
    found = []
    while not walker.done:
        found += walker.step()
        assert not walker.busy
    assert set(os.listdir("/proc/self/fd")) == before, "nothing is left open"
    if walker.trouble is None:
        assert dict(found) == walker.walk.found, "what it comes to was said on the way"
    return walker


def names(walker: Walker, folder: Path) -> dict[str, Base]:
    return {os.path.relpath(os.fsdecode(path), folder): base for path, base in walker.walk.found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two instances as Nova has them, one of them with a disk in another format."""
    nova = tmp_path / "instances"
    make_disk(nova / "one" / "disk", image())
    (nova / "one" / "console.log").write_text("hello")
    (nova / "one" / "disk.config").write_bytes(bytes(4096))
    (nova / "two" / "disk").parent.mkdir()
    (nova / "two" / "disk").write_bytes(b"\xeb\x63\x90" + bytes(100_000))
    (nova / "compute_nodes").write_text("{}")
    return nova


def test_disks_are_found_and_all_else_is_passed_over(folder: Path) -> None:
    make_disk(folder / "three" / "disk", image(B, "images"))
    make_disk(folder / "three" / "disk.swap", folder / "_base" / "swap_512")
    make_disk(folder / "three" / "disk.eph0", image(B, "images"), version=2)
    make_disk(folder / "three" / "far", image(B, "resized") / "20G", at=(1 << 16) - 200)
    make_disk(folder / "snap", b"three/disk")
    walker = walked(folder)
    assert names(walker, folder) == {
        "one/disk": Base(A, ViewKind.RAW),
        "three/disk": Base(B, ViewKind.ORIGINAL),
        "three/disk.eph0": Base(B, ViewKind.ORIGINAL),
        "three/far": Base(B, ViewKind.RAW),
    }
    assert walker.walk.whole
    assert walker.walk.unread == frozenset()
    assert (walker.trouble, walker.first_error) == (None, None)
    assert walker.walk.place != 0
    assert walked(folder).walk.place == walker.walk.place, "it is the same filesystem"
    assert walked(Path("/proc/sys/kernel")).walk.place not in (0, walker.walk.place), "and that another one"


def test_a_name_ends_at_a_zero_byte_and_a_relative_one_begins_at_the_disk(folder: Path) -> None:
    make_disk(folder / "zero", os.fsencode(image(B)) + b"\0rest")
    make_disk(folder / "five" / "relative", os.fsencode(os.path.relpath(image(B), folder / "five")))
    found = names(walked(folder), folder)
    assert found["zero"] == found["five/relative"] == Base(B, ViewKind.RAW)


def test_every_spelling_of_the_mountpoint_counts(folder: Path, tmp_path: Path) -> None:
    make_disk(folder / "x", tmp_path / "b" / "raw" / B)
    assert set(names(walked(folder, MOUNT, tmp_path / "b"), folder)) == {"one/disk", "x"}


def test_a_link_is_not_followed_and_what_is_no_file_is_not_opened(folder: Path, tmp_path: Path) -> None:
    elsewhere = make_disk(tmp_path / "elsewhere" / "disk", image(B))
    (folder / "link").symlink_to(elsewhere)
    (folder / "folder").symlink_to(elsewhere.parent)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")  # Opened for reading, it would wait for a writer.
    if os.geteuid() == 0:
        os.mknod(folder / "device", stat.S_IFCHR | 0o600, os.makedev(10, 130))  # A watchdog, should there be one.
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(folder / "socket"))
    walker = walked(folder)
    listening.close()
    assert set(names(walker, folder)) == {"one/disk"}
    assert walker.walk.whole
    assert walker.unread == 0


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert set(names(walked(tmp_path / "link"), tmp_path / "link")) == {"one/disk"}


@pytest.mark.parametrize(
    "data",
    [
        b"QFI\xfb", head(b"n", version=9), head(b"n", length=4000), head(b"", length=100), head(b"n",
        cluster_bits=99), head(b"n", at=(1 << 16) - 1)[:HEAD_BYTES],
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_counts_as_not_read(data: bytes, folder: Path) -> None:
    (folder / "one" / "odd").write_bytes(data)
    walker = walked(folder)
    assert walker.walk.unread == {os.fsencode(folder / "one" / "odd")}
    assert walker.first_error is not None
    assert walker.first_error.startswith(f"{folder}/one/odd: ")
    assert set(names(walker, folder)) == {"one/disk"}
    assert walker.walk.whole


def test_of_a_large_file_no_more_than_its_head_is_read(folder: Path) -> None:
    disk = make_disk(folder / "huge", image(B))
    os.truncate(disk, 1 << 40)
    before = _bytes_read()
    assert "huge" in names(walked(folder), folder)
    assert _bytes_read() - before < 200_000


def _bytes_read() -> int:
    with open("/proc/self/io") as counts:
        return int(dict(line.split(": ") for line in counts)["rchar"])


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another account")
def test_what_may_not_be_read_is_said() -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-") as made:  # pytest's folders are for their owner alone.
        folder = Path(made)
        folder.chmod(0o755)
        make_disk(folder / "one" / "disk", image())
        make_disk(folder / "secret" / "disk", image(B)).parent.chmod(0o700)
        make_disk(folder / "shown" / "disk", image(B)).chmod(0o600)
        os.seteuid(65534)
        try:
            walker = walked(folder)
        finally:
            os.seteuid(0)
    assert walker.walk.unread == {os.fsencode(folder / "secret"), os.fsencode(folder / "shown" / "disk")}
    assert walker.first_error is not None
    assert walker.first_error.endswith(": Permission denied")
    assert set(names(walker, folder)) == {"one/disk"}
    assert walker.walk.whole, "but for what could not be read"


@pytest.mark.parametrize(("what", "trouble"), [("none", "it is not there"), ("file", "Not a directory")])
def test_what_is_no_folder_is_said_and_is_no_walk(what: str, trouble: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    walker = walked(tmp_path / what)
    assert (walker.trouble, walker.walk.whole) == (trouble, False)


def test_an_empty_folder_is_no_walk(tmp_path: Path) -> None:
    """Nobody knows whether something should be mounted there."""
    walker = walked(tmp_path)
    assert (walker.trouble, walker.walk.whole) == ("it is empty", False)


def test_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(600):
        make_disk(folder / "many" / f"disk{number}", image(B))
    deep = Path(*(str(level) for level in range(instance_walk.DEPTH_MAX)))
    make_disk(folder / deep / "deep", image(B))
    make_disk(folder / deep / "too" / "deep", image(B))
    walker = walked(folder)
    assert len(walker.walk.found) == 602
    assert str(deep / "deep") in names(walker, folder)
    assert walker.walk.whole, "what is too deep is never looked at"
    monkeypatch.setattr(instance_walk, "DISKS_MAX", 100)
    assert (walked(folder).walk.whole, len(walked(folder).walk.found)) == (False, 100)
    monkeypatch.setattr(instance_walk, "DISKS_MAX", 1000)
    monkeypatch.setattr(instance_walk, "ENTRIES_MAX", 300)
    walker = walked(folder)
    assert not walker.walk.whole
    assert walker.entries == 301
    assert walker.trouble is not None
    assert walker.trouble.startswith("there is more than is looked at")


def test_more_than_can_be_remembered_as_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (folder / f"odd{number}").write_bytes(b"QFI\xfb")
    monkeypatch.setattr(instance_walk, "UNREAD_MAX", 10)
    walker = walked(folder)
    assert (walker.unread, walker.walk.whole) == (10, False)


def test_its_own_mount_is_not_walked_into(folder: Path) -> None:
    make_disk(folder / "_base" / "disk", image(B))
    assert set(names(walked(folder, folder / "_base", MOUNT), folder)) == {"one/disk"}
    walker = walked(folder, device=folder.stat().st_dev)
    assert (walker.walk.found, walker.walk.whole) == ({}, False)


def test_a_folder_that_is_bound_is_not_walked_into_and_its_names_mean_images(folder: Path) -> None:
    bound = folder / "_base"
    make_disk(bound / "disk", image(B))
    make_disk(folder / "two" / "disk", bound / base_name(A).decode())
    spelt = BaseNames({base_name(A): A}.get, ViewKind.RAW, (os.fsencode(bound),))

    def found(known: BaseNames | None) -> dict[str, Base]:
        walker = Walker(os.fsencode(folder), [os.fsencode(MOUNT)], names=lambda: known)
        while not walker.done:
            walker.step()
        return names(walker, folder)

    one = {"one/disk": Base(A, ViewKind.RAW)}
    assert found(spelt) == one | {"two/disk": Base(A, ViewKind.RAW)}
    assert found(None) == one | {"_base/disk": Base(B, ViewKind.RAW)}


def test_a_bind_is_known_by_its_real_place_and_named_by_a_link_to_it(folder: Path) -> None:
    bound, link = folder / "_base", folder.with_name("link")
    bound.mkdir()
    link.symlink_to(folder)
    make_disk(folder / "two" / "disk", link / "_base" / base_name(A).decode())
    make_disk(folder / "three" / "disk", bound / base_name(A).decode())
    make_disk(bound / "disk", image(B))
    spelt = BaseNames({base_name(A): A}.get, ViewKind.RAW, (os.fsencode(bound), os.fsencode(f"{folder}2/_base")))
    for spelling in (str(link), f"{link}/"):
        walker = Walker(os.fsencode(spelling), [os.fsencode(MOUNT)], names=lambda: spelt)
        while not walker.done:
            walker.step()
        found = {os.path.relpath(os.fsdecode(path), spelling): base for path, base in walker.walk.found.items()}
        assert found == dict.fromkeys(("one/disk", "two/disk", "three/disk"), Base(A, ViewKind.RAW))


def test_names_of_any_bytes(folder: Path) -> None:
    odd = os.path.join(os.fsencode(folder), b"\xff\x80 \n\x1b[31m")
    os.mkdir(odd)
    Path(os.fsdecode(odd), "disk").write_bytes(head(os.fsencode(image(B))))
    assert walked(folder).walk.found[odd + b"/disk"] == Base(B, ViewKind.RAW)


def test_a_tree_that_changes_while_it_is_walked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes, or becomes something else, between two looks at it is no trouble."""
    monkeypatch.setattr(instance_walk, "STEP_ENTRIES", 1)
    for number in range(20):
        make_disk(folder / "busy" / f"disk{number}", image(B))
        make_disk(folder / f"gone{number}" / "disk", image(B))
    walker = Walker(os.fsencode(folder), [os.fsencode(MOUNT)])
    numbers = iter(range(20))
    while not walker.done:
        walker.step()
        for number in itertools.islice(numbers, 1):
            (folder / "busy" / f"disk{number}").unlink()
            (folder / "busy" / f"disk{number}").symlink_to("nowhere")
            shutil.rmtree(folder / f"gone{number}")
            (folder / f"gone{number}").write_text("a file now")
    assert (walker.unread, walker.trouble) == (0, None)
    assert os.fsencode(folder / "one" / "disk") in walker.walk.found


def test_what_is_given_up_in_the_middle_is_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_walk, "STEP_ENTRIES", 1)
    before = len(os.listdir("/proc/self/fd"))
    walker = Walker(os.fsencode(folder), [os.fsencode(MOUNT)])
    walker.step()
    assert len(os.listdir("/proc/self/fd")) > before
    walker.given_up = True
    walker.step()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not walker.walk.whole


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder on which a filesystem of its own is mounted."""
    where = tmp_path / "mounted"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(where)], check=False, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False)


def test_what_lies_under_a_mount_is_another_place(mounted: Path) -> None:
    make_disk(mounted / "one" / "disk", image())
    above = walked(mounted)
    subprocess.run(["umount", str(mounted)], check=True)
    (mounted / "one").mkdir()
    below = walked(mounted)
    assert 0 not in (above.place, below.place)
    assert above.place != below.place
    assert above.walk.found
    assert not below.walk.found
