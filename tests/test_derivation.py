"""Disks that are made of their files, in virtual time: what is fetched, what is verified, what is condemned. Rule:
bytes, counts and states; the hash is Glance's, of what was uploaded.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.catalog import GONE
from cachefs.claims import ByLeases
from cachefs.derivation import Derivation
from cachefs.errors import ImageCondemned
from cachefs.hydrator import LOOK_S, Hydrator
from cachefs.image_state import state_of
from cachefs.leases import Leases
from cachefs.leisure import Leisure
from cachefs.plan.extents import BLOCK, Extent
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from cachefs.verifier import Verifier
from cachefs.views.stored import StoredFile
from tests import test_qcow2 as qcow2
from tests.flow import until, virtual_time
from tests.stores import SPAN, UNLIMITED, image_id
from tests.test_guest_disks import MIB, ONE, SMALL, Den, converted, den

stock = qcow2.stock  # The fixture.


@dataclass
class Home:
    """A den whose disks come whole."""

    den: Den
    leases: Leases
    verifier: Verifier
    derivation: Derivation
    hydrator: Hydrator

    async def open(self, *, hydrated: bool = True) -> StoredFile:
        """As `raw/<uuid>`."""
        view = await self.den.disks.open(await self.den.image())
        self.leases.opened(view.number)
        if hydrated:
            self.hydrator.opened(view)
        return StoredFile(view, self.den.flow.blocks)

    @property
    def raw(self) -> StoredView:
        view = self.den.flow.store.known_view(image_id(ONE), ViewKind.RAW)
        assert view is not None, "it was opened"
        return view

    @property
    def original(self) -> StoredView:
        view = self.den.flow.store.known_view(image_id(ONE), ViewKind.ORIGINAL)
        assert view is not None, "it was looked at"
        return view

    @property
    def state(self) -> str:
        known = self.den.catalog.known(image_id(ONE))
        assert known is not None
        return state_of(self.raw, known)

    async def verified(self) -> None:
        await until(lambda: self.state == "verified")

    async def whole(self, size: int) -> bytes:
        """The disk as the store has it."""
        return b"".join([bytes(await self.raw.read(at, min(MIB, size - at))) for at in range(0, size, MIB)])


@asynccontextmanager
async def home(
    folder: Path,
    file: bytes,
    *,
    promised: bytes | None = None,
    limits: Callable[[], Limits] = lambda: UNLIMITED,
    pace: type[Leisure] = Leisure,
    boots: Sequence[Extent] = (),
    **source: Any,
) -> AsyncIterator[Home]:
    async with den(folder, {ONE: file}, limits=limits, **source) as here:
        shown = here.registry.has[image_id(ONE)]
        shown["os_hash_value"] = hashlib.sha512(file if promised is None else promised).hexdigest()
        store, blocks = here.flow.store, here.flow.blocks
        leases = Leases(store, lambda: 1 << 60)
        await leases.load()
        verifier = Verifier(here.catalog, store, Leisure(blocks, lambda: 0))
        derivation = Derivation(here.catalog, store, here.flow.fetcher, here.disks, pace(blocks, lambda: 0))

        def is_gone(image: str) -> bool:
            known = here.catalog.known(image)
            return known is None or known.status == GONE

        def before_hydration(view: StoredView) -> Sequence[Extent]:
            return boots if view.record.kind is ViewKind.RAW else ()

        hydrator = Hydrator(
            store, here.flow.fetcher, blocks, leases,
            disks=derivation, is_gone=is_gone, before_hydration=before_hydration,
        )  # fmt: skip
        here.catalog.claims = ByLeases(leases, store)
        here.catalog.on_gone = lambda image: hydrator.gone(image.id)
        here.disks.keep_files(lambda original: original.number in leases.needed)
        here.flow.fetcher.give_way(blocks)
        verifier.on_verified = lambda image: hydrator.look()

        def lost(view: StoredView) -> None:
            if view.record.kind is ViewKind.ORIGINAL:
                here.catalog.learn_loss(view.record.image)
            verifier.lost(view)
            derivation.lost(view)

        def became_whole(view: StoredView) -> None:
            verifier.settled(view)
            hydrator.became_whole(view)

        store.on_loss, store.on_whole = lost, became_whole
        await here.flow.services.start(verifier.run)
        await here.flow.services.start(hydrator.run)
        yield Home(here, leases, verifier, derivation, hydrator)


# ── Whole, once, verified ─────────────────────────────────────────────────────────────────────────────


@qcow2.needs_qemu
@pytest.mark.parametrize("options", [(), ("-c",), ("-c", "-o", "cluster_size=4k"), ("-o", "cluster_size=512")])
@virtual_time
async def test_a_disk_that_is_opened_comes_whole_and_verified_for_one_fetch_of_its_file(
    tmp_path_factory: pytest.TempPathFactory, options: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    file, disk = converted(folder, *options)
    async with home(folder / "store", file, rate=20e6) as here:
        view = await here.open()
        # A guest reads all over it meanwhile.
        for offset in range(0, len(disk), 3 * MIB // 2):
            assert bytes(await view.read(offset, 4096)) == disk[offset : offset + 4096]
        await here.verified()
        assert await here.whole(len(disk)) == disk
        # But for what was looked at before anybody knew that all of it is wanted.
        assert here.den.source.fetched <= len(file) + 4 * BLOCK
        assert here.hydrator.status()["images"] == 0
        assert here.leases.needed == set(), "its file may go now"
        assert here.verifier.verified == here.derivation.verified == 1


@qcow2.needs_qemu
@virtual_time
async def test_a_guest_hurries_what_the_disk_it_waits_for_is_made_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What hydration asked for gives way to guests, but not to those who wait for it."""
    folder = tmp_path_factory.mktemp("hurry")
    file, disk = converted(folder)
    boots = [Extent(MIB, 2 * MIB)]
    async with home(folder / "store", file, boots=boots, rate=2e6, piece=BLOCK) as here:
        view = await here.open()
        await until(lambda: any(r.running and r.got and r.extent.start >= MIB for r in here.den.source.requests))
        assert any(flight.view is here.raw for flight in here.den.flow.fetcher.flights())
        began_s = trio.current_time()
        assert bytes(await view.read(2 * MIB - 4096, 4096)) == disk[2 * MIB - 4096 : 2 * MIB]
        assert trio.current_time() < began_s + 2 * MIB / 2e6
        await here.verified()


@qcow2.needs_qemu
@virtual_time
async def test_a_stream_is_made_into_a_disk_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stream")
    file, disk = converted(folder, "-c")
    async with home(folder / "store", file, streams_only={ONE}) as here:
        await here.open()
        await here.verified()
        assert await here.whole(len(disk)) == disk
        assert sum(request.stream for request in here.den.source.requests) == 1


@virtual_time
async def test_without_a_hash_it_comes_whole_and_is_not_called_verified(tmp_path: Path) -> None:
    async with home(tmp_path, SMALL) as here:
        here.den.registry.has[image_id(ONE)]["os_hash_value"] = None
        await here.open()
        await until(lambda: here.raw.complete)
        assert here.state == "complete"


@qcow2.needs_qemu
@virtual_time
async def test_what_guests_had_read_before_is_compared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Glance gave other bytes then, of which nobody knew."""
    folder = tmp_path_factory.mktemp("before")
    file, disk = converted(folder)
    async with home(folder / "store", file) as here:
        at = file.index(disk[MIB : MIB + 64])
        here.den.source.files[ONE] = file[:at] + b"wrong" + file[at + 5 :]
        view = await here.open(hydrated=False)
        here.leases.released(here.raw.number)
        assert bytes(await view.read(MIB, 5)) == b"wrong"
        await here.den.flow.settled()
        here.den.source.files[ONE] = file
        await here.open()
        await here.verified()
        assert await here.whole(len(disk)) == disk


@qcow2.needs_qemu
@virtual_time
async def test_a_wrong_upload_is_condemned_in_all_its_views(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("wrong")
    file, disk = converted(folder, "-c")
    async with home(folder / "store", file, promised=file[:-1] + b"x") as here:
        view = await here.open()
        raw, original = here.raw, here.original
        assert bytes(await view.read(0, 4096)) == disk[:4096]
        await until(lambda: raw.condemned is not None)
        known = here.den.catalog.known(image_id(ONE))
        assert known is not None
        assert known.condemned is not None
        assert view.read_now(0, 4096) is None
        for stored in (raw, original):
            with pytest.raises(ImageCondemned):
                await here.den.flow.blocks.read_just(stored, Extent(0, 4096))
        await until(lambda: raw.cached == original.cached == 0)
        await trio.sleep(10 * LOOK_S)
        assert here.hydrator.status()["images"] == 0


@virtual_time
async def test_a_disk_that_lies_is_refused_and_not_tried_for_ever(tmp_path: Path) -> None:
    file = qcow2.small().l2(40, (1 << 63) | (1 << 40)).file
    async with home(tmp_path, file) as here:
        await here.open()
        await until(lambda: (known := here.den.known()) is not None and known.refused is not None)
        await trio.sleep(100)
        assert here.hydrator.status()["images"] == 0


# ── Zeros ─────────────────────────────────────────────────────────────────────────────────────────────


def nearly_empty(size: int) -> tuple[bytes, bytes]:
    """A disk of `size` of which one cluster in the middle is used, and that cluster."""
    cluster, cover = 65536, 8192 * 65536
    tables = -(-size // cover)
    l1_bytes = -(-tables * 8 // cluster) * cluster
    l1_at, refcounts_at = cluster, cluster + l1_bytes
    l2_at, data_at = refcounts_at + cluster, refcounts_at + 2 * cluster
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, size, 0, tables, l1_at, refcounts_at, 1, 0, 0)
    file = bytearray(data_at + cluster)
    file[: len(head) + 40] = head + struct.pack(">QQQII", 0, 0, 0, 4, 112) + bytes(8)
    struct.pack_into(">Q", file, l1_at + size // 2 // cover * 8, 1 << 63 | l2_at)
    struct.pack_into(">Q", file, l2_at + size // 2 % cover // cluster * 8, 1 << 63 | data_at)
    data = hashlib.shake_128(b"a cluster").digest(cluster)
    file[data_at:] = data
    return bytes(file), data


@virtual_time
async def test_what_nobody_wrote_becomes_holes_without_a_byte_moved(tmp_path: Path) -> None:
    size = 1 << 36  # At 1 MiB each, 65,536 spans.
    file, data = nearly_empty(size)
    async with home(tmp_path, file) as here:
        await here.open()
        await here.verified()
        store, middle = here.den.flow.store, size // 2
        assert store.writer.lander.bytes_landed <= 2 * len(file)
        assert len(here.raw.maps) < 100, "maps of others are not pushed out"
        assert bytes(await here.raw.read(middle - 4096, 65536 + 8192)) == bytes(4096) + data + bytes(4096)
        assert bytes(await here.raw.read(size - SPAN // 2, SPAN // 2)) == bytes(SPAN // 2)
        assert here.den.source.fetched <= len(file) + 4 * BLOCK
        await store.flush()
        assert store.usage().used < 32 * MIB


# ── When something comes in between ───────────────────────────────────────────────────────────────────


@qcow2.needs_qemu
@virtual_time
async def test_an_image_that_is_deleted_once_its_file_is_here_is_made_into_a_disk(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("gone")
    file, disk = converted(folder, "-c")
    async with home(folder / "store", file) as here:
        await here.open()
        await until(lambda: here.original.complete)
        here.den.registry.has.clear()
        here.den.catalog.ended(image_id(ONE))
        assert here.hydrator.at_risk == {}
        await until(lambda: here.raw.complete)
        assert await here.whole(len(disk)) == disk


@qcow2.needs_qemu
@virtual_time
async def test_an_image_that_is_deleted_before_its_file_is_here_is_an_alarm_at_once(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path_factory.mktemp("gone")
    file, _ = converted(folder, "-c")
    async with home(folder / "store", file, rate=1e6) as here:
        await here.open()
        await until(lambda: here.original.cached > 3 * BLOCK)
        here.den.registry.has.clear()
        here.den.catalog.ended(image_id(ONE))
        assert "Glance has it no more" in here.hydrator.at_risk[image_id(ONE)]
        assert "promise at risk" in caplog.text
        await trio.sleep(10 * LOOK_S)
        assert len(here.hydrator.at_risk) == 1
        here.leases.released(here.raw.number)
        await trio.sleep(3600)
        assert here.hydrator.at_risk == {}, "nobody needs it any more"


@qcow2.needs_qemu
@virtual_time
async def test_a_part_of_the_disk_that_went_is_made_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("went")
    file, disk = converted(folder)
    async with home(folder / "store", file) as here:
        await here.open()
        await here.verified()
        asked = len(here.den.source.requests)
        await here.den.flow.store.evict([(here.raw.number, SpanNo(2))])
        assert here.state == "partial"
        await here.verified()
        assert await here.whole(len(disk)) == disk
        assert len(here.den.source.requests) == asked, "its file was here still"


@qcow2.needs_qemu
@virtual_time
async def test_nothing_of_an_image_that_is_dropped_comes_after_though_its_file_was_opened_before_its_disk(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("dropped")
    file, _ = converted(folder)
    async with home(folder / "store", file, rate=1e6) as here:
        await here.den.image()
        original = here.den.flow.stored(ONE, len(file))
        here.leases.opened(original.number)
        here.hydrator.opened(original)
        await here.open()
        await until(lambda: here.original.cached > SPAN)
        for view in (here.original, here.raw):
            here.leases.released(view.number)
        await here.hydrator.let_go(image_id(ONE))
        for view in (here.original, here.raw):
            await here.den.flow.store.evict([(view.number, SpanNo(span)) for span in range(view.spans)])
        await trio.sleep(100)
        assert (here.original.cached, here.raw.cached) == (0, 0)


@qcow2.needs_qemu
@virtual_time
async def test_what_is_pinned_is_taken_up_again_after_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("again")
    file, disk = converted(folder, "-c")
    async with home(folder / "store", file, rate=2e6) as here:
        await here.open()
        here.leases.pin(image_id(ONE), len(file))
        await until(lambda: here.original.cached > len(file) // 2)
        fetched = here.den.source.fetched
    async with home(folder / "store", file) as here:
        await here.verified()
        assert await here.whole(len(disk)) == disk
        assert fetched + here.den.source.fetched <= len(file) + 16 * MIB, "but for what was on its way"
        assert here.den.source.fetched < len(file)


class Held(Leisure):
    """Goes no further than its third piece."""

    pieces = 0

    async def pause(self, worked_s: float) -> None:
        self.pieces += 1
        if self.pieces == 3:
            await trio.sleep_forever()


@qcow2.needs_qemu
@virtual_time
async def test_a_disk_that_was_half_made_is_made_after_a_restart(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("half")
    file, disk = converted(folder, "-c")
    async with home(folder / "store", file, pace=Held) as here:
        await here.open()
        here.leases.pin(image_id(ONE), len(file))
        await until(lambda: here.raw.cached >= 3 * SPAN)
        assert not here.raw.complete
        assert here.original.complete
    async with home(folder / "store", file) as here:
        await here.verified()
        assert await here.whole(len(disk)) == disk
        assert here.den.source.fetched == 0


@qcow2.needs_qemu
@virtual_time
async def test_what_goes_while_the_disk_is_made_keeps_it_from_being_called_verified(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("loss")
    file, disk = converted(folder)
    made: list[Home] = []

    class Losing(Leisure):
        pieces = 0

        async def pause(self, worked_s: float) -> None:
            self.pieces += 1
            if self.pieces == 3:
                view = made[0].raw
                await made[0].den.flow.store.evict([(view.number, SpanNo(0))])
                # A guest brings it again; nobody has compared that.
                await made[0].den.flow.blocks.read_just(view, Extent(0, SPAN))

    async with home(folder / "store", file, pace=Losing) as here:
        made.append(here)
        await here.open()
        await until(lambda: here.raw.complete)
        await trio.sleep(1)
        assert here.state == "complete"
        await here.verified()
        assert await here.whole(len(disk)) == disk


@qcow2.needs_qemu
@virtual_time
async def test_a_store_with_room_for_the_file_alone_keeps_the_promise(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The disk can be read of it without Glance, though not all of it is made."""
    folder = tmp_path_factory.mktemp("room")
    file, disk = converted(folder)
    room = len(file) + 3 * MIB
    # What the disk holds is in its file as well, at other offsets: shifted, it cannot share a chunk.
    async with home(folder / "store", file, limits=lambda: Limits(room, 0)) as here:
        view = await here.open()
        await until(lambda: here.original.complete)
        await trio.sleep(100)
        assert here.hydrator.at_risk == {}
        here.den.source.files[ONE] = bytes(len(file))
        for offset in range(0, len(disk), MIB):
            assert bytes(await view.read(offset, MIB)) == disk[offset : offset + MIB]


def test_states(tmp_path: Path) -> None:
    """`verified` is said of a disk for its own sake, not for its file's."""

    @virtual_time
    async def main() -> None:
        async with home(tmp_path, SMALL) as here:
            await here.open()
            await here.verified()
            known = here.den.catalog.known(image_id(ONE))
            assert known is not None
            assert known.disk is not None
            assert state_of(here.raw, replace(known, disk=replace(known.disk, verified=False))) == "complete"
            assert state_of(here.raw, replace(known, verified=False)) == "verified"

    main()
