"""Guests' disks through the real mount: the bytes that `qemu-img convert -O raw` would write, or a refusal.

The origin is scripted (and once a real Glance); the kernel, the daemon and qemu's tools are real.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from tests.cloud import Glance
from tests.cloud.service import poll_until
from tests.hostile import HOSTILE
from tests.node import Node, drop_pages, errno_of, read_buffered, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, SlowHeaders, Status
from tests.qcow2_zoo import HUGE, MIB, SECTOR, ZOO, contents, missing_qemu, qemu, qemu_io, raw_of
from tests.test_guest_disks import LATE_LIES, LATER, bomb
from tests.test_qcow2 import CLUSTER, EXPECTED, small

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(missing_qemu is not None, reason=f"there is no {missing_qemu} (qemu-utils)"),
]

KIB, GIB = 1 << 10, 1 << 30
PAGE: Final = 4096
UNKNOWN: Final = "60000000-0000-4000-8000-00000000ffff"


def id_of(number: int) -> str:
    return f"60000000-0000-4000-8000-{number:012x}"


def image_of_file(image: str, name: str, path: Path, disk_format: str = "qcow2") -> OriginImage:
    """Of a file that stays where it is."""
    size = path.stat().st_size

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            return os.pread(file.fileno(), min(length, size - offset), offset)

    return OriginImage(image, name, size, read, disk_format=disk_format)


def raw(node: Node, image: str) -> Path:
    return node.mountpoint / "raw" / image


def resized(node: Node, image: str, size: str | int) -> Path:
    return node.mountpoint / "resized" / image / str(size)


def digest_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def check_random_reads(path: Path, disk: Path, seed: int, count: int = 12) -> None:
    """Buffered and direct ones, anywhere and about the edges, against a file."""
    size = disk.stat().st_size
    rng = random.Random(seed)
    edges = [0, SECTOR, PAGE, 64 * KIB, 2 * MIB, 4 * MIB, size]
    for number in range(count):
        near = rng.choice(edges) + rng.randrange(-3, 3)
        offset = min(max(near if number % 3 else rng.randrange(size + 1), 0), size + 1)
        length = rng.choice([1, SECTOR, 5000, 64 * KIB, 300_000])
        if number % 2:
            assert read_buffered(path, offset, length) == part_of(disk, offset, length), (offset, length)
        else:
            offset, length = offset // PAGE * PAGE, -(-length // PAGE) * PAGE
            assert read_direct(path, offset, length) == part_of(disk, offset, length), (offset, length)


# ── The zoo ───────────────────────────────────────────────────────────────────────────────────────────

NAMES: Final = [name for name in ZOO if name != "sparse-2t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def origin(folder: Path) -> Iterator[ScriptedOrigin]:
    """Has every image that a test made."""
    with ScriptedOrigin() as origin:
        yield origin


@dataclass(frozen=True)
class Kept:
    """An image of the zoo that the origin has, and its disk as qemu reads it."""

    id: str
    file: Path
    disk: Path


@pytest.fixture(scope="module")
def keeper(folder: Path, origin: ScriptedOrigin) -> dict[str, Kept]:
    return {}


def kept(name: str, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]) -> Kept:
    """Made when it is first asked for."""
    if name not in keeper:
        file = ZOO[name].make(folder)
        id_ = id_of(list(ZOO).index(name))
        keeper[name] = Kept(id_, file, raw_of(file))
        origin.add(image_of_file(id_, name, file))
    return keeper[name]


@pytest.fixture(scope="module")
def zoo_node(tmp_path_factory: pytest.TempPathFactory, origin: ScriptedOrigin) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), origin.url) as node:
        yield node


@pytest.fixture
def node(tmp_path: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    """A daemon with an empty store."""
    with Node(tmp_path, origin.url) as node:
        yield node


@pytest.mark.parametrize("name", NAMES)
def test_the_disk_is_what_qemu_converts_it_to(
    name: str, zoo_node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept(name, folder, origin, keeper)
    path = raw(zoo_node, animal.id)
    assert path.stat().st_size == animal.disk.stat().st_size
    check_random_reads(path, animal.disk, seed=1)  # Cold,
    assert digest_of(path) == digest_of(animal.disk)
    drop_pages(path)
    asked = origin.data_requests
    check_random_reads(path, animal.disk, seed=2)  # and warm.
    assert digest_of(path) == digest_of(animal.disk)
    assert origin.data_requests == asked
    assert poll(lambda: os.getxattr(path, "user.cachefs.state") == b"complete")
    assert zoo_node.path(animal.id).stat().st_size == animal.file.stat().st_size


@pytest.mark.parametrize("name", ["zlib", "zstd-2M", "subclusters-overwritten", "snapshots-v2", "guest-512"])
def test_another_daemon_on_the_same_store_needs_no_glance(
    name: str, node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept(name, folder, origin, keeper)
    path = raw(node, animal.id)
    assert digest_of(path) == digest_of(animal.disk)
    before, asked = path.stat(), origin.data_requests
    node.stop()
    node.start()
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    check_random_reads(path, animal.disk, seed=3)
    assert digest_of(path) == digest_of(animal.disk)
    assert origin.data_requests == asked


def test_two_sparse_tebibytes(node: Node, folder: Path, origin: ScriptedOrigin) -> None:
    file = ZOO["sparse-2t"].make(folder)
    image = id_of(1000)
    origin.add(image_of_file(image, "huge", file))
    path = raw(node, image)
    assert path.stat().st_size == HUGE
    before = origin.bytes_sent
    written = {0: b"\1" * (64 * KIB), 1 << 40: b"\2" * MIB, HUGE - SECTOR: b"\3" * SECTOR}
    rng = random.Random(7)
    for offset, data in written.items():
        assert read_direct(path, offset // PAGE * PAGE, PAGE)[offset % PAGE :] == data[: PAGE - offset % PAGE]
    for _ in range(40):
        offset = rng.randrange(2 * MIB, HUGE - MIB) // PAGE * PAGE
        assert offset // MIB == MIB or read_direct(path, offset, 64 * KIB) == bytes(64 * KIB)
    assert read_buffered(path, (1 << 40) + MIB - 7, 14) == b"\2" * 7 + bytes(7)
    assert read_buffered(path, HUGE - 600, 1000) == bytes(600 - SECTOR) + b"\3" * SECTOR
    assert origin.bytes_sent - before < 8 * MIB
    assert node.status()["store"]["bytes_on_disk"] < 8 * MIB


# ── How little, and how often ─────────────────────────────────────────────────────────────────────────


def test_the_size_costs_one_block_and_the_first_read_two_tables_and_a_window(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("zlib", folder, origin, keeper)
    path, before = raw(node, animal.id), origin.data_requests
    assert path.stat().st_size == animal.disk.stat().st_size
    assert origin.data_requests == before + 1
    assert origin.data[-1].range == "bytes=0-65535"
    assert read_direct(path, 20 * MIB, PAGE) == part_of(animal.disk, 20 * MIB, PAGE)
    asked = [request.extent for request in origin.data[before:]]
    # The header, two tables, the first block of the disk; then one window of a MiB, in two steps at most.
    assert len(asked) <= 4 + 3, asked
    assert sum(end - start for start, end in filter(None, asked)) <= 3 * 64 * KIB + 128 * KIB + 2 * MIB


def test_listing_asks_for_no_image(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("plain", folder, origin, keeper)
    before = origin.data_requests
    for name in ("raw", "resized", "images"):
        assert animal.id in os.listdir(node.mountpoint / name)
    assert origin.data_requests == before
    assert os.listdir(node.mountpoint / "resized" / animal.id) == []
    # Who looks at one after that listing sees its size.
    assert raw(node, animal.id).stat().st_size == animal.disk.stat().st_size


def test_many_readers_of_a_cold_compressed_image(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("zlib", folder, origin, keeper)
    path, before = raw(node, animal.id), origin.bytes_sent
    script = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
    readers = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(12)
    ]
    found = {reader.communicate(timeout=60)[0].strip() for reader in readers}
    assert found == {digest_of(animal.disk)}
    # Clusters that lie out of order are fetched along with others, and once more by themselves.
    assert origin.bytes_sent - before <= 1.25 * animal.file.stat().st_size


OPENER: Final = """
    import os, sys
    sys.stdin.readline()
    file = os.open(sys.argv[1], os.O_RDONLY)
    print(len(os.pread(file, 512, 0)), os.fstat(file).st_size)
"""


def test_fifty_processes_open_one_image_and_it_is_inspected_once(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("v2-compressed", folder, origin, keeper)
    path, before = raw(node, animal.id), len(origin.data)
    command = [sys.executable, "-c", textwrap.dedent(OPENER), str(path)]
    openers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(50)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    answers = {opener.communicate(timeout=60)[0].strip() for opener in openers}
    assert answers == {f"512 {animal.disk.stat().st_size}"}
    asked = [request.extent for request in origin.data[before:]]
    assert len(set(asked)) == len(asked), asked


# ── The same bytes, stored once ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("disk_format", ["raw", "iso", "ami", "ari", "aki"])
def test_a_plain_image_is_its_own_disk(node: Node, origin: ScriptedOrigin, disk_format: str) -> None:
    data = bytearray(contents(3, 3 * MIB + 700))
    if disk_format == "iso":
        data[32 * KIB : 32 * KIB + 7] = b"\x01CD001\x01"
    image = id_of(1100)
    origin.add(OriginImage.of(image, "plain", bytes(data), disk_format=disk_format))
    assert raw(node, image).stat().st_size == len(data)
    assert raw(node, image).read_bytes() == data
    asked = origin.data_requests
    assert node.path(image).read_bytes() == data
    assert resized(node, image, "1G").open("rb").read(len(data) + 10) == data + bytes(10)
    assert origin.data_requests == asked
    node.wait_for_status(lambda status: not status["fetcher"]["bytes_in_memory"])
    assert node.status()["store"]["bytes_cached"] == len(data)
    assert raw(node, image).stat().st_ino != node.path(image).stat().st_ino


@pytest.mark.parametrize("options", [[], ["-c"]])
def test_a_qcow2_and_a_raw_upload_of_one_disk_occupy_the_store_once(
    tmp_path: Path, options: list[str], origin: ScriptedOrigin
) -> None:
    disk, packed = tmp_path / "disk", tmp_path / "packed"
    disk.write_bytes(random.Random(11).randbytes(30 * MIB) + contents(5, 20 * MIB))
    qemu("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", disk, packed)
    one, other = id_of(1201), id_of(1202)
    origin.add(image_of_file(one, "raw", disk, "raw"), image_of_file(other, "qcow2", packed))
    with Node(tmp_path, origin.url) as node:
        digest_of(node.path(one))
        alone = node.wait_for_status(lambda s: not s["fetcher"]["bytes_in_memory"])["store"]["bytes_on_disk"]
        assert digest_of(raw(node, other)) == digest_of(disk)
        both = node.wait_for_status(lambda s: not s["fetcher"]["bytes_in_memory"])["store"]["bytes_on_disk"]
        assert both <= 1.05 * alone, (alone, both)


# ── Origins that are otherwise ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["zlib", "plain", "out-of-order"])
def test_an_image_without_ranges_comes_as_one_stream(
    name: str, tmp_path: Path, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept(name, folder, origin, keeper)
    with (
        ScriptedOrigin([replace(image_of_file(animal.id, name, animal.file), ranges=False)]) as stream,
        Node(tmp_path, stream.url) as node,
    ):
        path = raw(node, animal.id)
        assert path.stat().st_size == animal.disk.stat().st_size
        check_random_reads(path, animal.disk, seed=4)
        assert digest_of(path) == digest_of(animal.disk)
        assert sum(request.status == 200 for request in stream.data) == 1


@pytest.mark.cloud
def test_with_a_real_glance(
    glance: Glance, tmp_path: Path, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animals = {name: kept(name, folder, origin, keeper) for name in ("zlib", "zstd", "guest")}
    ids = {name: glance.upload(name, one.file, disk_format="qcow2") for name, one in animals.items()}
    with Node(tmp_path, glance.endpoint) as node:
        for name, image in ids.items():
            path, disk = raw(node, image), animals[name].disk
            assert path.stat().st_size == disk.stat().st_size
            check_random_reads(path, disk, seed=5)
            assert digest_of(path) == digest_of(disk)


def test_while_glance_is_away_what_is_cached_is_read_and_what_was_found_is_known(
    tmp_path: Path, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    whole, begun = kept("zlib", folder, origin, keeper), kept("plain", folder, origin, keeper)
    bad = id_of(1300)
    images = [image_of_file(one.id, "", one.file) for one in (whole, begun)]
    with (
        ScriptedOrigin([*images, OriginImage.of(bad, "bad", small().l1(0, 1 << 62).file[:70_000])]) as away,
        Node(tmp_path, away.url, mount={"read_deadline": 2}) as node,
    ):
        away.change(bad, disk_format="qcow2")
        digest_of(raw(node, whole.id))
        assert read_buffered(raw(node, begun.id), 0, 4096) == part_of(begun.disk, 0, 4096)
        assert errno_of(lambda: read_buffered(raw(node, bad), 0, 1)) == errno.EPERM
        away.stop()
        node.stop()
        node.start()
        assert digest_of(raw(node, whole.id)) == digest_of(whole.disk)
        assert raw(node, begun.id).stat().st_size == begun.disk.stat().st_size
        assert read_buffered(raw(node, begun.id), 0, 4096) == part_of(begun.disk, 0, 4096)
        assert errno_of(lambda: read_direct(raw(node, begun.id), 36 * MIB, PAGE)) == errno.EIO
        assert errno_of(lambda: read_buffered(raw(node, bad), 0, 1)) == errno.EPERM
        assert resized(node, whole.id, "1G").stat().st_size == GIB
        away.start()
        assert digest_of(raw(node, begun.id)) == digest_of(begun.disk)


def test_an_image_that_is_deleted_or_another_by_now(node: Node, tmp_path: Path, origin: ScriptedOrigin) -> None:
    image = id_of(1400)
    origin.add(OriginImage.of(image, "first", small().file, disk_format="qcow2"))
    far = 4000 * CLUSTER
    node.configure(glance={"listing_ttl": 1, "negative_ttl": 1})
    node.stop()
    node.start()
    first, big = (os.open(path, os.O_RDONLY) for path in (raw(node, image), resized(node, image, "1G")))
    assert os.pread(first, 4 * CLUSTER, 0) == EXPECTED
    looked_up = resized(node, image, "2G").stat().st_ino
    origin.remove(image)
    assert poll(lambda: errno_of(lambda: raw(node, image).open("rb")) == errno.ENOENT)
    assert poll(lambda: errno_of(lambda: resized(node, image, "1G").stat()) == errno.ENOENT)
    assert os.pread(first, 4 * CLUSTER, 0) == EXPECTED
    os.posix_fadvise(first, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(first, 4 * CLUSTER, 0) == EXPECTED
    assert os.pread(first, 512, far) == bytes(512), "a hole, by its tables, which are here"
    other = bytearray(small().file)
    other[6 * CLUSTER : 9 * CLUSTER] = b"\xee" * (3 * CLUSTER)
    origin.add(OriginImage.of(image, "second", bytes(other), disk_format="qcow2"))
    assert poll(lambda: read_buffered(raw(node, image), 0, 512) == b"\xee" * 512)
    assert read_buffered(resized(node, image, "1G"), 0, 512) == b"\xee" * 512
    assert errno_of(lambda: os.pread(first, 512, far // 2)) == errno.EIO
    assert os.pread(big, 512, 0) == EXPECTED[:512]
    os.close(first)
    os.close(big)
    # A size that was only looked up is one of the image that had this id then; a listing may tell of its end, too.
    seen = [looked_up, resized(node, image, "2G").stat().st_ino]
    origin.change(image, status="deleted")
    assert poll(lambda: image not in os.listdir(node.mountpoint / "images"))
    origin.change(image, status="active")
    assert poll(lambda: image in os.listdir(node.mountpoint / "images"))
    seen.append(resized(node, image, "2G").stat().st_ino)
    assert seen[0] not in seen[1:], "that was another image; the last two are one, by its hash"


def poll(holds: Callable[[], bool]) -> bool:
    """Asked again and again: nobody tells when a node has noticed."""

    def is_so() -> bool:
        try:
            return holds()
        except OSError:
            return False

    return poll_until(is_so, 30)


def test_an_image_that_goes_while_it_is_inspected(node: Node, origin: ScriptedOrigin) -> None:
    image = id_of(1500)
    origin.add(OriginImage.of(image, "going", small().file, disk_format="qcow2"))
    assert node.path(image).stat().st_size == len(small().file)
    release = SlowHeaders()
    origin.fault(release)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(errno_of, lambda: raw(node, image).stat())
        origin.wait_for(lambda: any(r.held for r in origin.requests))
        origin.fault(Status(404), kind=Kind.DATA)
        origin.remove(image)
        release.release.set()
        assert asking.result(60) in (None, errno.ENOENT, errno.EIO)
    origin.clear()


# ── Images that lie ───────────────────────────────────────────────────────────────────────────────────

GOOD: Final[dict[str, Callable[[Path], str]]] = {
    "qcow2": lambda path: qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "10M"),
    "vmdk": lambda path: qemu("qemu-img", "create", "-q", "-f", "vmdk", path, "10M"),
    "vhd": lambda path: qemu("qemu-img", "create", "-q", "-f", "vpc", path, "10M"),
    "vhdx": lambda path: qemu("qemu-img", "create", "-q", "-f", "vhdx", path, "10M"),
    "vdi": lambda path: qemu("qemu-img", "create", "-q", "-f", "vdi", path, "10M"),
}


@pytest.fixture(scope="module")
def liars(tmp_path_factory: pytest.TempPathFactory, origin: ScriptedOrigin) -> dict[str, tuple[str, str]]:
    """name → (id, a part of the reason)."""
    folder = tmp_path_factory.mktemp("liars")
    found: dict[str, tuple[str, str]] = {}

    def add(name: str, data: bytes, disk_format: str, reason: str) -> None:
        image = id_of(2000 + len(found))
        origin.add(OriginImage.of(image, f"liar {len(found)}", data, disk_format=disk_format))
        found[name] = image, reason

    good = {}
    for kind, make in GOOD.items():
        make(folder / kind)
        good[kind] = (folder / kind).read_bytes()
    for case in HOSTILE:
        if case.good in good:
            add(f"{case.good}: {case.name}", case.change(good[case.good]), case.good, case.reason)
    inner, outer = folder / "inner", folder / "outer"
    GOOD["qcow2"](inner)
    for flags in ([], ["-c"]):
        qemu("qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", inner, outer)
        add(f"nested {flags}", outer.read_bytes(), "qcow2", "the disk inside it is qcow2")
    add("said to be raw", good["qcow2"], "raw", "its content is qcow2, not raw")
    add("said to be qcow2", bytes(MIB), "qcow2", "its content is raw, not qcow2")
    add("of no format", good["qcow2"], "", "none that can be inspected")
    add("nothing", b"", "qcow2", "not qcow2")
    add("at once a lie", small().l2(0, 1 << 62 | 1 << 40).file, "qcow2", "beyond the end of the file")
    return found


def test_a_liar_is_refused_with_its_reason_and_readable_as_it_is(
    node: Node, origin: ScriptedOrigin, liars: dict[str, tuple[str, str]]
) -> None:
    for name, (image, reason) in liars.items():
        path = raw(node, image)
        for _ in range(2):
            assert errno_of(lambda path=path: path.open("rb")) == errno.EPERM, name  # type: ignore[misc]
        assert errno_of(lambda image=image: resized(node, image, "20G").open("rb")) == errno.EPERM, name  # type: ignore[misc]
        said = os.getxattr(path, "user.cachefs.refused").decode()
        assert reason in said, (name, said)
        assert os.getxattr(path, "user.cachefs.state") == b"refused"
        size = origin.images[image].size or 0
        assert node.path(image).read_bytes() == origin.images[image].content(0, size)
        node.wait_for_log(f"[image {image}] refused as a disk: {said}")
    lines = [line for line in node.log.splitlines() if "refused as a disk" in line]
    assert len(lines) == len(liars), lines  # One for each.
    image, reason = liars["qcow2: a backing file"]
    assert reason in node.cli("image", image).stdout
    assert reason in str(node.ask("image", image=image)["disk"]["refused"])


@pytest.mark.parametrize("lie", [*LATE_LIES, "a bomb"])
def test_a_lie_that_is_met_late(node: Node, origin: ScriptedOrigin, lie: str) -> None:
    data = bomb() if lie == "a bomb" else LATE_LIES[lie](small()).file
    image = id_of(3000)
    origin.add(OriginImage.of(image, "late", data, disk_format="qcow2"))
    before = len(origin.data)
    path = raw(node, image)
    size = path.stat().st_size
    file, big = os.open(path, os.O_RDONLY), os.open(resized(node, image, "1G"), os.O_RDONLY)
    assert os.pread(file, 4 * CLUSTER, 0) == EXPECTED
    for handle in (file, big, file):
        assert errno_of(lambda handle=handle: os.pread(handle, 512, LATER * CLUSTER)) == errno.EIO  # type: ignore[misc]
    assert errno_of(lambda: path.open("rb")) == errno.EPERM
    assert errno_of(lambda: resized(node, image, "1G").open("rb")) == errno.EPERM
    assert errno_of(lambda: resized(node, image, "2G").stat()) == errno.EPERM
    # Who has it open sees no end where there is none.
    assert os.fstat(file).st_size == path.stat().st_size == size
    assert os.pread(file, 4 * CLUSTER, 0) == EXPECTED
    assert errno_of(lambda: os.pread(file, 512, LATER * CLUSTER)) == errno.EIO
    assert node.path(image).read_bytes() == data
    for request in origin.data[before:]:
        assert request.extent is None or request.extent[1] <= len(data)
    assert node.log.count("refused as a disk") == 1
    os.close(file)
    os.close(big)
    assert poll(lambda: node.status()["images"]["open"] == 0)  # The kernel tells of it a moment later.
    node.stop()
    node.start()
    assert errno_of(lambda: path.open("rb")) == errno.EPERM


# ── A larger end ──────────────────────────────────────────────────────────────────────────────────────


def test_which_sizes_there_are(node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]) -> None:
    animal = kept("zlib", folder, origin, keeper)
    disk = animal.disk.stat().st_size
    for name, size in (
        ("1G", GIB),
        (str(GIB), GIB),
        ("20G", 20 * GIB),
        (str(disk), disk),
        (str(disk + 1), disk + 1),
    ):
        assert resized(node, animal.id, name).stat().st_size == size
    assert resized(node, animal.id, "1G").stat().st_ino == resized(node, animal.id, GIB).stat().st_ino
    for name in (str(disk - 1), "1", "512"):
        assert errno_of(lambda name=name: resized(node, animal.id, name).stat()) == errno.EINVAL  # type: ignore[misc]
    for name in (
        "0",
        "0G",
        "-1",
        "+1G",
        "1g",
        "1M",
        "1.5G",
        "01G",
        " 1G",
        "1G ",
        "x",
        "99999999999G",
        "9" * 30,
        "١G",
    ):
        assert errno_of(lambda name=name: resized(node, animal.id, name).stat()) == errno.ENOENT, name  # type: ignore[misc]
    assert errno_of(lambda: resized(node, UNKNOWN, "1G").stat()) == errno.ENOENT
    assert errno_of(lambda: resized(node, animal.id, "1G").open("wb")) == errno.EROFS
    assert os.listdir(node.mountpoint / "resized" / animal.id) == []
    for name in ("20G", "1G", str(disk + 1)):
        read_buffered(resized(node, animal.id, name), 0, 1)
    assert os.listdir(node.mountpoint / "resized" / animal.id) == [str(disk + 1), "1G", "20G"]


def test_opened_sizes_survive_a_restart_with_their_inodes(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("plain", folder, origin, keeper)
    sizes = ("1G", "20G", "3000000001")
    for size in sizes:
        read_buffered(resized(node, animal.id, size), 0, 1)
    resized(node, animal.id, "7G").stat()
    inodes = {size: resized(node, animal.id, size).stat().st_ino for size in sizes}
    assert len({*inodes.values(), raw(node, animal.id).stat().st_ino}) == 4
    node.stop()
    node.start()
    assert sorted(os.listdir(node.mountpoint / "resized" / animal.id)) == sorted(sizes)
    assert {size: resized(node, animal.id, size).stat().st_ino for size in sizes} == inodes
    assert resized(node, animal.id, "8G").stat().st_ino not in inodes.values()


@pytest.mark.parametrize("name", ["zlib", "one-sector", "v2-guest", "nothing"])
def test_behind_the_old_end_are_zeros(
    name: str, node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept(name, folder, origin, keeper)
    disk = animal.disk.read_bytes()
    size = len(disk) + 3 * MIB + 100
    path = resized(node, animal.id, size)
    for _ in range(2):
        assert path.read_bytes() == disk.ljust(size, b"\0")
        drop_pages(path)
    for offset in (0, len(disk) - 1, len(disk), len(disk) + 1, size - 1, size, size + 1, len(disk) // PAGE * PAGE):
        offset = max(offset, 0)
        assert read_buffered(path, offset, 70_000) == disk.ljust(size, b"\0")[offset : offset + 70_000]
        at = offset // PAGE * PAGE
        assert read_direct(path, at, 2 * PAGE) == disk.ljust(size, b"\0")[at : at + 2 * PAGE]
    assert read_direct(resized(node, animal.id, "5000G"), 4999 * GIB, MIB) == bytes(MIB)
    assert node.status()["store"]["bytes_on_disk"] < 64 * MIB


def test_an_overlay_of_qemus_stands_on_a_larger_disk(
    node: Node, tmp_path: Path, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("zlib", folder, origin, keeper)
    disk = animal.disk.stat().st_size
    base, overlay = resized(node, animal.id, "1G"), tmp_path / "overlay.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    assert '"virtual-size": 1073741824' in qemu("qemu-img", "info", "--output=json", overlay)
    qemu_io(overlay, f"read -P 0 {disk // SECTOR * SECTOR} 4M", "write -P 9 900M 64k", "write -P 7 5000 700")
    qemu_io(overlay, "read -P 9 900M 64k", "read -P 0 1000M 1M", "read -P 7 5000 700")
    flat = tmp_path / "flat"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, flat)
    want = bytearray(animal.disk.read_bytes())
    want[5000:5700] = b"\7" * 700
    assert part_of(flat, 0, disk) == want
    assert flat.stat().st_size == GIB
    qemu("qemu-img", "compare", "-f", "raw", "-F", "raw", raw(node, animal.id), base)


def test_while_it_is_open_its_base_is_leased(
    node: Node, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    animal = kept("zlib", folder, origin, keeper)
    for path in (resized(node, animal.id, "1G"), raw(node, animal.id)):
        file = os.open(path, os.O_RDONLY)
        os.pread(file, MIB, 0)
        refused = node.cli("evict", animal.id)
        assert refused.returncode == 1
        assert "open" in refused.stderr + refused.stdout
        assert os.getxattr(path, "user.cachefs.in_use") == b"1"
        os.close(file)
        node.wait_for_status(lambda status: status["images"]["open"] == 0)
        assert os.getxattr(path, "user.cachefs.in_use") == b"0"
    node.wait_for_status(lambda status: not status["fetcher"]["bytes_in_memory"])
    assert node.cli("evict", animal.id).returncode == 0
    assert node.status()["store"]["bytes_cached"] == 0
    drop_pages(raw(node, animal.id))
    assert digest_of(raw(node, animal.id)) == digest_of(animal.disk)


def test_in_a_small_store_disks_are_read_right(
    tmp_path: Path, folder: Path, origin: ScriptedOrigin, keeper: dict[str, Kept]
) -> None:
    """Tables and spans go while others are read."""
    animals = [
        kept(name, folder, origin, keeper) for name in ("zlib", "zstd", "plain", "clusters-1M", "guest-512")
    ]
    with Node(tmp_path, origin.url, store={"max_size": 24 * MIB}) as node, ThreadPoolExecutor(5) as pool:

        def look(animal: Kept) -> bool:
            path = raw(node, animal.id)
            for seed in range(3):
                check_random_reads(path, animal.disk, seed)
                drop_pages(path)
            return digest_of(path) == digest_of(animal.disk)

        for _ in range(2):
            assert all(pool.map(look, animals))
        assert node.status()["store"]["bytes_on_disk"] <= 30 * MIB


def test_attributes_of_what_is_no_image_of_this_kind(node: Node, origin: ScriptedOrigin) -> None:
    assert errno_of(lambda: raw(node, UNKNOWN).stat()) == errno.ENOENT
    assert errno_of(lambda: raw(node, "nonsense").stat()) == errno.ENOENT
    assert errno_of(lambda: (node.mountpoint / "raw" / "x").write_bytes(b"")) == errno.EROFS
    assert errno_of(lambda: os.mkdir(node.mountpoint / "resized" / "x")) == errno.EROFS
