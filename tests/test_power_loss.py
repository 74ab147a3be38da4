"""Power losses by the hundred: what a disk was sent is written down, and every beginning of that is a disk which
the store must survive. Rule: an answered flush is the only promise; of what came later any part may be missing.

Below the store are LMDB, a real ext4 and its journal; the power goes out below all of them. `CACHEFS_HUNT=n` tries
n times as many points, others in every run.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from cachefs.plan.extents import PAGE, Extent, ceil, pieces
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.view import StoredView
from cachefs.store.writer import BACKOFF_S
from tests import disks, stores
from tests.disks import Disk, Log
from tests.stores import (
    SPAN,
    Edge,
    Edges,
    Fate,
    image_id,
    in_pages,
    land,
    padded,
    patchwork,
    random_bytes,
    running,
)

DISK: Final = 48 << 20
SECTOR: Final = 512
POINTS: Final = 420 * stores.HUNT
LOST_TWICE: Final = 6 * stores.HUNT
# ext4 does not mount with half a superblock: disks write that much at once, or all of it would be lost to others.
WHOLE_BEFORE: Final = 4096
KEEPS, TEARS = 0.5, 0.2  # Of the unsynced writes: these stay whole, these are torn, the others are lost.

SIZES: Final = (2 * SPAN + SPAN // 2 + 17, 3 * SPAN, SPAN + 5 * PAGE, SPAN, 2 * SPAN)
CONTENTS: Final = tuple(patchwork(i + 1, size) for i, size in enumerate(SIZES))

pytestmark = pytest.mark.skipif(disks.missing_for_disks() is not None, reason=str(disks.missing_for_disks()))


# ── What is done, and what was promised meanwhile ─────────────────────────────────────────────────────


@dataclass(frozen=True)
class Promise:
    """From `position` of the log on: these pages of each image are there, and these images are known."""

    position: int
    pages: tuple[frozenset[int], ...]
    images: frozenset[int]


@dataclass
class Work:
    """A store's life on a disk. What has landed becomes a promise when a flush was answered, and stops being one
    before it is evicted."""

    disk: Disk
    folder: Path
    landed: list[set[int]] = field(default_factory=lambda: [set() for _ in CONTENTS])
    durable: list[set[int]] = field(default_factory=lambda: [set() for _ in CONTENTS])
    put: set[int] = field(default_factory=set)
    promises: list[Promise] = field(default_factory=list)
    store: Store | None = None

    def promise(self) -> None:
        images = self.promises[-1].images if self.promises else frozenset[int]()
        self.promises.append(Promise(self.disk.position, tuple(map(frozenset, self.durable)), images))

    def view(self, image: int) -> StoredView:
        assert self.store is not None
        return stores.view_of(self.store, image, SIZES[image])

    async def land(self, image: int, start: int = 0, end: int | None = None, piece: int = SPAN) -> None:
        """Bytes of an image, in pieces that do not cross a span; every other one past the kernel's cache."""
        assert self.store is not None
        content = CONTENTS[image]
        for number, part in enumerate(pieces(Extent(start, min(end or len(content), len(content))), piece)):
            data = in_pages(padded(content, *part))
            if await land(self.store, self.view(image), part.start, data, in_passing=number % 2 == image % 2):
                self.landed[image].update(range(part.start // PAGE, ceil(part.end, PAGE) // PAGE))

    def put_image(self, image: int) -> None:
        assert self.store is not None
        self.store.put_image(image_id(image), {"number": image + 1, "name": f"image {image}"})
        self.put.add(image)

    async def flush(self) -> None:
        """Everything so far is promised, unless the commit failed."""
        assert self.store is not None
        landed, put = [set(pages) for pages in self.landed], frozenset(self.put)
        commits = self.store.writer.commits
        await self.store.writer.flush()
        if self.store.writer.commits > commits:
            self.durable = landed
            self.promises.append(Promise(self.disk.position, tuple(map(frozenset, landed)), put))

    async def fail_to_commit(self, edges: Edges, edge: Edge, fate: Fate, image: int) -> None:
        """What lands meanwhile is gone again."""
        assert self.store is not None
        await self.flush()
        before = [set(pages) for pages in self.landed]
        edges.arm(fate, edge)
        await self.land(image)
        await self.store.writer.flush()
        edges.disarm()
        self.landed = before
        await trio.sleep(BACKOFF_S)

    def forget(self, image: int, span: int) -> None:
        gone = range(span * SPAN // PAGE, (span + 1) * SPAN // PAGE)
        self.landed[image].difference_update(gone)
        self.durable[image].difference_update(gone)
        self.promise()

    async def evict(self, image: int, *spans: int) -> None:
        assert self.store is not None
        for span in spans:
            self.forget(image, span)
        await self.store.evict([(self.view(image).number, SpanNo(span)) for span in spans])

    async def compact(self) -> None:
        """What lies in segments to which nothing is appended moves, and they are removed."""
        assert self.store is not None
        sources = frozenset(self.store.sealed_segments()[0])
        assert sources, "commits that failed have left some"
        assert await self.store.move(self.store.chunks_in(sources), sources)
        assert await self.store.remove_lifeless() == len(sources)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """A clean end: everything that landed is promised after it."""
        yield
        self.durable = [set(pages) for pages in self.landed]
        self.promises.append(Promise(self.disk.position, tuple(map(frozenset, self.durable)), frozenset(self.put)))


async def live(work: Work) -> None:
    work.promise()
    edges = Edges()
    with work.settled():
        async with running(work.folder, edges=edges) as work.store:
            await work.flush()
            work.put_image(0)
            await work.land(0)
            await work.flush()
            await work.land(1, piece=SPAN // 4)  # Cut anew when the last piece of a span has landed.
            work.put_image(1)
            await work.flush()
            await work.evict(0, 1)
            await work.land(0)
            await work.fail_to_commit(edges, Edge.SYNC, Fate.FAIL, 3)
            await work.land(2)
            await work.flush()
            await work.fail_to_commit(edges, Edge.COMMIT, Fate.FAIL_LATE, 4)
            await work.land(2, 0, SPAN)
            await work.evict(1, 0, 2)
    with work.settled():
        async with running(work.folder) as work.store:
            async with trio.open_nursery() as nursery:
                for image in (3, 1, 4):
                    nursery.start_soon(work.land, image)
                for _ in range(3):
                    await trio.sleep(0.4)
                    await work.flush()
            work.put_image(2)
            await work.evict(0, 0, 1, 2)
            await work.compact()
            await work.evict(3, 0)
            await work.flush()
            await work.land(0, SPAN // 2, SPAN)


# ── Losing power ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Point:
    """A power loss after `entries` of the log; with a seed, of what was not flushed then some is missing."""

    entries: int
    seed: int | None = None


def points(log: Log, count: int, rng: random.Random) -> list[Point]:
    """Every beginning, or as many as are wanted; the rest with losses, where there is something to lose. In
    ascending order."""
    ends = list(range(len(log.entries) + 1))
    whole = ends if len(ends) < count else rng.sample(ends, count)
    lossy = [end for end in ends if end and log.entries[end - 1].data is not None]
    chosen = [Point(end) for end in whole]
    chosen += [Point(rng.choice(lossy), rng.getrandbits(32)) for _ in range(count - len(whole)) if lossy]
    return sorted(chosen, key=lambda point: point.entries)


class Replay:
    """Makes the disk of each point, in ascending order, in a file of memory under a loop device."""

    def __init__(self, disk: Disk, log: Log, stack: ExitStack) -> None:
        self._entries = log.entries
        self._flushed = mmap.mmap(-1, disk.size)  # The disk as of the last flush before the point.
        stack.callback(self._flushed.close)
        self._flushed[:] = disk.at_first[:]
        self._at = 0
        file = os.memfd_create("tests-replay")
        stack.callback(os.close, file)
        os.ftruncate(file, disk.size)
        self._now = mmap.mmap(file, disk.size)
        self.now = memoryview(self._now)
        stack.callback(self._now.close)
        stack.callback(self.now.release)
        self.device = stack.enter_context(disks.loop_device(f"/proc/{os.getpid()}/fd/{file}"))

    def go_to(self, point: Point) -> None:
        flush = max((i for i in range(self._at, point.entries) if self._entries[i].data is None), default=self._at)
        for offset, data in self._entries[self._at : flush]:
            if data is not None:
                self._flushed[offset : offset + len(data)] = data
        self._at = flush
        self.now[:] = memoryview(self._flushed)
        rng = random.Random(point.seed)
        for offset, data in self._entries[flush : point.entries]:
            if data is None:
                continue
            fate = 0.0 if point.seed is None else rng.random()
            if fate < KEEPS or (offset < WHOLE_BEFORE and fate < KEEPS + TEARS):
                self._now[offset : offset + len(data)] = data
            elif fate < KEEPS + TEARS:
                self._tear(offset, data, rng)

    def _tear(self, offset: int, data: bytes, rng: random.Random) -> None:
        """Some sectors of it: the first ones, or any."""
        if rng.random() < 0.5:
            length = rng.randrange(0, len(data), SECTOR)
            self._now[offset : offset + length] = data[:length]
            return
        for at in range(0, len(data), SECTOR):
            if rng.random() < 0.5:
                self._now[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]


# ── What must hold afterwards ─────────────────────────────────────────────────────────────────────────


async def verify(folder: Path, promise: Promise, stranger: int) -> None:
    async with running(folder) as store:
        for image, (content, pages) in enumerate(zip(CONTENTS, promise.pages, strict=True)):
            known = store.known_view(image_id(image), ViewKind.ORIGINAL)
            if known is None:
                assert not pages, f"image {image} was promised"
                continue
            assert pages <= await right_pages(known, content), f"bytes of image {image} were promised"
        for image in promise.images:
            assert store.images[image_id(image)]["number"] == image + 1
        await use(store, stranger)


async def right_pages(view: StoredView, content: bytes) -> set[int]:
    """The pages that are there, every one of which has been found right."""
    present: set[int] = set()
    for part in pieces(Extent(0, view.size), SPAN):
        await view.load(part)
        gaps = view.absent(part)
        at = part.start
        for gap in (*gaps, Extent(part.end, part.end)):
            if at < gap.start:
                assert await view.read(at, gap.start - at) == content[at : gap.start], f"wrong bytes at {at}"
                present.update(range(at // PAGE, ceil(gap.start, PAGE) // PAGE))
            at = gap.end
    return present


async def use(store: Store, stranger: int) -> None:
    """The store takes the bytes of an image that it does not know, and gives them back."""
    content = random_bytes(stranger, 8 * PAGE)
    view = stores.view_of(store, stranger, len(content))
    assert await land(store, view, 0, content)
    await store.writer.flush()
    assert await view.read(0, len(content)) == content


def survive(replay: Replay, mounted: Path, point: Point, promise: Promise, stranger: int = 1000) -> None:
    """The store lives on after this power loss."""
    try:
        replay.go_to(point)
        disks.mount(replay.device, mounted)
        try:
            folder = mounted / "store"
            if any(promise.pages):
                assert_sound(folder)
            trio.run(verify, folder, promise, stranger)
            assert_sound(folder)
        finally:
            disks.unmount_patiently(mounted)
    except BaseException as error:
        error.add_note(f"{point}, promised {[len(pages) for pages in promise.pages]} pages")
        raise


def assert_sound(folder: Path) -> None:
    report = check(folder)
    assert report.sound, [str(finding) for finding in report.findings]


@dataclass(frozen=True)
class Lived:
    """What `live` has left."""

    disk: Disk
    log: Log
    promises: Sequence[Promise]

    def promise_at(self, point: Point) -> Promise:
        reached = self.log.ends[point.entries - 1] if point.entries else 0
        return [promise for promise in self.promises if promise.position <= reached or not any(promise.pages)][-1]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    with Disk(tmp_path_factory.mktemp("disk"), DISK) as disk:
        with disk.mounted() as mounted:
            work = Work(disk, mounted / "store")
            trio.run(live, work, clock=MockClock(rate=20))
        yield Lived(disk, disk.log(), work.promises)


def chance() -> random.Random:
    return random.Random(1 if stores.HUNT == 1 else None)


def test_hundreds_of_power_losses(lived: Lived, tmp_path: Path) -> None:
    chosen = points(lived.log, POINTS, chance())
    with ExitStack() as stack:
        replay = Replay(lived.disk, lived.log, stack)
        for point in chosen:
            survive(replay, tmp_path, point, lived.promise_at(point))
    assert len(chosen) >= 300


def test_power_losses_while_the_store_recovers_from_one(lived: Lived, tmp_path: Path) -> None:
    """What a start does after a crash (cutting off, punching, removing) is cut short anywhere, too."""
    rng = chance()
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    promised = [point for point in points(lived.log, 20 * LOST_TWICE, rng) if any(lived.promise_at(point).pages)]
    first = sorted(rng.sample(promised, LOST_TWICE), key=lambda point: point.entries)
    with ExitStack() as stack:
        replay = Replay(lived.disk, lived.log, stack)
        for point in first:
            replay.go_to(point)
            promise = lived.promise_at(point)
            with Disk(tmp_path, DISK, image=replay.now) as disk:
                with disk.mounted() as folder:
                    trio.run(verify, folder / "store", promise, 1000)
                log = disk.log()
                with ExitStack() as inner:
                    again = Replay(disk, log, inner)
                    for second in points(log, POINTS // LOST_TWICE // 5, rng):
                        survive(again, mounted, second, promise, 1001)
