"""What passes by is written and read past the kernel's cache, and is the same bytes."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.arriving import UNREAD_S
from cachefs.errors import Absent
from cachefs.plan.extents import PAGE, Extent, pieces
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import OriginMode, SegmentNo
from cachefs.store.health import State
from cachefs.store.segments import Segments
from cachefs.store.view import StoredView
from tests import resident
from tests.flow import Flow, ScriptedSource, flow, quiet, until, virtual_time
from tests.stores import SPAN, flip, in_pages, land, padded, random_bytes, read, running, segment_file, view_of

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * SPAN + 12345


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def cold(folder: Path) -> Path:
    """A folder on a filesystem that can leave the kernel's cache alone."""
    probe = folder.parent / "probe"
    probe.write_bytes(b"")
    file = os.open(probe, os.O_RDWR)
    try:
        direct = os.open(probe, os.O_WRONLY | os.O_DIRECT)
        os.pwritev(direct, [mmap.mmap(-1, PAGE)], 0)
        os.close(direct)
        os.preadv(file, [bytearray(PAGE)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return folder
    except OSError:
        pass
    finally:
        os.close(file)
    pytest.skip(f"the filesystem of {folder.parent} knows no O_DIRECT")


def slab(content: bytes, part: Extent) -> memoryview:
    """Whole pages of `content`, in memory as a flight has it."""
    return in_pages(padded(content, *part))


async def pass_by(store: Store, view: StoredView, content: bytes) -> None:
    for part in pieces(Extent(0, len(content)), SPAN):
        assert await land(store, view, part.start, slab(content, part), in_passing=True)


def cached_pages(folder: Path) -> set[int]:
    """Which pages of the first segment the kernel has in its cache."""
    return resident.cached_pages(segment_file(folder))


def test_what_lands_in_passing_is_not_in_the_cache_until_it_is_read(cold: Path) -> None:
    content = random_bytes(1, SIZE)

    async def main() -> None:
        async with running(cold) as store:
            view = view_of(store, 1, SIZE)
            await pass_by(store, view, content)
            assert not cached_pages(cold)
            assert await read(view, SPAN - 5, 10) == content[SPAN - 5 : SPAN + 5]
            assert {SPAN // PAGE - 1, SPAN // PAGE} <= cached_pages(cold)
            assert await read(view, 0, SIZE) == content
        async with running(cold) as store:
            assert await read(view_of(store, 1, SIZE), 0, SIZE) == content
        assert check(cold).sound

    trio.run(main)


def test_what_the_disk_made_of_bytes_that_passed_by_is_compared_before_it_is_served(folder: Path) -> None:
    """They were never seen after they were written: nothing of them is in the kernel's cache."""
    content = random_bytes(1, 2 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, 2 * SPAN)
            await pass_by(store, view, content)
            await store.flush()
            flip(segment_file(folder), SPAN // 2)
            assert view.read_now(SPAN // 2, 1) is None, "nobody looked at it yet"
            assert await read(view, SPAN // 2, 1) is None
            assert await read(view, SPAN, SPAN) == content[SPAN:]
            now = view.read_now(SPAN, 4096)
            assert now is not None
            assert now == content[SPAN : SPAN + 4096], "what was compared is read as fast as all else"
            room = memoryview(mmap.mmap(-1, SPAN))
            with pytest.raises(Absent):
                await view.look_at(0, room, bytes)

    trio.run(main)


def test_what_is_landed_for_a_reader_is_in_the_cache(cold: Path) -> None:
    content = random_bytes(1, SPAN)

    async def main() -> None:
        async with running(cold) as store:
            view = view_of(store, 1, SPAN)
            assert await land(store, view, 0, slab(content, Extent(0, SPAN)))
            assert cached_pages(cold) == set(range(SPAN // PAGE))

    trio.run(main)


@pytest.mark.parametrize("page", [None, 0, SPAN // PAGE + 3], ids=["nothing", "first", "middle"])
def test_whoever_looks_at_it_in_passing_sees_it_and_leaves_the_cache_alone(cold: Path, page: int | None) -> None:
    """Whatever of it a guest has read by then."""
    size = 16 * SPAN + 12345
    content = random_bytes(1, size)

    async def main() -> None:
        async with running(cold) as store:
            view = view_of(store, 1, size)
            await pass_by(store, view, content)
            if page is not None:
                assert await read(view, page * PAGE, 1) == content[page * PAGE : page * PAGE + 1]
            room = memoryview(mmap.mmap(-1, SPAN))
            for part in pieces(Extent(0, size), SPAN):
                seen = await view.look_at(part.start, room[: part.length], bytes)
                assert seen == content[part.start : part.end]
            # What the kernel read ahead for the guest, and at the end, which is no whole page of the view.
            assert len(cached_pages(cold)) < size // PAGE // 2

    trio.run(main)


def test_bytes_that_do_not_begin_on_a_page_of_memory_land_and_are_looked_at(folder: Path) -> None:
    content = random_bytes(1, SPAN)
    odd = memoryview(mmap.mmap(-1, SPAN + PAGE))[7 : 7 + SPAN]
    odd[:] = content

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            assert await land(store, view, 0, odd, in_passing=True)
            assert await read(view, 0, SPAN) == content
            room = memoryview(bytearray(SPAN + 1))[1:]
            assert await view.look_at(0, room, bytes) == content

    trio.run(main)


def test_a_span_that_passes_by_in_pieces_is_cut_as_a_whole(folder: Path) -> None:
    content = random_bytes(1, SPAN)
    half = SPAN // 2

    async def main() -> None:
        async with running(folder) as store:
            whole, halves = view_of(store, 1, SPAN), view_of(store, 2, SPAN)
            assert await land(store, whole, 0, slab(content, Extent(0, SPAN)), in_passing=True)
            for part in (Extent(0, half), Extent(half, SPAN)):
                assert await land(store, halves, part.start, slab(content, part), in_passing=True)
            assert await read(halves, 0, SPAN) == content
            assert store.totals()["bytes_shared"] >= half, "it was cut as the other was"
        assert check(folder).sound

    trio.run(main)


# ── What decides it ──


async def read_in_order(way: Flow, size: int, end: int, *, pause_s: float = 0.0) -> None:
    read = way.open(1, size)
    for offset in range(0, end, 128 * KIB):
        await read(offset, 128 * KIB)
        await trio.sleep(pause_s)


@virtual_time
async def test_what_is_read_from_one_end_to_the_other_is_not_left_in_the_cache(tmp_path: Path) -> None:
    size = 64 * MIB
    folder = tmp_path / "store"
    async with flow(folder, ScriptedSource(rate=312e6)) as way:
        await read_in_order(way, size, size, pause_s=0.0005)  # 262 MB/s
        await way.settled()
        assert way.stored(1, size).complete
        # Until the windows are large it may have been anybody.
        assert len(cached_pages(folder)) < 24 * MIB // PAGE
        await way.read(1, size, 40 * MIB, 100)


@virtual_time
async def test_what_a_reader_does_not_come_to_goes_to_the_store_a_second_later(tmp_path: Path) -> None:
    size = 256 * MIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6)) as way:
        await read_in_order(way, size, 32 * MIB)  # Much more is fetched ahead.
        read_s = trio.current_time()
        await until(lambda: not way.fetcher.memory_used)
        assert trio.current_time() - read_s < UNREAD_S + 0.5
        assert way.stored(1, size).cached == way.fetcher.counts.bytes_fetched


@virtual_time
async def test_what_waits_to_be_read_keeps_no_other_guest_waiting(tmp_path: Path) -> None:
    size = 256 * MIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6), memory_max=16 * MIB) as way:
        await read_in_order(way, size, 64 * MIB)
        began_s = trio.current_time()
        for number in range(2, 10):  # Each with a window of its own.
            await way.read(number, SIZE, 0, 4096)
        assert (trio.current_time() - began_s) / 8 < UNREAD_S / 4


@virtual_time
async def test_a_disk_that_takes_nothing_does_not_hold_up_a_stream(tmp_path: Path) -> None:
    """What waits to be read goes to nobody then, and makes room at once."""
    size = 128 * MIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6), memory_max=16 * MIB) as way:
        way.store.set_origin(way.stored(1, size), OriginMode.STREAM)
        way.store.health.writes.state = State.DOWN
        await way.read(1, size, size - 4096, 4096)
        assert trio.current_time() < 2 * size / 312e6


@virtual_time
async def test_what_comes_while_somebody_waits_for_memory_does_not_wait_to_be_read(tmp_path: Path) -> None:
    size = 2 * MIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6), memory_max=2 * MIB) as way:
        for image in (1, 2, 3):
            way.store.set_origin(way.stored(image, size), OriginMode.STREAM)
        async with trio.open_nursery() as nursery:
            for image in (1, 2, 3):
                nursery.start_soon(way.read, image, size, size - 4096, 100)
        assert trio.current_time() < UNREAD_S / 4


@virtual_time
async def test_as_much_as_is_needed_goes_to_the_store_at_once(tmp_path: Path) -> None:
    """Small pieces wait to be read, and a whole span is to be received."""
    small = 256 * KIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6), memory_max=MIB) as way:
        for image in (1, 2, 3, 4):
            way.store.set_origin(way.stored(image, small), OriginMode.STREAM)
            await way.read(image, small, 0, 4096)
        await quiet()
        assert way.fetcher.memory_used == MIB
        began_s = trio.current_time()
        await way.read(5, SPAN, 0, 4096)
        assert trio.current_time() - began_s < UNREAD_S / 4


@virtual_time
async def test_a_stream_passes_by_from_its_first_time_on(cold: Path) -> None:
    """Also the one that was begun because the origin refused a range."""
    size = 16 * MIB
    source = ScriptedSource(rate=312e6, streams_only={1})
    async with flow(cold, source) as way:
        await read_in_order(way, size, size)
        await way.settled()
        assert [r.stream for r in source.requests if r.got] == [True]
        assert len(cached_pages(cold)) < size // PAGE // 2


@virtual_time
async def test_a_stop_keeps_what_waits_to_be_read(tmp_path: Path) -> None:
    size = 256 * MIB
    async with flow(tmp_path / "store", ScriptedSource(rate=312e6)) as way:
        await read_in_order(way, size, 32 * MIB)
        assert way.fetcher.memory_used
        way.stop()
        view = way.stored(1, size)
    async with running(tmp_path / "store", span_size=None) as store:
        known = store.view_by_number(view.number)
        assert known is not None
        # Of each request the last block came in part.
        assert known.cached > way.fetcher.counts.bytes_fetched - MIB
        assert known.cached >= 32 * MIB


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that knows no O_DIRECT."""
    if os.geteuid():
        pytest.skip("mounting a ramfs needs root")
    folder = tmp_path / "ramfs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.loop
def test_where_the_filesystem_knows_no_such_thing_the_bytes_are_the_same(ramfs: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(ramfs / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    segments = Segments(ramfs)
    segments.open(SegmentNo(1), create=True)
    try:
        for first in (0, SPAN):  # The second time it is known.
            content = random_bytes(first, SPAN)
            segments.append(SegmentNo(1), first, [slab(content, Extent(0, SPAN))], past_cache=True)
            room = memoryview(mmap.mmap(-1, SPAN + PAGE))
            assert segments.read_into(SegmentNo(1), first, room, past_cache=True) == SPAN
            assert room[:SPAN] == content
    finally:
        segments.close()
