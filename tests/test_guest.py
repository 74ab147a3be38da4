"""A guest boots from an overlay on a mounted disk: the kernel's own way of reading one, through QEMU and past the
page cache. What it read is what the original has; what it did not read was not fetched.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import zstandard

from tests.guest import (
    MIB,
    Guest,
    GuestDisk,
    GuestFailed,
    Said,
    load_order,
    missing_for_guests,
    overlay_on,
    run,
)
from tests.node import Node, read_direct
from tests.origin import Content, Kind, OriginImage, ScriptedOrigin, pattern

_MISSING: Final = missing_for_guests()
pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
]

RAW: Final = "70000000-0000-4000-8000-000000000001"
QCOW2: Final = "70000000-0000-4000-8000-000000000002"
OTHER: Final = "70000000-0000-4000-8000-000000000003"
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Base:
    """A backing file. `view`: its path in the mount. `grown_to`: in bytes, where it is larger than the image."""

    image: str
    view: str
    grown_to: int | None = None


BASES: Final = [
    Base(RAW, f"images/{RAW}"),
    Base(RAW, f"raw/{RAW}"),
    Base(QCOW2, f"raw/{QCOW2}"),
    Base(QCOW2, f"resized/{QCOW2}/1G", GIB),
    Base(QCOW2, f"resized/{QCOW2}/{200 * MIB + 1536}", 200 * MIB + 1536),
]
NAMES: Final = ["original", "raw", "raw-of-qcow2", "resized-in-gib", "resized-in-bytes"]


def content_of(path: Path) -> Content:
    def read(offset: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return read


def uploaded(image: str, path: Path, disk_format: str) -> OriginImage:
    size = path.stat().st_size
    return OriginImage(image, disk_format, size, content_of(path), disk_format=disk_format).hashed()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestDisk]:
    made = GuestDisk.make(tmp_path_factory.mktemp("guest"))
    yield made
    made.path.unlink()  # pytest keeps the folders of its last runs.


@pytest.fixture(scope="module")
def images(disk: GuestDisk) -> Iterator[list[OriginImage]]:
    qcow2 = disk.path.with_suffix(".qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", disk.path, qcow2)
    yield [uploaded(RAW, disk.path, "raw"), uploaded(QCOW2, qcow2, "qcow2")]
    qcow2.unlink()


@pytest.fixture
def origin(images: list[OriginImage]) -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture
def node(tmp_path: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    with Node(tmp_path, origin.url) as node:
        yield node


def boot(overlay: Path, look: list[int]) -> Said:
    with Guest(overlay, look=look) as guest:
        return guest.finish()


def all_landed(node: Node) -> None:
    """Once a guest has read: what was fetched for it, and with it, is in the store."""
    node.wait_for_status(lambda now: now["fetcher"]["flights"] == now["fetcher"]["bytes_in_memory"] == 0)


@pytest.mark.parametrize("base", BASES, ids=NAMES)
def test_a_guest_boots(base: Base, node: Node, origin: ScriptedOrigin, tmp_path: Path, disk: GuestDisk) -> None:
    """Twice from one disk, and what is fetched is fetched for the first boot."""
    overlay = overlay_on(node.mountpoint / base.view, tmp_path / "overlay.qcow2")
    size = base.grown_to or disk.size
    look = [0, disk.size // MIB, (size - 1) // MIB]  # The table, where the image ends, and where the disk does.
    for boots in (1, 2):
        said = boot(overlay, look)
        assert said.files == disk.files
        assert said.mibs == disk.hashes_of(look, size)
        assert said.disk_bytes == size
        assert said.boots == boots  # It found what it had written.
        all_landed(node)
        if boots == 1:
            fetched, requests = origin.bytes_sent, origin.data_requests
    image = origin.images[base.image].size
    assert image is not None
    print(f"{base.view}: {fetched / MIB:.1f} of {image / MIB:.1f} MiB fetched by {requests} requests")
    assert 0 < fetched < image // 2
    assert (origin.bytes_sent, origin.data_requests) == (fetched, requests)
    assert {request.image for request in origin.of_kind(Kind.DATA)} == {base.image}
    run("qemu-img", "check", "-f", "qcow2", overlay)


@pytest.mark.parametrize("base", [BASES[2], BASES[3]], ids=[NAMES[2], NAMES[3]])
def test_glance_dies_between_the_boots_of_two_guests(
    base: Base, node: Node, origin: ScriptedOrigin, tmp_path: Path, disk: GuestDisk
) -> None:
    """One base below both: the second boots without Glance, and the first, which runs all the while, reads on."""
    view = node.mountpoint / base.view
    first, second = (overlay_on(view, tmp_path / f"{name}.qcow2") for name in ("first", "second"))
    with Guest(first, again=True) as guest:
        guest.wait_for("guest: waiting")
        all_landed(node)
        fetched = origin.bytes_sent
        origin.stop()
        said = boot(second, [])
        assert (said.files, said.boots) == (disk.files, 1)
        guest.go_on()
        said = guest.finish()
    assert said.files == said.again == disk.files
    third = overlay_on(view, tmp_path / "third.qcow2")
    node.stop()
    node.start()  # And a daemon that has never seen Glance boots one more.
    assert boot(third, []).files == disk.files
    origin.start()
    assert origin.bytes_sent == fetched


def test_two_guests_share_a_base_that_a_full_store_keeps_while_glance_dies(
    tmp_path: Path, origin: ScriptedOrigin, disk: GuestDisk
) -> None:
    """The first has run, and is stopped; then others fill the store, Glance dies and the node boots. The second
    finds all of the base, also what no guest had read."""
    size, bytes_of = 160 * MIB, pattern(160 * MIB)
    origin.add(OriginImage(OTHER, "other", size, bytes_of))
    node = Node(tmp_path, origin.url, store={"max_size": "144M"})
    node.configure(hydration={"mode": "on-open"})
    for name in ("one", "two"):
        (tmp_path / "instances" / name).mkdir(parents=True)
    with node:
        view = node.mountpoint / "raw" / QCOW2
        first, second = (overlay_on(view, tmp_path / "instances" / name / "disk") for name in ("one", "two"))
        assert boot(first, []).files == disk.files
        node.wait_for_status(lambda now: now["hydration"]["images"] == 0)
        for at in range(0, size, 4 * MIB):
            assert read_direct(node.path(OTHER), at, 4 * MIB) == bytes_of(at, 4 * MIB)
        evicted = node.status()["evictor"]["evicted"]
        assert sum(cause["bytes"] for cause in evicted.values()) > 0, "the store was full"
        fetched = origin.bytes_sent
        origin.stop()
        node.stop()
        node.start()
        look = [*range(0, disk.size // MIB, 6), disk.size // MIB]
        said = boot(second, look)
        assert (said.files, said.mibs) == (disk.files, disk.hashes_of(look, disk.size))
        refused = node.cli("evict", QCOW2).stderr
        assert refused.endswith(f"is not evicted: it is named by an instance disk ({first}, {second})\n")
    origin.start()
    assert origin.bytes_sent == fetched


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    """From wherever they are, and however a distribution packs them; what is built in is no module."""
    modules: list[tuple[str, bytes, Callable[[bytes], bytes]]] = [
        ("top.ko.xz", b"first,second-part", lzma.compress),
        ("first.ko", b"", bytes),
        ("second-part.ko.zst", b"first", zstandard.ZstdCompressor().compress),
        ("other.ko", b"top", bytes),
    ]
    for name, depends, pack in modules:
        (tmp_path / f"of-{name}").mkdir()
        (tmp_path / f"of-{name}" / name).write_bytes(pack(b"\0depends=%b\0name=top\0" % depends))
    order = load_order(tmp_path, ["built_in", "top"])
    assert [name for name, _ in order] == ["first", "second_part", "top"]
    assert all(data.startswith(b"\0depends=") for _, data in order)


def test_a_failure_shows_the_console(tmp_path: Path) -> None:
    """And leaves nothing behind, whatever the guest was at."""
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(MIB))
    overlay = overlay_on(empty, tmp_path / "overlay.qcow2")
    with Guest(overlay) as guest, pytest.raises(GuestFailed, match="guest: there is no root disk"):
        guest.finish()
    with Guest(overlay) as guest:
        pid = guest.pid
    assert not Path(f"/proc/{pid}").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty.raw", "overlay.qcow2"}
