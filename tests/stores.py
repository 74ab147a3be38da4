"""Stores for tests: contents to land, a store with its writer running, and edges that fail or crash on demand.
Rule: faults are layers around `Segments` and `Index`; nothing inside the store is patched.

Importing this fixes hypothesis to the same examples in every run. `CACHEFS_HUNT=20` looks for new ones instead,
with twenty times as many.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import lru_cache
from math import inf
from pathlib import Path
from uuid import UUID

import trio
from hypothesis import HealthCheck, settings

from cachefs.errors import Absent
from cachefs.plan.extents import PAGE, Extent, ceil, coalesce, pieces, subtract
from cachefs.store import format as f
from cachefs.store.content import Store
from cachefs.store.format import Punch, SegmentNo, SpanNo, ViewKind, ViewNo
from cachefs.store.health import Health, Patience, ToThread
from cachefs.store.index import MAP_SIZE_FIRST, Index, Snapshot, WriteSet
from cachefs.store.recover import Opened, open_store
from cachefs.store.room import Limits
from cachefs.store.segments import CutShort, Segments
from cachefs.store.view import StoredView
from tests.xxh3_twin import twin

HUNT = int(os.environ.get("CACHEFS_HUNT", "1"))
settings.register_profile(
    "cachefs",
    derandomize=HUNT == 1,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("cachefs")

SPAN = f.SPAN_SIZE_MIN
UNLIMITED = Limits(1 << 62, 0)


def examples(count: int) -> settings:
    """So many examples of a property; more on a hunt."""
    return settings(max_examples=count * HUNT)


# ── Contents ──────────────────────────────────────────────────────────────────────────────────────────


def image_id(number: int) -> str:
    return str(UUID(int=number))


def random_bytes(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@lru_cache(16)
def pool() -> tuple[bytes, ...]:
    """Files that images share, of 1 to 70 pages; the last two have one xxh3_128 and other bytes."""
    files = [random_bytes(1000 + i, pages * PAGE) for i, pages in enumerate((1, 3, 5, 16, 40, 70, 16))]
    return (*files, twin(files[-1], payload=b"#!/bin/sh\n"))


@lru_cache(16)
def patchwork(seed: int, size: int) -> bytes:
    """An image of `size` bytes: shared files at other offsets in every image, zeros, and bytes of its own."""
    rng = random.Random(seed)
    made = bytearray()
    while len(made) < size:
        match rng.randrange(8):
            case 0 | 1:
                made += bytes(PAGE * rng.choice((1, 2, 7, 30)))
            case 2:
                made += rng.randbytes(PAGE * rng.randrange(1, 20))
            case _:
                made += rng.choice(pool())
    return bytes(made[:size])


def padded(content: bytes, start: int, end: int) -> memoryview:
    """Whole pages of `content` from `start` (on a page) to the page that holds `end`, zeros behind its end."""
    wanted = ceil(end, PAGE) - start
    return memoryview(content[start : start + wanted].ljust(wanted, b"\0"))


def in_pages(data: bytes | memoryview) -> memoryview:
    """The same bytes, from the beginning of a page of memory on, as a flight has them."""
    place = memoryview(mmap.mmap(-1, len(data)))
    place[:] = data
    return place


# ── A running store ───────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def running(
    folder: Path,
    *,
    edges: Edges | None = None,
    limits: Callable[[], Limits] = lambda: UNLIMITED,
    span_size: int | None = SPAN,
    commit_interval_s: float = 1.0,
    map_size: int = MAP_SIZE_FIRST,
    health: Health | None = None,
) -> AsyncIterator[Store]:
    """A store whose writer runs; at the end everything is landed and committed, and the store is closed."""
    opened = open_store(folder, span_size, map_size)
    if edges is not None:
        opened = edges.around(opened)
    store = Store(opened, limits, commit_interval_s, health=patient() if health is None else health)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            yield store
            store.writer.stop()
    finally:
        store.close()


class _Patient(Health):
    async def run(self, *probes: object) -> None:
        await trio.sleep_forever()


def patient(to_thread: ToThread = trio.to_thread.run_sync) -> Health:
    """For virtual time, which jumps while a thread works: nothing that a thread does is late, and there are no
    probes."""
    return _Patient(to_thread=to_thread, patience=Patience(read_s=inf, write_s=inf))


def view_of(store: Store, number: int, size: int) -> StoredView:
    return store.view(image_id(number), ViewKind.ORIGINAL, size)


async def land(
    store: Store, view: StoredView, offset: int, data: bytes | memoryview, *, in_passing: bool = False
) -> bool:
    """Lands `data` (whole pages in one span); whether it was kept."""
    outcome: list[bool] = []
    finished = trio.Event()

    def done(kept: bool) -> None:
        outcome.append(kept)
        finished.set()

    store.keep(view, offset, memoryview(data), done, in_passing=in_passing)
    await finished.wait()
    assert len(outcome) == 1
    return outcome[0]


async def land_all(store: Store, view: StoredView, content: bytes, piece: int | None = None) -> None:
    """Lands all of `content`, in `piece`s that are whole spans unless said otherwise; all must be kept."""
    for part in pieces(Extent(0, len(content)), piece or store.span_size):
        assert await land(store, view, part.start, padded(content, *part))


async def read(view: StoredView, offset: int, length: int) -> bytes | None:
    """What the store gives, None when a part is absent. Both ways of reading must agree."""
    now = view.read_now(offset, length)
    fast = None if now is None else bytes(now)
    try:
        slow = bytes(await view.read(offset, length))
    except Absent:
        return fast
    assert fast is None or fast == slow
    return slow


# ── Closed stores ─────────────────────────────────────────────────────────────────────────────────────


def drop_span(folder: Path, view: ViewNo, span: SpanNo, *, punch: bool = True) -> None:
    """Evicts a span of a closed store; without `punch`, as a crash between the commit and the punching does."""
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, span_size=None) as store:
            if not punch:
                edges.arm(Fate.CRASH, Edge.PUNCH)
            await store.evict([(view, span)])

    try:
        trio.run(main)
    except BaseExceptionGroup as failures:
        if failures.split(Crash)[1] is not None:
            raise


@contextmanager
def index_of(folder: Path) -> Iterator[Index]:
    """The index of a closed store, to look at or to damage."""
    index = Index(folder / "index")
    try:
        yield index
    finally:
        index.close()


def put(folder: Path, table: f.Table, key: bytes, record: bytes | None) -> None:
    """Puts one record into a closed store."""
    writes = WriteSet()
    writes.put(table, key, record)
    with index_of(folder) as index:
        index.commit(writes)


def chunks_of(folder: Path) -> dict[f.ChunkId, f.Chunk]:
    with index_of(folder) as index, index.reading() as snapshot:
        return {
            f.split_chunk_key(key): f.Chunk.decode(key, record) for key, record in snapshot.items(f.Table.CHUNKS)
        }


def segment_file(folder: Path, segment: SegmentNo | int = 1) -> Path:
    return folder / "segments" / f.segment_name(SegmentNo(segment))


def data_extents(path: Path) -> list[Extent]:
    """Where the file has bytes, by the filesystem's word."""
    found: list[Extent] = []
    file = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while True:
            try:
                start = os.lseek(file, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind this.
                return found
            at = os.lseek(file, start, os.SEEK_HOLE)
            found.append(Extent(start, at))
    finally:
        os.close(file)


def leaked(folder: Path) -> list[tuple[SegmentNo, Extent]]:
    """Bytes of a closed store's segments that occupy the disk and that no chunk names."""
    live: dict[SegmentNo, list[Extent]] = {}
    for chunk in chunks_of(folder).values():
        live.setdefault(chunk.segment, []).append(Extent(chunk.offset, chunk.offset + chunk.length))
    return [
        (segment, rest)
        for segment in Segments(folder / "segments").stored()
        for extent in data_extents(segment_file(folder, segment))
        for rest in subtract(extent, live.get(segment, ()))
    ]


def flip(path: Path, offset: int) -> None:
    """Rot: one byte is another."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x55]))


# ── Edges that fail ───────────────────────────────────────────────────────────────────────────────────


class Crash(BaseException):
    """The process ends here. No `except` of the store may see it."""


class Edge(Enum):
    """What a store does to the disk."""

    CREATE = auto()
    APPEND = auto()
    SYNC = auto()
    COMMIT = auto()
    PUNCH = auto()
    TRUNCATE = auto()
    REMOVE = auto()


class Fate(Enum):
    """What becomes of one passage of an edge. FAIL_LATE fails after it has happened; CRASH_TORN and FAIL leave
    a part of an append."""

    FAIL = auto()
    FAIL_LATE = auto()
    CRASH = auto()
    CRASH_TORN = auto()
    CRASH_LATE = auto()


@dataclass
class Edges:
    """Every write of one store's life passes here. `passed` and `failed` tell what did; `arm` chooses what will
    not. What was not synced is known, so that a crash can lose it."""

    passed: list[Edge] = field(default_factory=list)
    failed: list[Edge] = field(default_factory=list)
    dead: bool = False
    unsynced: dict[SegmentNo, list[Extent]] = field(default_factory=dict)
    doomed: list[tuple[SegmentNo, Extent]] = field(
        default_factory=list
    )  # The sync that should have kept them failed.
    unsynced_names: set[SegmentNo] = field(default_factory=set)
    unsynced_punches: list[tuple[Punch, bytes]] = field(default_factory=list)
    # What happens in between is the test's: called in the thread that is about to do it.
    on_pass: Callable[[Edge], None] = lambda edge: None
    on_read: Callable[[SegmentNo, int], None] = lambda segment, offset: None
    on_look_up: Callable[[], None] = lambda: None
    # Sectors that the disk does not give any more, as places of segments; and where it was asked for one.
    bad: list[tuple[SegmentNo, Extent]] = field(default_factory=list)
    met_bad: list[int] = field(default_factory=list)
    _armed: list[tuple[frozenset[Edge], int, Fate]] = field(default_factory=list)

    @property
    def commit_failed(self) -> bool:
        """Whether what landed may be lost."""
        return Edge.SYNC in self.failed or Edge.COMMIT in self.failed

    def around(self, opened: Opened) -> Opened:
        return replace(
            opened, segments=_EdgedSegments(opened.segments, self), index=_EdgedIndex(opened.index, self)
        )

    def arm(self, fate: Fate, *edges: Edge, after: int = 0, times: int = 1) -> None:
        """The passage of one of `edges` (any when none is named) that comes after `after` others."""
        kinds = frozenset(edges or Edge)
        self._armed.extend((kinds, after, fate) for _ in range(times))

    def disarm(self) -> None:
        self._armed.clear()

    def meet(self, edge: Edge) -> Fate | None:
        if self.dead:
            raise Crash
        self.on_pass(edge)
        self.passed.append(edge)
        fate = None
        for i, (kinds, after, armed) in enumerate(self._armed):
            if edge not in kinds:
                continue
            if after:
                self._armed[i] = (kinds, after - 1, armed)
            elif fate is None:
                fate = armed
                self._armed[i] = (frozenset(), 0, armed)
        if fate is Fate.CRASH:
            self.die()
        if fate in (Fate.FAIL, Fate.FAIL_LATE):
            self.failed.append(edge)
        return fate

    def die(self) -> None:
        self.dead = True
        raise Crash

    @contextmanager
    def crossing(self, edge: Edge, error: int) -> Iterator[Fate | None]:
        """One passage, for what has no halves."""
        fate = self.meet(edge)
        if fate is Fate.FAIL:
            raise OSError(error, os.strerror(error))
        yield fate
        if fate in (Fate.CRASH_TORN, Fate.CRASH_LATE):
            self.die()
        if fate is Fate.FAIL_LATE:
            raise OSError(error, os.strerror(error))

    # ── what the disk lost ──

    def lose_doomed(self, folder: Path) -> None:
        """The kernel drops the pages that it could not write."""
        for segment, extent in self.doomed:
            _blank(folder, segment, extent)
        self.doomed.clear()

    def lose_unsynced(self, folder: Path, rng: random.Random) -> None:
        """After a crash: of what was not synced, each part may be there or not."""
        self.lose_doomed(folder)
        for segment, extents in self.unsynced.items():
            for extent in coalesce(extents):
                for page in pieces(extent, PAGE * rng.choice((1, 4, 64, 1024))):
                    if rng.random() < 0.5:
                        _blank(folder, segment, page)
            path = segment_file(folder, segment)
            if extents and path.exists() and rng.random() < 0.3:
                os.truncate(path, min(e.start for e in extents))
        for segment in self.unsynced_names:
            if rng.random() < 0.3:
                segment_file(folder, segment).unlink(missing_ok=True)
        for punch, old in self.unsynced_punches:
            path = segment_file(folder, punch.segment)
            if rng.random() < 0.3 and path.exists() and path.stat().st_size >= punch.offset + punch.length:
                with path.open("r+b") as file:
                    file.seek(punch.offset)
                    file.write(old)


def _blank(folder: Path, segment: SegmentNo, extent: Extent) -> None:
    path = segment_file(folder, segment)
    if path.exists():
        end = min(extent.end, path.stat().st_size)
        if end > extent.start:
            with path.open("r+b") as file:
                file.seek(extent.start)
                file.write(bytes(end - extent.start))


class _EdgedSegments(Segments):
    def __init__(self, inner: Segments, edges: Edges) -> None:
        super().__init__(inner.folder)
        self.files, self.last = inner.files, inner.last
        self._edges = edges

    def open(self, segment: SegmentNo, *, create: bool = False) -> None:
        with self._edges.crossing(Edge.CREATE, errno.ENOSPC):
            super().open(segment, create=create)
            self._edges.unsynced_names.add(segment)

    def append(
        self, segment: SegmentNo, offset: int, parts: Sequence[memoryview], *, past_cache: bool = False
    ) -> None:
        fate = self._edges.meet(Edge.APPEND)
        length = sum(map(len, parts))
        self._edges.unsynced.setdefault(segment, []).append(Extent(offset, offset + length))
        if fate in (Fate.FAIL, Fate.CRASH_TORN):
            super().append(segment, offset, [memoryview(b"".join(parts)[: length // 2 + 100])])
        else:
            super().append(segment, offset, parts, past_cache=past_cache)
        if fate in (Fate.CRASH_TORN, Fate.CRASH_LATE):
            self._edges.die()
        if fate is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, segment: SegmentNo, offset: int, length: int) -> bytes:
        self._edges.on_read(segment, offset)
        if self._good_until(segment, offset, length) < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(segment, offset, length)

    def read_into(self, segment: SegmentNo, offset: int, buffer: memoryview, *, past_cache: bool = False) -> int:
        self._edges.on_read(segment, offset)
        good = self._good_until(segment, offset, len(buffer)) - offset
        got = super().read_into(segment, offset, buffer[:good], past_cache=past_cache)
        if good < len(buffer):
            raise CutShort(got, OSError(errno.EIO, os.strerror(errno.EIO)))
        return got

    def _good_until(self, segment: SegmentNo, offset: int, length: int) -> int:
        wanted = Extent(offset, offset + length)
        met = [max(e.start, offset) for s, e in self._edges.bad if s == segment and e.meets(wanted)]
        self._edges.met_bad.extend(met[:1])
        return min(met, default=wanted.end)

    def sync(self, appended: Iterable[SegmentNo], *, created: bool) -> None:
        segments = set(appended)
        before = {s: list(self._edges.unsynced.get(s, ())) for s in segments}
        names, punches = set(self._edges.unsynced_names), list(self._edges.unsynced_punches)
        try:
            with self._edges.crossing(Edge.SYNC, errno.EIO):
                super().sync(segments, created=created)
        except OSError:
            self._edges.doomed.extend((s, e) for s, extents in before.items() for e in extents)
            raise
        for segment, extents in before.items():
            still = self._edges.unsynced.get(segment, ())
            self._edges.unsynced[segment] = [e for e in still if e not in extents]
        if created:
            self._edges.unsynced_names -= names
        self._edges.unsynced_punches = [
            p for p in self._edges.unsynced_punches if p not in punches or p[0].segment not in segments
        ]

    def punch(self, punch: Punch) -> None:
        with self._edges.crossing(Edge.PUNCH, errno.EIO):
            self._edges.unsynced_punches.append((punch, super().read(punch.segment, punch.offset, punch.length)))
            super().punch(punch)

    def truncate(self, segment: SegmentNo, end: int) -> None:
        with self._edges.crossing(Edge.TRUNCATE, errno.EIO):
            super().truncate(segment, end)

    def remove_retired(self, segments: Iterable[SegmentNo]) -> None:
        with self._edges.crossing(Edge.REMOVE, errno.EIO):
            super().remove_retired(segments)


class _EdgedIndex(Index):
    def __init__(self, inner: Index, edges: Edges) -> None:
        vars(self).update(vars(inner))  # The same environment; `inner` is not used any more.
        self._edges = edges

    @contextmanager
    def reading(self) -> Iterator[Snapshot]:
        self._edges.on_look_up()
        with super().reading() as snapshot:
            yield snapshot

    def commit(self, writes: WriteSet) -> None:
        with self._edges.crossing(Edge.COMMIT, errno.EIO):
            super().commit(writes)
