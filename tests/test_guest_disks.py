"""Disks inside images, in virtual time: who asks for what, how often, how much at once, and what becomes of an
image that lies, or is another one by the time that its bytes come.
"""

from __future__ import annotations

import mmap
import struct
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import event, given
from hypothesis import strategies as st

from cachefs import bounds, huge, translation
from cachefs.catalog import Catalog, Disk, Image
from cachefs.errors import (
    CachefsError,
    FormatError,
    ImageGone,
    ImageRefused,
    NoEntry,
    OriginError,
    OriginUnavailable,
)
from cachefs.fetcher import MEMORY_MAX
from cachefs.flights import Priority
from cachefs.guest_disks import GuestDisks
from cachefs.plan.extents import BLOCK, Extent
from cachefs.sources import Sink, Timing
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.room import Limits
from cachefs.translation import FETCHES_MAX, ROOMS_MAX, STEP_MAX, STEPS_AT_ONCE
from cachefs.views.stored import StoredFile
from tests import test_qcow2 as qcow2
from tests.flow import Flow, Refuse, ScriptedSource, Stall, flow, until, virtual_time
from tests.qcow2_zoo import qemu
from tests.stores import SPAN, UNLIMITED, examples, image_id
from tests.test_catalog import ScriptedRegistry, answer

stock = qcow2.stock  # The fixture.

KIB, MIB = 1 << 10, 1 << 20
ONE, TWO = 1, 2


@dataclass
class FileSource(ScriptedSource):
    """Gives files, to whoever asks for bytes that they have. `at_once_bytes`: the most that was asked for and had
    not come."""

    files: dict[int, bytes] = field(default_factory=dict)
    at_once_bytes: int = 0

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        number = int(image.replace("-", ""), 16)
        assert 0 <= extent.start < extent.end <= size == len(self.files[number]), "nothing outside the file"
        under_way = sum(r.extent.length for r in self.requests if r.running and not r.stream)
        self.at_once_bytes = max(self.at_once_bytes, under_way + extent.length)
        return await self._answer(image, extent, False, sink)

    def bytes_of(self, image: int, start: int, end: int) -> bytes:
        return self.files[image][start:end]

    @property
    def fetched(self) -> int:
        return sum(request.got for request in self.requests)


@dataclass
class Den:
    """The way of a read of a guest's disk, as the daemon joins it."""

    flow: Flow
    source: FileSource
    registry: ScriptedRegistry
    catalog: Catalog
    disks: GuestDisks

    async def image(self, number: int = ONE) -> Image:
        return await self.catalog.lookup(image_id(number))

    async def open(self, number: int = ONE) -> StoredFile:
        return StoredFile(await self.disks.open(await self.image(number)), self.flow.blocks)

    async def read(self, offset: int, length: int, number: int = ONE) -> bytes:
        """By somebody who was never here before."""
        return bytes(await (await self.open(number)).read(offset, length))

    def known(self, number: int = ONE) -> Disk | None:
        image = self.catalog.known(image_id(number))
        return image.disk if image is not None else None

    def upload(self, number: int, file: bytes, **fields: Any) -> None:
        id_ = image_id(number)
        self.registry.has[id_] = answer(id_, size=len(file), **{"disk_format": "qcow2", "checksum": None} | fields)
        self.registry.has[id_]["os_hash_value"] = None
        self.source.files[number] = file


@asynccontextmanager
async def den(
    folder: Path,
    files: Mapping[int, bytes],
    *,
    limits: Callable[[], Limits] = lambda: UNLIMITED,
    memory_max: int = MEMORY_MAX,
    read_deadline_s: float = 60.0,
    span_size: int = SPAN,
    **source: Any,
) -> AsyncIterator[Den]:
    made = FileSource(**source)
    async with flow(
        folder,
        made,
        doubling_allowed=True,
        limits=limits,
        memory_max=memory_max,
        read_deadline_s=read_deadline_s,
        span_size=span_size,
    ) as joined:
        registry = ScriptedRegistry()
        catalog = Catalog(registry, joined.store)
        await joined.services.start(catalog.run)
        disks = GuestDisks(catalog, joined.store, joined.fetcher, joined.blocks)
        joined.fetcher.translate = disks.bring
        joined.blocks.reach = disks.reach
        found = Den(joined, made, registry, catalog, disks)
        for number, file in files.items():
            found.upload(number, file)
        yield found
        await joined.settled()


async def outcomes(count: int, ask: Callable[[], Any]) -> list[Any]:
    """What so many at once get."""
    got: list[Any] = []

    async def one() -> None:
        try:
            got.append(await ask())
        except CachefsError as error:
            got.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return got


SMALL = qcow2.small().file
SMALL_SIZE = qcow2.Disk(SMALL).header.size


@lru_cache
def converted(folder: Path, *options: str) -> tuple[bytes, bytes]:
    """A disk of 9 MiB, and a qcow2 of it."""
    source, image = folder / "source", folder / "image"
    disk = b"".join(b"%063d\n" % number for number in range(3 * MIB // 64)) + bytes(4 * MIB)
    disk += b"".join(struct.pack(">Q", n * 0x9E37_79B9_7F4A_7C15 & (1 << 64) - 1) for n in range(2 * MIB // 8))
    source.write_bytes(disk)
    qemu("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", source, image)
    return image.read_bytes(), disk


# ── Asked for once ────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_many_that_open_one_image_at_once_inspect_it_once(tmp_path: Path) -> None:
    async with den(tmp_path, {ONE: SMALL}) as here:
        views = await outcomes(50, here.open)
        assert len(views) == 50
        assert {view.size for view in views} == {SMALL_SIZE}
        # Its header, L1 and L2 lie in two blocks; the disk's first block of data in the next ones.
        assert len({r.extent for r in here.source.requests}) == len(here.source.requests) <= 5
        assert here.known() == Disk(size=SMALL_SIZE, format="qcow2", seen=True)


@qcow2.needs_qemu
@virtual_time
async def test_two_requests_open_a_cold_image(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its header tells where the tables are; those and the first cluster come together."""
    folder = tmp_path_factory.mktemp("open")
    file, disk = converted(folder, "-c")
    async with den(folder / "store", {ONE: file}) as here:
        view = await here.open()
        assert len(here.source.requests) == 2
        assert here.source.fetched <= 4 * BLOCK, "header, two tables, one cluster"
        assert bytes(await view.read(0, 4096)) == disk[:4096]


@qcow2.needs_qemu
@virtual_time
async def test_a_disk_whose_beginning_is_here_opens_without_the_file(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Also when nobody has looked inside, or that was not remembered, and Glance is away."""
    folder = tmp_path_factory.mktemp("here")
    file, disk = converted(folder, "-c")
    async with den(folder / "store", {ONE: file}) as here:
        await here.read(0, MIB)
        await here.flow.settled()
        known, store = here.known(), here.flow.store
        assert known is not None
        here.catalog.learn_disk(image_id(ONE), replace(known, seen=False))
        original = store.known_view(image_id(ONE), ViewKind.ORIGINAL)
        assert original is not None
        await store.evict([(original.number, SpanNo(span)) for span in range(original.spans)])
        here.disks.forget(image_id(ONE))  # As after a start.
        asked = len(here.source.requests)
        here.source.act = lambda request: Refuse(OriginUnavailable)
        assert await here.read(0, 4096) == disk[:4096]
        assert len(here.source.requests) == asked
        assert here.known() == known


@virtual_time
async def test_a_failed_inspection_is_everybodys_failure_at_once(tmp_path: Path) -> None:
    """And not one after the other's."""
    async with den(tmp_path, {ONE: SMALL}, act=lambda r: Refuse(OriginUnavailable), read_deadline_s=30) as here:
        await here.image()
        began_s = trio.current_time()
        errors = await outcomes(50, here.open)
        assert all(isinstance(error, OriginError) for error in errors)
        assert trio.current_time() < began_s + 31
        assert here.known() is None
        here.source.act = lambda request: None
        assert await here.read(0, 512) == qcow2.EXPECTED[:512]  # It was not remembered.


@virtual_time
async def test_what_is_known_is_not_asked_for_again(tmp_path: Path) -> None:
    async with den(tmp_path, {ONE: SMALL}) as here:
        assert await here.read(0, 4096) == qcow2.EXPECTED[:4096]
        asked = len(here.source.requests)
        await here.disks.inspect(await here.image())
        await here.open()
        assert await here.read(0, 4096) == qcow2.EXPECTED[:4096]
        assert len(here.source.requests) == asked


@qcow2.needs_qemu
@pytest.mark.parametrize("options", [(), ("-c",), ("-c", "-o", "cluster_size=4k"), ("-o", "cluster_size=512")])
@virtual_time
async def test_many_readers_of_one_cold_image_fetch_each_byte_once(
    tmp_path_factory: pytest.TempPathFactory, options: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("once")
    file, disk = converted(folder, *options)
    async with den(folder / "store", {ONE: file}) as here:

        async def whole() -> bytes:
            view = await here.open()
            got = bytearray()
            while len(got) < len(disk):
                got += await view.read(len(got), 128 * KIB)
            return bytes(got)

        assert all(got == disk for got in await outcomes(10, whole))
        # But for sectors that two clusters share, what lies between, and what lies in one block with a table.
        assert here.source.fetched < len(file) * (1.25 if "cluster_size=512" in options else 1.1) + 2 * BLOCK
        asked = len(here.source.requests)
        assert await whole() == disk
        assert len(here.source.requests) == asked


@qcow2.needs_qemu
@virtual_time
async def test_memory_that_steps_and_slabs_hand_to_each_other_is_whose_it_is(tmp_path: Path) -> None:
    """Spans of the size of a step: what was unpacked becomes a slab, and the slab's place one of later steps. Two
    disks are read from both ends at once, with memory for few of them."""
    disks = {}
    for number in (ONE, TWO):
        source, image = tmp_path / f"source-{number}", tmp_path / f"image-{number}"
        words = range(number << 32, (number << 32) + 42 * MIB // 64)
        source.write_bytes(disk := b"".join(b"%063d\n" % word for word in words))
        qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
        disks[number] = disk, image.read_bytes()
    files = {number: file for number, (_, file) in disks.items()}
    async with den(tmp_path / "store", files, memory_max=40 * MIB, span_size=STEP_MAX) as here:

        async def whole(number: int, start: int) -> None:
            view, disk = await here.open(number), disks[number][0]
            for offset in (*range(start, len(disk), MIB), *range(0, start, MIB)):
                assert bytes(await view.read(offset, MIB)) == disk[offset : offset + MIB], offset

        for _ in range(2):  # And once more, as it was kept.
            async with trio.open_nursery() as nursery:
                for number in disks:
                    for start in (0, 21 * MIB):
                        nursery.start_soon(whole, number, start)
            await here.flow.settled()
        assert here.flow.store.writer.lander.rotten_found == 0


@qcow2.needs_qemu
@virtual_time
async def test_memory_of_steps_that_were_handed_on_goes_when_others_need_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though requests that they have in common are still under way."""
    source, image = tmp_path / "source", tmp_path / "image"
    source.write_bytes(b"".join(b"%063d\n" % word for word in range(96 * MIB // 64)))
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    places: list[weakref.ref[mmap.mmap]] = []

    def counted(size: int) -> mmap.mmap:
        made = huge.place(size)
        places.append(weakref.ref(made))
        return made

    for module in (bounds, translation):
        monkeypatch.setattr(module, "place", counted)
    others, memory_max, kept = 64 * MIB, 32 * MIB, Limits(1, 0)
    files = {ONE: image.read_bytes(), TWO: bytes(others)}
    stall = Stall(trio.Event(), 2 * MIB)
    async with den(
        tmp_path / "store", files, memory_max=memory_max, span_size=STEP_MAX, limits=lambda: kept
    ) as here:
        disk = await here.disks.open(await here.image())
        here.source.act = lambda request: stall if request.extent.length > 2 * MIB else None
        flight = here.flow.fetcher.start(disk, Extent(4 * MIB, 92 * MIB), Priority.DEMAND)
        await until(lambda: flight.at >= 8 * MIB + memory_max)  # So much was handed on of one group.
        other = here.flow.store.view(image_id(TWO), ViewKind.ORIGINAL, others)
        for at in range(0, others, MIB):
            await here.flow.fetcher.start(other, Extent(at, at + MIB), Priority.DEMAND).ended.wait()
        alive = sum(len(found) for one in places if (found := one()) is not None)
        assert alive <= memory_max + (ROOMS_MAX + STEPS_AT_ONCE + 1) * STEP_MAX
        stall.until.set()
        await flight.ended.wait()


@qcow2.needs_qemu
@virtual_time
async def test_an_image_that_comes_as_one_stream_comes_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stream")
    file, disk = converted(folder, "-c")
    async with den(folder / "store", {ONE: file}, streams_only={ONE}) as here:
        view = await here.open()
        assert bytes(await view.read(8 * MIB, 4096)) == disk[8 * MIB : 8 * MIB + 4096]
        for offset in range(0, len(disk), MIB):
            assert bytes(await view.read(offset, MIB)) == disk[offset : offset + MIB]
        assert sum(r.stream for r in here.source.requests) == 1


# ── How much at once ──────────────────────────────────────────────────────────────────────────────────


@lru_cache
def dust(stride: int = 8 * KIB) -> tuple[bytes, bytes]:
    """A disk of 4 MiB in clusters of 512 bytes, each `stride` from the next in its file, and so are its tables."""
    cluster, clusters = 512, 8192
    tables = clusters // 64
    at = MIB
    entries, data = [], []
    for number in range(clusters):
        entries.append((1 << 63) | at)
        data.append((at, struct.pack(">Q", number + 1) * (cluster // 8)))
        at += stride
    places = [at + n * stride for n in range(tables)]
    file = bytearray(places[-1] + stride)
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 9, clusters * cluster, 0, tables, 4096, 65536, 1, 0, 0
    )
    file[: len(head) + 40] = head + struct.pack(">QQQII", 0, 0, 0, 4, 112) + bytes(8)
    struct.pack_into(f">{tables}Q", file, 4096, *((1 << 63) | place for place in places))
    for n, place in enumerate(places):
        struct.pack_into(">64Q", file, place, *entries[n * 64 : n * 64 + 64])
    for place, some in data:
        file[place : place + cluster] = some
    return bytes(file), b"".join(some for _, some in data)


@virtual_time
async def test_a_disk_in_dust_takes_no_more_memory_nor_bytes_than_its_file(tmp_path: Path) -> None:
    file, disk = dust()
    async with den(tmp_path, {ONE: file}, rate=500e6) as here:
        view = await here.open()
        for offset in range(0, len(disk), MIB):
            assert bytes(await view.read(offset, MIB)) == disk[offset : offset + MIB]
        assert here.source.at_once_bytes <= 2 * FETCHES_MAX
        assert here.source.fetched <= 1.1 * len(file)
        assert here.source.at_once_max <= 8


@virtual_time
async def test_tables_are_fetched_side_by_side(tmp_path: Path) -> None:
    file, disk = dust(stride=64 * KIB)
    async with den(tmp_path, {ONE: file}, rate=5e9, cost_s=1.0) as here:
        view = await here.open()
        began_s = trio.current_time()
        assert bytes(await view.read(2 * MIB, 64 * KIB)) == disk[2 * MIB : 2 * MIB + 64 * KIB]
        # 1 MiB needs 32 tables, and 2048 clusters of 64 KiB each: 2080 requests of one second.
        assert trio.current_time() - began_s < 2080 / 3


@qcow2.needs_qemu
@virtual_time
async def test_a_window_is_as_long_as_a_request_is_worth_in_bytes_of_the_file(tmp_path: Path) -> None:
    """Not of the disk: of a disk that packs well, much more comes at the same cost."""
    source, image = tmp_path / "source", tmp_path / "image"
    disk = b"".join(struct.pack(">Q", number) * (BLOCK // 8) for number in range(40 * MIB // BLOCK))
    source.write_bytes(disk)
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    async with den(tmp_path / "store", {ONE: image.read_bytes()}) as here:
        view = await here.open()
        for offset in (0, 20 * MIB):  # The first look brings the tables.
            assert bytes(await view.read(offset, 4096)) == disk[offset : offset + 4096]
            await here.flow.settled()
        asked = len(here.source.requests)
        assert bytes(await view.read(30 * MIB, 64 * KIB)) == disk[30 * MIB : 30 * MIB + 64 * KIB]
        assert len(here.source.requests) == asked
        await here.flow.settled()
        stored, before = here.flow.store.known_view(image_id(ONE), ViewKind.RAW), Extent(18 * MIB, 20 * MIB)
        assert stored is not None
        assert stored.absent(before) == [before], "a window goes forward"
        assert bytes(await view.read(18 * MIB, 4096)) == disk[18 * MIB : 18 * MIB + 4096]


# ── Images that lie ───────────────────────────────────────────────────────────────────────────────────

CLUSTER = qcow2.CLUSTER
# Clusters of the disk beyond its first block of 64 KiB, which is looked at when it is opened.
LATER = 40
LATE_LIES = {
    "outside the file": lambda image: image.l2(LATER, (1 << 63) | (1 << 40)),
    "the refcount table": lambda image: image.l2(LATER, (1 << 63) | CLUSTER),
    "reserved bits": lambda image: image.l2(LATER, (1 << 63) | 6 * CLUSTER | (1 << 60)),
    "the L2 table itself": lambda image: image.l2(LATER, (1 << 63) | 4 * CLUSTER),
    "compressed outside": lambda image: image.l2(LATER, (1 << 62) | (1 << 40)),
    "compressed nonsense": lambda image: image.l2(LATER, (1 << 62) | 7 * CLUSTER),
}


def bomb() -> bytes:
    """A cluster that would expand to a GiB."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = b"".join(stream.compress(bytes(MIB)) for _ in range(32))[:4096]
    good = qcow2.small().file
    at = -(-len(good) // 512) * 512
    image = qcow2.Image(good.ljust(at, b"\0") + packed.ljust(8 * 512, b"\0"))
    return image.l2(LATER, (1 << 62) | 7 << 56 | at).file


@pytest.mark.parametrize("lie", [*LATE_LIES, "a bomb"])
@virtual_time
async def test_a_lie_that_is_met_late_is_an_error_then_and_a_refusal_from_then_on(
    tmp_path: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = bomb() if lie == "a bomb" else LATE_LIES[lie](qcow2.small()).file
    async with den(tmp_path, {ONE: file}) as here:
        view = await here.open()
        assert bytes(await view.read(0, 4 * CLUSTER)) == qcow2.EXPECTED
        for _ in range(3):
            with pytest.raises(ImageRefused):
                await view.read(LATER * CLUSTER, 512)
        known = here.known()
        assert known is not None
        assert known.refused
        with pytest.raises(ImageRefused, match="refused"):
            await here.open()
        assert bytes(await view.read(0, 4 * CLUSTER)) == qcow2.EXPECTED  # What was right still is.
        assert sum("refused as a disk" in record.message for record in caplog.records) == 1


@virtual_time
async def test_a_disk_that_is_an_image_itself_is_refused_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = bytearray(SMALL)
    image[6 * CLUSTER : 6 * CLUSTER + 512] = SMALL[:512]
    async with den(tmp_path, {ONE: bytes(image)}) as here:
        errors = await outcomes(20, here.open)
        assert all(isinstance(error, ImageRefused) for error in errors)
        known = here.known()
        assert known is not None
        assert known.refused == "the disk inside it is qcow2, not raw"
        assert sum("refused as a disk" in record.message for record in caplog.records) == 1


# ── Images that become others ─────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_that_goes_during_its_inspection_leaves_nothing(tmp_path: Path) -> None:
    release = trio.Event()
    async with den(tmp_path, {ONE: SMALL}, script={0: Stall(release)}, read_deadline_s=600) as here:
        got: list[Any] = []

        async def ask() -> None:
            got.extend(await outcomes(3, here.open))

        await here.image()
        here.flow.services.start_soon(ask)
        await until(lambda: len(here.source.requests) == 1)
        here.registry.has.clear()
        await trio.sleep(70)
        with pytest.raises(NoEntry):
            await here.catalog.openable(image_id(ONE))
        # Another image of the same id, which is not what it says.
        here.upload(ONE, SMALL, disk_format="raw")
        await trio.sleep(20)
        await here.image()
        release.set()
        await until(lambda: len(got) == 3)
        assert all(isinstance(error, NoEntry | OriginError) for error in got)
        assert here.known() is None
        with pytest.raises(ImageRefused):
            await here.open()
        assert here.known() == Disk(refused="its content is qcow2, not raw")
        assert here.flow.store.known_view(image_id(ONE), ViewKind.RAW) is None


@virtual_time
async def test_a_format_that_changes_during_the_inspection_is_inspected_again(tmp_path: Path) -> None:
    release = trio.Event()
    async with den(tmp_path, {ONE: SMALL}, script={0: Stall(release)}, read_deadline_s=600) as here:
        got: list[Any] = []

        async def ask() -> None:
            got.extend(await outcomes(3, here.open))

        await here.image()
        here.flow.services.start_soon(ask)
        await until(lambda: len(here.source.requests) == 1)
        here.registry.has[image_id(ONE)]["disk_format"] = "raw"
        await trio.sleep(70)
        await here.catalog.openable(image_id(ONE))
        release.set()
        await until(lambda: len(got) == 3)
        assert all(isinstance(error, ImageRefused) for error in got)
        assert here.known() == Disk(refused="its content is qcow2, not raw")


@virtual_time
async def test_another_image_of_the_same_id_is_never_read_through_the_old_ones_view(tmp_path: Path) -> None:
    other = bytearray(SMALL)
    other[7 * CLUSTER : 9 * CLUSTER] = b"\xee" * (2 * CLUSTER)
    far = 1000 * CLUSTER
    async with den(tmp_path, {ONE: SMALL}) as here:
        view = await here.open()
        assert bytes(await view.read(0, 4096)) == qcow2.EXPECTED[:4096]
        await here.flow.settled()
        here.registry.has.clear()
        await trio.sleep(70)
        with pytest.raises(NoEntry):
            await here.catalog.openable(image_id(ONE))
        here.disks.forget(image_id(ONE))
        with pytest.raises(ImageGone):
            await view.read(far, 512)
        here.upload(ONE, bytes(other))
        await trio.sleep(20)
        assert await here.read(CLUSTER, 512) == b"\xee" * 512
        assert bytes(await view.read(0, 4096)) == qcow2.EXPECTED[:4096]
        with pytest.raises(ImageGone):
            await view.read(far, 512)


# ── Little room ───────────────────────────────────────────────────────────────────────────────────────


@qcow2.needs_qemu
@virtual_time
async def test_tables_and_bytes_that_are_evicted_between_reads_come_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("evicted")
    file, disk = converted(folder, "-c")
    async with den(folder / "store", {ONE: file}) as here:
        view = await here.open()
        store = here.flow.store
        for offset in range(0, len(disk), 512 * KIB):
            assert bytes(await view.read(offset, 64 * KIB)) == disk[offset : offset + 64 * KIB]
            await here.flow.settled()
            here.disks.forget(image_id(ONE))
            for kept in store.views():
                await store.evict([(kept.number, SpanNo(span)) for span in range(kept.spans)])
        assert store.totals()["bytes_cached"] == 0


@qcow2.needs_qemu
@virtual_time
async def test_a_store_that_takes_nothing_still_gives_the_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("full")
    file, disk = converted(folder, "-c")
    async with den(folder / "store", {ONE: file}, limits=lambda: Limits(0, 0), memory_max=4 * MIB) as here:
        view = await here.open()
        for offset in range(0, len(disk), MIB):
            assert bytes(await view.read(offset, MIB)) == disk[offset : offset + MIB]


# ── Mutations ─────────────────────────────────────────────────────────────────────────────────────────


def mapped(file: bytes, offset: int, length: int) -> bytes | None:
    """What the pure mapping says; None where it refuses."""
    try:
        return qcow2.Disk(file).read(offset, length)
    except FormatError:
        return None


@qcow2.needs_qemu
@given(data=st.data())
@examples(120)
def test_mutated_images_are_right_or_refused(
    data: st.DataObject, stock: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = data.draw(qcow2.mutated(stock))
    places = data.draw(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.integers(1, 300 * KIB), min_size=4, max_size=4))

    @virtual_time
    async def look() -> None:
        folder = tmp_path_factory.mktemp("mutated")
        async with den(folder, {ONE: file}, read_deadline_s=60) as here:
            try:
                view = await here.open()
            except (ImageRefused, OriginError):
                disk = here.known()
                assert disk is not None
                assert disk.refused
                event("refused when opened")
                return
            for place, length in zip(places, lengths, strict=False):
                offset = place * max(view.size, 1) >> 20
                part = min(length, view.size - offset)
                try:
                    got = bytes(await view.read(offset, length))
                except ImageRefused:
                    # A flight brings more than this read wanted: something near is a lie.
                    event("refused when read")
                    continue
                assert got == mapped(file, offset, part)
                event("read")
            assert here.source.at_once_bytes <= FETCHES_MAX + MEMORY_MAX

    look()


@pytest.mark.parametrize("image", [b"", b"QFI\xfb", SMALL[:512], SMALL[: 3 * CLUSTER]])
@virtual_time
async def test_what_is_no_image_is_refused(tmp_path: Path, image: bytes) -> None:
    async with den(tmp_path, {ONE: image}) as here:
        with pytest.raises(ImageRefused):
            await here.open()
