"""A store for tests of what decides on eviction: spans with chunks that may be shared, and a bound. Rule: it
answers as `Store` does, from memory; what a test wants to go wrong it says beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from cachefs.store.format import SpanNo, Table, ViewKind, ViewNo, ViewRecord
from tests.stores import image_id

MIB = 1 << 20
EPOCH_S = 1_800_000_000  # Where the wall clock of tests begins.


def wall_clock() -> float:
    """Seconds since 1970 in virtual time."""
    return EPOCH_S + trio.current_time()


@dataclass
class FakeMap:
    used: bool = False


@dataclass(frozen=True)
class FakeUsage:
    used: int
    limit: int


@dataclass
class FakeView:
    number: ViewNo
    record: ViewRecord
    maps: dict[int, FakeMap] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        return self.record.cached


@dataclass(eq=False)
class FakeStore:
    """`spans` is what is here: the chunks that each names, of 1 MiB unless `sizes` says otherwise. `limit` in
    bytes. `fails` are raised by the next calls of `evict` or `usage`; `on_evict` hears of every call."""

    limit: int = 1 << 62
    span_size: int = MIB
    evict_s: float = 0.0
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    spans: dict[tuple[ViewNo, SpanNo], frozenset[int]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    records: dict[tuple[Table, bytes], bytes] = field(default_factory=dict)
    used_and_forgotten: deque[tuple[ViewNo, int]] = field(default_factory=deque)
    fails: list[Exception] = field(default_factory=list)
    on_evict: Callable[[Sequence[tuple[ViewNo, SpanNo]]], None] = lambda spans: None
    on_full: Callable[[int], None] = lambda wanted: None
    evictions: list[list[tuple[ViewNo, SpanNo]]] = field(default_factory=list)
    puts: int = 0
    refusals: int = 0
    _numbers: int = 0
    _views: dict[ViewNo, FakeView] = field(default_factory=dict)
    _answered: trio.Event = field(default_factory=trio.Event)

    # ── what a test does ──

    def add_view(self, image: int, size: int = 64 * MIB, kind: ViewKind = ViewKind.ORIGINAL) -> FakeView:
        self._numbers += 1  # No number is given twice.
        number = ViewNo(self._numbers)
        self._views[number] = FakeView(number, ViewRecord(image_id(image), kind, size))
        self.images[image_id(image)] = {"size": size}
        return self._views[number]

    def end(self, view: FakeView) -> None:
        view.record = replace(view.record, kind=ViewKind.ENDED)
        del self.images[view.record.image]

    def land(self, view: FakeView, *spans: int, chunks: frozenset[int] | None = None) -> None:
        """Spans come, each with a chunk of its own unless `chunks` are named."""
        for span in spans:
            own = frozenset({-(view.number * 10_000 + span)})
            self.spans[view.number, SpanNo(span)] = own if chunks is None else chunks
            view.maps[span] = FakeMap(used=True)
        self._count(view)

    async def keep(self, view: FakeView, span: int, chunks: frozenset[int] | None = None) -> bool:
        """Lands a span when there is room, waiting for some if need be; whether it was kept."""
        own = frozenset({-(view.number * 10_000 + span)}) if chunks is None else chunks
        while (wanted := self._more(own)) > 0:
            self._answered = trio.Event()
            refusals = self.refusals
            self.on_full(wanted)
            await self._answered.wait()
            if self.refusals > refusals:
                return False
        self.land(view, span, chunks=own)
        return True

    def _more(self, chunks: frozenset[int]) -> int:
        """Bytes that landing these would take beyond the limit; 0 when they fit."""
        there = {chunk for chunks in self.spans.values() for chunk in chunks}
        wanted = sum(self.sizes.get(chunk, MIB) for chunk in chunks - there)
        return wanted if self.used + wanted > self.limit and wanted else 0

    def read(self, view: FakeView, *spans: int) -> None:
        for span in spans:
            assert (view.number, span) in self.spans, "only what is here is hit"
            view.maps.setdefault(span, FakeMap()).used = True

    def here(self, view: FakeView) -> list[int]:
        return sorted(span for number, span in self.spans if number == view.number)

    @property
    def used(self) -> int:
        chunks = {chunk for chunks in self.spans.values() for chunk in chunks}
        return sum(self.sizes.get(chunk, MIB) for chunk in chunks)

    def _count(self, view: FakeView) -> None:
        view.record = view.record.with_cached(len(self.here(view)) * self.span_size)

    # ── what the store does ──

    def views(self) -> list[FakeView]:
        return list(self._views.values())

    def usage(self) -> FakeUsage:
        self._fail()
        return FakeUsage(self.used, self.limit)

    async def evict(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> int:
        self.on_evict(spans)
        self.evictions.append(list(spans))
        await trio.sleep(self.evict_s)
        self._fail()
        before = self.used
        for view, span in spans:
            self.spans.pop((view, span), None)
            if span in self._views[view].maps:
                self._views[view].maps[span] = FakeMap()
        for view in {view for view, _ in spans}:
            self._count(self._views[view])
        if before > self.used:
            self._answered.set()
        return before - self.used

    def forget_view(self, view: ViewNo) -> None:
        assert self._views[view].record.kind is ViewKind.ENDED
        assert not self._views[view].cached
        del self._views[view]

    def no_room(self) -> None:
        self.refusals += 1
        self._answered.set()

    def put(self, table: Table, key: bytes, record: bytes | None) -> None:
        self.puts += 1
        if record is None:
            self.records.pop((table, key), None)
        else:
            self.records[table, key] = record

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        return sorted((k, r) for (t, k), r in self.records.items() if t is table and k.startswith(prefix))

    def resident(self) -> Iterator[tuple[ViewNo, SpanNo]]:
        yield from sorted(self.spans)

    def _fail(self) -> None:
        if self.fails:
            raise self.fails.pop(0)
