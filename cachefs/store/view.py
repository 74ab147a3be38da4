"""One view as far as it is stored: what of it is here, and its bytes. Rule: the way of a hit, from
`StoredView.read_now` to its return, has no await, no thread and no look-up but of what is in memory.

Reads go by `SpanMap`s, which the loop alone owns. A map is put in place by `publish`, in one step with
everything else that changed, before the writer may punch what the old one named; so a map that was looked up
in this step of the loop names bytes that are there. Whoever waited (for a thread, for the disk) looks up again
and compares before it believes what it read.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Protocol, TypeVar, TypeVarTuple

import trio

from cachefs.errors import Absent, ImageCondemned
from cachefs.plan.extents import PAGE, Extent, pieces
from cachefs.store.disk_read import DiskRead, DiskReadStore
from cachefs.store.format import SpanNo, ViewNo, ViewRecord
from cachefs.store.health import DiskUnusable, Health
from cachefs.store.landing import Landed
from cachefs.store.recipe import ABSENT, HOLE, Run, SpanMap, absent_recipe, places
from cachefs.store.segments import RWF_NOWAIT
from cachefs.store.writer import Doubt

# What the kernel asks for at most in one FUSE read (256 pages), and some room.
READ_MAX = 4 << 20

T = TypeVar("T")
Args = TypeVarTuple("Args")

_ZEROS = memoryview(bytes(READ_MAX))
preadv = os.preadv


class ViewStore(DiskReadStore, Protocol):
    """What is asked of the store. `buffer` has READ_MAX bytes, for all hits."""

    buffer: memoryview
    health: Health
    on_loss: Callable[[StoredView], None]
    on_whole: Callable[[StoredView], None]
    on_partial: Callable[[StoredView], None]

    async def read_disk(self, what: str, work: Callable[[*Args], T], *args: *Args) -> T: ...
    def span_pages(self, size: int, base: int) -> int: ...
    def load_maps(self, view: ViewNo, spans: Sequence[SpanNo], size: int) -> dict[SpanNo, SpanMap]: ...
    def count_map(self, view: StoredView, span: int) -> None: ...
    def note_read_error(self, error: OSError) -> None: ...


class StoredView:
    """One view as far as it is stored. Made by `Store.view`; `size` in bytes."""

    __slots__ = (
        "_buffer", "_files", "_loading", "_maps", "_mask", "_shift", "_store", "condemned", "number", "record",
    )  # fmt: skip

    def __init__(self, store: ViewStore, number: ViewNo, record: ViewRecord) -> None:
        self.number, self.record = number, record
        self.condemned: str | None = None  # Why nothing of it may be read any more.
        self._store = store
        self._shift, self._mask = store.span_size.bit_length() - 1, store.span_size - 1
        self._files: dict[Any, int] = store.segments.files
        self._buffer = store.buffer
        self._maps: dict[int, SpanMap] = {}
        self._loading: dict[int, object] = {}

    @property
    def size(self) -> int:
        return self.record.size

    @property
    def cached(self) -> int:
        """Bytes that are present."""
        return self.record.cached

    @property
    def complete(self) -> bool:
        return self.record.cached >= self.record.size

    def condemn(self, why: str) -> None:
        """Nothing of it is read from now on, by nobody."""
        self.condemned = why
        self.forget_maps()

    @property
    def is_well(self) -> bool:
        """Whether the disk gives what is here, as far as is known."""
        return self._store.health.may_look_up

    @property
    def spans(self) -> int:
        """How many spans it has."""
        return (self.record.size + self._mask) >> self._shift

    @property
    def maps(self) -> Mapping[int, SpanMap]:
        """The maps that are in memory, by span."""
        return self._maps

    # ── the way of a hit ──

    def read_now(self, offset: int, length: int) -> memoryview | None:
        """The bytes, when they are present and in the kernel's page cache; None when that is not so. They are
        good until the next read of the store: use them before the next await. The range must lie in the view
        and be no longer than READ_MAX."""
        span_map = self._maps.get(offset >> self._shift)
        if span_map is None:
            return None
        span_map.used = True
        within = offset & self._mask
        starts = span_map.starts
        i = bisect_right(starts, within) - 1
        if within + length > starts[i + 1]:
            return self._gather_now(offset, length)
        segment = span_map.segments[i]
        if segment > 0:
            piece = self._buffer[:length]
            try:
                # A segment whose file is missing: EBADF, as good as any other error.
                file = self._files.get(segment, -1)
                if preadv(file, (piece,), span_map.sources[i] + within, RWF_NOWAIT) == length:
                    return piece
            except OSError as error:
                self._store.note_read_error(error)
            return None
        return _ZEROS[:length] if segment == HOLE else None

    def _gather_now(self, offset: int, length: int) -> memoryview | None:
        """The same for a range of several runs."""
        at = 0
        for part in pieces(Extent(offset, offset + length), self._mask + 1):
            span_map = self._maps.get(part.start >> self._shift)
            if span_map is None:
                return None
            span_map.used = True
            for segment, source, n in span_map.locate(part.start & self._mask, part.length):
                piece = self._buffer[at : at + n]
                if segment > 0:
                    try:
                        if preadv(self._files.get(segment, -1), (piece,), source, RWF_NOWAIT) != n:
                            return None
                    except OSError as error:
                        self._store.note_read_error(error)
                        return None
                elif segment == HOLE:
                    piece[:] = _ZEROS[:n]
                else:
                    return None
                at += n
        return self._buffer[:length]

    # ── the other ways ──

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """The bytes, from the disk if need be: one thread hop. Chunks that were not verified since the start are
        read whole and compared with their digests first. Raises Absent when a byte is not there, or not right;
        DiskUnusable when the disk cannot say: with what came before, where it failed at one place."""
        whole = Extent(offset, offset + length)
        while True:
            runs = await self._load_runs(whole)
            reading = DiskRead(self._store, self.number, self._shift, whole, runs)
            await self._store.read_disk("a read", reading.run)
            if await self._stands(reading, whole, runs):
                self._note_verified(reading.verified)
                assert isinstance(reading.out, bytearray), "it made its own"
                return reading.out

    async def look_at(self, offset: int, into: memoryview, look: Callable[[memoryview], T]) -> T:
        """What `look` says of the bytes from `offset`, as many as `into` has room for, in the thread that read
        them there. It is asked again when they were replaced meanwhile: then what it said before is void. No use
        of the view, as eviction counts them, and the kernel's cache stays as it is, if `into` begins on a page of
        memory. Raises as `read`; a late thread may still write to `into` then."""
        whole = Extent(offset, offset + len(into))
        while True:
            runs = await self._load_runs(whole)
            reading = DiskRead(self._store, self.number, self._shift, whole, runs, into)
            said = await self._store.read_disk("a read", reading.run_and, look)
            if await self._stands(reading, whole, runs):
                self._note_verified(reading.verified, used=False)
                assert said, "it did not fail"
                return said[0]

    async def _stands(self, reading: DiskRead, whole: Extent, runs: list[Run]) -> bool:
        """Whether what was read may be believed: it may have been replaced and punched meanwhile. Raises what it
        failed with, if that still stands."""
        for error in reading.errors:
            self._store.health.reads.note_error(f"a read: {error.strerror}")
        if places(await self._load_runs(whole)) != places(runs):
            return False
        if reading.failed_at is None:
            return True
        self._note_verified(reading.verified)
        if reading.disk_failed:
            came = bytearray(reading.out[: reading.failed_at - whole.start])
            raise DiskUnusable(f"a read: {reading.errors[0].strerror}", reading.failed_at, came)
        raise Absent(self.number, reading.failed_at)

    async def _load_runs(self, whole: Extent) -> list[Run]:
        await self.load(whole)
        return self._runs(whole)

    def _runs(self, whole: Extent) -> list[Run]:
        return [
            run
            for part in pieces(whole, self._mask + 1)
            for run in self._maps[part.start >> self._shift].locate(part.start & self._mask, part.length)
        ]

    def _note_verified(self, verified: Mapping[SpanNo, list[tuple[Extent, Run]]], *, used: bool = True) -> None:
        for span, found in verified.items():
            span_map = self._maps.get(span)
            if span_map is None:
                continue
            # The ledger may have been ahead of the map: only what lies where it was read is what was verified.
            same = [
                extent for extent, place in found if places(span_map.locate(*_start_and_length(extent))) == [place]
            ]
            if same:
                self._put_map(span, span_map.with_verified(same))
                self._maps[span].used |= used

    async def doubt(self, offset: int) -> None:
        """The byte at `offset` should be here and could not be read: its chunk is looked at, and quarantined
        if it is rotten, so that it is absent and will be fetched."""
        done = trio.Event()
        span = SpanNo(offset >> self._shift)
        self._store.writer.submit(Doubt(self.number, span, (offset & self._mask) // PAGE, done))
        await done.wait()

    async def load(self, extent: Extent) -> None:
        """Makes sure that the maps of `extent`'s spans are in memory. No checkpoint when they are. Raises
        DiskUnusable when they cannot be read now."""
        while missing := [span for span in self._spans(extent) if span not in self._maps]:
            if self.condemned is not None:
                raise ImageCondemned(self.record.image, self.condemned)
            # One token for all who load at once: each overruling the other, two could go on for ever.
            tokens = {span: self._loading.setdefault(span, object()) for span in missing}
            try:
                if not self._store.health.may_look_up:
                    raise DiskUnusable("the index is left alone while its disk is not well")
                loaded = await self._store.read_disk(
                    "a look-up", self._store.load_maps, self.number, missing, self.size
                )
            finally:
                valid = [span for span, token in tokens.items() if self._loading.get(span) is token]
                for span in valid:
                    del self._loading[span]
            # Where `published` or another loader was faster, ours may be older than what stands there.
            for span in valid:
                if span not in self._maps:
                    self._put_map(span, loaded[span])

    def span_of(self, offset: int) -> Extent:
        """The span that holds the byte at `offset`, cut at the view's end."""
        start = offset & ~self._mask
        return Extent(start, min(start + self._mask + 1, self.size))

    def extent_of(self, span: SpanNo) -> Extent:
        """The span's bytes, cut at the view's end."""
        return self.span_of(span << self._shift)

    def absent(self, extent: Extent) -> list[Extent]:
        """The blocks of `extent` that are to be fetched, coalesced. Their spans' maps must be loaded; a span
        whose map is not is taken for absent."""
        missing: list[Extent] = []
        for part in pieces(extent, self._mask + 1):
            base = part.start & ~self._mask
            span_map = self._maps.get(part.start >> self._shift)
            if span_map is None:
                span_map = SpanMap.of(absent_recipe(self._store.span_pages(self.size, base)), lambda _: None)
            for gap in span_map.absent(Extent(part.start - base, part.end - base)):
                found = Extent(base + gap.start, min(base + gap.end, self.size))
                if missing and missing[-1].end == found.start:
                    found = Extent(missing.pop().start, found.end)
                missing.append(found)
        return missing

    def present_at(self, offset: int) -> bool | None:
        """Whether the byte is here; None when its span's map is not in memory."""
        span_map = self._maps.get(offset >> self._shift)
        if span_map is None:
            return None
        return span_map.segments[bisect_right(span_map.starts, offset & self._mask) - 1] != ABSENT

    def _spans(self, extent: Extent) -> Iterable[SpanNo]:
        return map(SpanNo, range(extent.start >> self._shift, ((extent.end - 1) >> self._shift) + 1))

    # ── what the store tells it ──

    def _put_map(self, span: int, span_map: SpanMap) -> None:
        if self.condemned is not None:
            return  # Nothing of it is to be found any more.
        if span not in self._maps:
            self._store.count_map(self, span)
        self._maps[span] = span_map

    def publish(self, landed: Landed) -> None:
        """What landed or went is so from now on, for every read."""
        self._loading.pop(landed.span, None)
        if landed.map is not None:
            self._put_map(landed.span, landed.map)
        else:
            self._maps.pop(landed.span, None)
        was = self.record.cached
        self.record = self.record.with_cached(landed.cached)
        if landed.cached < was:
            if was >= self.record.size:
                self._store.on_partial(self)
            self._store.on_loss(self)
        elif was < self.record.size <= landed.cached:
            self._store.on_whole(self)

    def forget_maps(self) -> None:
        """Also those that are being loaded: they are looked up again."""
        self._loading.clear()
        self._maps.clear()

    def forget_maps_of(self, segments: Set[int]) -> None:
        """Those that name any of `segments`, and those that are being loaded."""
        self._loading.clear()
        for span in [n for n, m in self._maps.items() if not segments.isdisjoint(m.segments)]:
            del self._maps[span]

    def forget_map(self, span: int) -> SpanMap | None:
        """Returns it, if it was in memory."""
        return self._maps.pop(span, None)


def _start_and_length(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.length
