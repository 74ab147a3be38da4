"""What is known of the use of every span that is here: when it was last read, whether anybody came back to it, and
whether guests boot from it. Rule: a read writes nothing; what reads leave behind is one bit of a map in memory,
which is looked at every few seconds.

Five bytes a span, in groups of 256 neighbours that are made when the first of them is used, so that an image
which only claims to be large costs nothing. Changed groups are saved every few minutes and at the end. That is
a hint for eviction, and no more: what is lost or stale costs a worse choice, never a byte. Spans that are here
though nothing is known of them are found by comparing with the store (`reconcile`), and count as used just then.
Spans that are known and not here any more are evicted for nothing, and forgotten.

The time of a span that was touched once is that of its first touch, to within RETOUCH_S: used again later than
that it is touched twice, and from then on the time is that of its last use. So no second array is needed.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import trio

from cachefs import logs
from cachefs.errors import RecordCorrupt
from cachefs.plan.eviction import Group
from cachefs.store import format as f
from cachefs.store import turns
from cachefs.store.format import USES_SPANS, SpanNo, Table, UseFlag, UsesRecord, ViewNo
from cachefs.words import counted

log = logs.get(__name__)

LOOK_S = 10.0
# A reader that passes over a span once does so within seconds, whatever number of reads it makes.
RETOUCH_S = 60
SAVE_S = 300.0
# Maps may be forgotten before they were looked at (after a failed commit, or rot), and with them that a span came.
RECONCILE_S = 6 * 3600.0
# What was used so shortly ago may not be in the index yet.
SETTLED_S = 600

# A boot touches up to 900 MiB, counted in spans of 4 MiB (design §4).
BOOT_BYTES_MAX = 1 << 30
# All boot sets together may claim this share of what the store may hold.
BOOT_SHARE = 0.5

_STEP = 16  # Spans that are worked on between two moments at which reads may come: some 20 µs.
_RECORDS_AT_ONCE = 16  # That a thread decodes before it rests: some 0.6 ms.
_SAVE_PIECE = 64  # Groups.
_U32_MAX = (1 << 32) - 1
_TWICE, _BOOT = int(UseFlag.TWICE), int(UseFlag.BOOT)  # An enum's arithmetic takes ten times as long.


class UsedMap(Protocol):
    """One bit that a read leaves behind."""

    used: bool


class UsedView(Protocol):
    """What is looked at of a view."""

    @property
    def number(self) -> ViewNo: ...

    @property
    def maps(self) -> Mapping[int, UsedMap]: ...


class UsesStore(Protocol):
    """What is asked of the store. `used_and_forgotten` are spans whose maps went before anybody looked at them;
    `resident` goes over the spans of which anything is here and committed, in a thread."""

    @property
    def span_size(self) -> int: ...

    @property
    def used_and_forgotten(self) -> deque[tuple[ViewNo, int]]: ...

    def views(self) -> Sequence[UsedView]: ...

    def put(self, table: Table, key: bytes, record: bytes | None) -> None: ...

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, bytes]]: ...

    def resident(self) -> Iterable[tuple[ViewNo, SpanNo]]: ...


class Uses:
    """See the module. `run` is its task; everything else is called on the loop. `clock` gives the seconds since
    1970, `boot_max` what all boot sets together may claim at this moment, in bytes of their spans. `ready` is set
    when what was known before and what is here were put together."""

    def __init__(
        self,
        store: UsesStore,
        clock: Callable[[], float] = time.time,
        boot_max: Callable[[], int] = lambda: 1 << 62,
    ) -> None:
        self._store, self._clock, self._boot_max = store, clock, boot_max
        self._groups: dict[ViewNo, dict[int, Group]] = {}
        self._changed: set[tuple[ViewNo, int]] = set()
        self._boot: dict[ViewNo, set[SpanNo]] = {}  # The one that was set last is the last.
        self.came = 0  # How many spans were seen to come, since the start.
        self.ready = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. What was not saved then is for `save`."""
        task_status.started()
        await self._begin()
        saved_s = reconciled_s = trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            try:
                await turns.OnLoop().run(self._looking())
                if trio.current_time() >= saved_s + SAVE_S:
                    saved_s = trio.current_time()
                    self._forget_views()
                    while self._save_some(_SAVE_PIECE):
                        await trio.lowlevel.checkpoint()
                if trio.current_time() >= reconciled_s + RECONCILE_S:
                    reconciled_s = trio.current_time()
                    await self.reconcile()
            except Exception:  # A hint that is not kept is no reason to take the mount down.
                log.exception("unexpected failure of keeping uses")

    async def _begin(self) -> None:
        try:
            await self.load()
            await self.reconcile()
        except Exception:
            log.exception("what was used before is not known")
        finally:
            self.ready.set()

    # ── what is known ──

    def groups(self, view: ViewNo) -> list[Group]:
        """What is known of a view's spans, for `plan.eviction`: as it stands, not a copy."""
        return list(self._groups.get(view, {}).values())

    def spans(self, view: ViewNo) -> list[SpanNo]:
        """Those that are here, in order."""
        return [
            SpanNo(group.first + i)
            for group in sorted(self.groups(view))
            for i, last_s in enumerate(group.last_s)
            if last_s
        ]

    def last_s(self, view: ViewNo, span: SpanNo) -> int:
        """Seconds since 1970; 0 when it is not here."""
        group = self._groups.get(view, {}).get(span // USES_SPANS)
        return group.last_s[span % USES_SPANS] if group is not None else 0

    def flags(self, view: ViewNo, span: SpanNo) -> UseFlag:
        group = self._groups.get(view, {}).get(span // USES_SPANS)
        return UseFlag(group.flags[span % USES_SPANS] if group is not None else 0)

    # ── learning ──

    def look(self) -> None:
        """Takes up what reads and landings have left behind since the last look."""
        for _ in self._looking():
            pass

    def _looking(self) -> Generator[None, None, None]:
        """The same in steps, between which maps may come and go."""
        now_s = self._now_s()
        for view in self._store.views():
            for at, (span, span_map) in enumerate(list(view.maps.items()), 1):
                if span_map.used and view.maps.get(span) is span_map:
                    span_map.used = False
                    self._touch(view.number, span, now_s)
                if at % _STEP == 0:
                    yield
        gone = self._store.used_and_forgotten
        while gone:
            self._touch(*gone.popleft(), now_s)

    @property
    def boot_spans_max(self) -> int:
        """How many spans one boot set may have at this moment."""
        return max(min(BOOT_BYTES_MAX, self._boot_max()) // self._store.span_size, 1)

    def set_boot(self, view: ViewNo, spans: Iterable[SpanNo]) -> None:
        """Guests boot from these spans of the view, here or not, and from no others: the first of them, where they
        are too many. Where all boot sets are too many spans, those that were not set for longest are none."""
        new = set(islice(spans, self.boot_spans_max))
        self._set_boot(view, new)
        most = max(self._boot_max() // self._store.span_size, 1)
        total = sum(map(len, self._boot.values()))
        for oldest in list(self._boot)[:-1]:
            if total <= most:
                break
            total -= len(self._boot[oldest])
            self._set_boot(oldest, set())

    def _set_boot(self, view: ViewNo, new: set[SpanNo]) -> None:
        old = self._boot.pop(view, set())
        for span in old ^ new:
            group = self._group(view, span)
            group.flags[span % USES_SPANS] ^= _BOOT
            self._changed.add((view, span // USES_SPANS))
        if new:
            self._boot[view] = new

    def forget(self, view: ViewNo, span: SpanNo) -> tuple[int, int]:
        """The span is about to be evicted: it is as if it had never been here. Returns what `restore` takes."""
        group = self._group(view, span)
        i = span % USES_SPANS
        was = group.last_s[i], group.flags[i]
        if was != (0, 0):
            group.last_s[i] = group.flags[i] = 0
            if was[1] & _BOOT:
                self._boot[view].discard(span)
            self._changed.add((view, span // USES_SPANS))
        return was

    def restore(self, view: ViewNo, span: SpanNo, was: tuple[int, int]) -> None:
        """It could not be evicted after all. What was learnt meanwhile stands."""
        self._put_back(view, span, was)
        self._changed.add((view, span // USES_SPANS))

    def _put_back(self, view: ViewNo, span: int, was: tuple[int, int]) -> None:
        group = self._group(view, span)
        i = span % USES_SPANS
        if not group.last_s[i]:
            group.last_s[i] = was[0]
        group.flags[i] |= was[1]
        if was[1] & _BOOT:
            self._boot.setdefault(view, set()).add(SpanNo(span))

    def _touch(self, view: ViewNo, span: int, now_s: int) -> None:
        group = self._group(view, span)
        i = span % USES_SPANS
        last_s = group.last_s[i]
        self.came += not last_s
        if 0 < last_s <= now_s and not group.flags[i] & _TWICE:
            if now_s - last_s < RETOUCH_S:
                return
            group.flags[i] |= _TWICE
        group.last_s[i] = now_s
        self._changed.add((view, span // USES_SPANS))

    def _group(self, view: ViewNo, span: int) -> Group:
        groups = self._groups.setdefault(view, {})
        number = span // USES_SPANS
        group = groups.get(number)
        if group is None:
            group = groups[number] = Group.empty(number * USES_SPANS)
        return group

    def _now_s(self) -> int:
        """Never 0, which means that a span is not here."""
        return min(max(int(self._clock()), 1), _U32_MAX)

    # ── over restarts ──

    def save(self) -> None:
        """Hands everything that changed to the store's next commit: at the end, before the writer stops."""
        self.look()
        self._forget_views()
        while self._save_some(_SAVE_PIECE):
            pass

    def _forget_views(self) -> None:
        """Those that the store has no more."""
        for view in self._groups.keys() - {view.number for view in self._store.views()}:
            for number in self._groups.pop(view):
                self._changed.discard((view, number))
                self._store.put(Table.USES, f.uses_key(view, number), None)
            self._boot.pop(view, None)

    def _save_some(self, most: int) -> bool:
        """Whether there is more."""
        for _ in range(min(most, len(self._changed))):
            view, number = self._changed.pop()
            group = self._groups[view][number]
            key = f.uses_key(view, number)
            known = any(group.last_s) or any(group.flags)
            record = UsesRecord(tuple(group.last_s), tuple(group.flags)).encode(key) if known else None
            self._store.put(Table.USES, key, record)
        return bool(self._changed)

    async def load(self) -> None:
        """Takes up what was saved; what was learnt since the start stands."""
        unreadable, loaded = await trio.to_thread.run_sync(self._load, self._now_s())
        if unreadable:
            records = counted(unreadable, "record")
            log.warning("%s of uses cannot be read: what they are of counts as used now", records)
        await turns.OnLoop().run(self._taking_up(loaded))

    def _taking_up(self, loaded: Iterable[tuple[ViewNo, int, Group]]) -> Generator[None, None, None]:
        for view, _, group in loaded:
            for i, was in enumerate(zip(group.last_s, group.flags, strict=True)):
                if was != (0, 0):
                    self._put_back(view, group.first + i, was)
                if i % _STEP == 0:
                    yield

    def _load(self, now_s: int) -> tuple[int, list[tuple[ViewNo, int, Group]]]:
        unreadable, loaded = 0, []
        for at, (key, record) in enumerate(self._store.items(Table.USES), 1):
            if at % _RECORDS_AT_ONCE == 0:
                turns.rest()
            try:
                view, number = f.split_uses_key(key)
                saved = UsesRecord.decode(key, record)
            except (RecordCorrupt, struct.error):
                unreadable += 1
                continue
            # From a clock that was ahead: it would be the last to go for ever.
            last_s = array("I", (min(last_s, now_s) for last_s in saved.last_s))
            loaded.append((view, number, Group(number * USES_SPANS, last_s, bytearray(saved.flags))))
        return unreadable, loaded

    async def reconcile(self) -> int:
        """Compares with the spans that the store has. Returns how many of them were not known."""
        now_s = self._now_s()
        known = {view: dict(groups) for view, groups in self._groups.items()}
        unknown, gone = await trio.to_thread.run_sync(self._compare, known, now_s)
        return await turns.OnLoop().run(self._putting_right(unknown, gone, now_s))

    def _putting_right(
        self, unknown: Mapping[ViewNo, array[int]], gone: Iterable[tuple[ViewNo, SpanNo, int]], now_s: int
    ) -> Generator[None, None, int]:
        found = 0
        for view, spans in unknown.items():
            for at, span in enumerate(spans, 1):
                if not self.last_s(view, SpanNo(span)):
                    self._group(view, span).last_s[span % USES_SPANS] = now_s
                    self._changed.add((view, span // USES_SPANS))
                    self.came += 1
                    found += 1
                if at % _STEP == 0:
                    yield
        for view, span, last_s in gone:
            if self.last_s(view, span) == last_s:
                self.forget(view, span)
            yield
        return found

    def _compare(
        self, known: Mapping[ViewNo, Mapping[int, Group]], now_s: int
    ) -> tuple[dict[ViewNo, array[int]], list[tuple[ViewNo, SpanNo, int]]]:
        """In a thread: the spans that are here and not known, and those that are known and not here. Both are
        looked at again on the loop."""
        here: dict[tuple[ViewNo, int], bytearray] = {}
        unknown: dict[ViewNo, array[int]] = {}
        for view, span in self._store.resident():
            number, i = divmod(span, USES_SPANS)
            group = known.get(view, {}).get(number)
            if group is None or not group.last_s[i]:
                unknown.setdefault(view, array("I")).append(span)
            else:
                here.setdefault((view, number), bytearray(USES_SPANS))[i] = 1
        none = bytes(USES_SPANS)
        gone = [
            (view, SpanNo(group.first + i), last_s)
            for view, groups in known.items()
            for number, group in groups.items()
            for i, (last_s, is_here) in enumerate(zip(group.last_s, here.get((view, number), none), strict=True))
            if last_s and not is_here and last_s + SETTLED_S < now_s
        ]
        return unknown, gone
