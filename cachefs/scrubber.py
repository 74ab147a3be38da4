"""When to look at everything that is cached, how hard, and what to do with what is found. Rule: no byte that
can still be read is given up while the image's own bytes cannot be fetched again.

A run goes over the chunks in the order of the disk, then over the recipes, then over the counts. Rot is
quarantined where it is met: from then on nobody reads or shares it. The spans that name rotten chunks are found
by one walk over the recipes for all that were met within `GATHER_S`, whoever met them; what of these can be
fetched becomes absent, and is fetched at once where the image is leased. What only Glance could give and Glance
has no more is lost, and is said to be lost. While Glance is away the rest waits.

How far a run is goes into the store, so that it goes on there after a restart.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.config import ScrubConfig
from cachefs.control import Handler
from cachefs.errors import RecordCorrupt
from cachefs.leisure import Guests
from cachefs.plan.scrub import next_start, paid_until, wait_for_hours
from cachefs.store import scrub as looking
from cachefs.store.format import (
    COUNTERS_KEY,
    SCRUB_KEY,
    ChunkId,
    Counters,
    ScrubRecord,
    SegmentNo,
    SpanNo,
    Table,
    ViewKind,
    ViewNo,
)
from cachefs.store.index import Index
from cachefs.store.scrub import BadSpan, ChunkScan, OpenFile, Step, Suspect
from cachefs.store.view import StoredView
from cachefs.words import counted

log = logs.get(__name__)

# A run by interval does not begin, or go on, while a node that has just started boots its instances.
QUIET_S = 300.0
SAVE_S = 60.0
# A run waits so long for guests that wait, and then reads once: they may wait for Glance for hours.
COURTESY_S = 5.0
RESTED_S = 1.0  # In a longer pause no descriptor is kept.
GATHER_S = 10.0
QUARANTINE_TRIES = 4
AWAY_S = 60.0  # How long to wait for Glance, and for a disk, before they are asked again.
POLL_S = 3600.0  # The clock may be set while we wait.
TOTALS_TRIES, TOTALS_AGAIN_S = 10, 30.0
FAILED_S = 3600.0
FAULTS_MAX = 100  # Of one run are named; the rest is counted.
GATHERED_MAX = 100_000  # More rotten chunks than this are not remembered one by one.

REPAIR = "stop the daemon and run cachefs check --repair"


class Fate(Enum):
    """What can become of bytes of an image that are rotten here."""

    FETCHABLE = "fetchable"
    AWAY = "away"  # Glance does not answer now.
    GONE = "gone"  # Glance has the image no more.


class Status(IntEnum):
    """What a run found, as an exit status."""

    SOUND = 0
    HEALED = 1  # Or to be healed when Glance is back.
    DAMAGED = 2  # Lost, or a damaged index.


class Keeper(Protocol):
    """What of `Store` a scrub works with."""

    span_size: int
    path: Path

    def views(self) -> list[StoredView]: ...
    def get(self, table: Table, key: bytes) -> bytes | None: ...
    def put(self, table: Table, key: bytes, record: bytes | None) -> None: ...
    async def quarantine(
        self, chunks: Sequence[ChunkId], seen: Mapping[ChunkId, tuple[SegmentNo, int]] | None = None
    ) -> list[ChunkId]: ...
    async def mend(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> int: ...
    async def flush(self) -> None: ...
    async def forget_segments(self, segments: frozenset[SegmentNo]) -> None: ...


async def _fetchable(view: StoredView) -> Fate:
    return Fate.FETCHABLE


@dataclass
class Around:
    """What a scrub asks of those around it, and tells them; all on the loop. `fate` may ask Glance."""

    guests: Guests | None = None  # They are given way to.
    disk_unwell: Callable[[], bool] = lambda: False
    note_error: Callable[[OSError], None] = lambda error: None
    live_bytes: Callable[[], int] = lambda: 0  # Of all chunks that there are.
    fate: Callable[[StoredView], Awaitable[Fate]] = _fetchable
    leased: Callable[[StoredView], bool] = lambda view: False
    refetch: Callable[[StoredView, SpanNo], None] = lambda view, span: None


@dataclass
class Run:
    """One run, as far as it is. `waiting`: spans to be healed when Glance is back. `given_back`: bytes of holes
    that were none. `uncompared`: the counts could not be looked at."""

    number: int
    by_interval: bool
    began_s: float = 0.0  # By the loop's clock.
    faults: list[str] = field(default_factory=list)
    faults_unnamed: int = 0
    waiting: int = 0
    given_back: int = 0
    uncompared: bool = False
    unsettled: int = 0  # Rotten chunks that the store did not quarantine.

    def fault(self, faults: Iterable[str]) -> None:
        for fault in faults:
            if len(self.faults) < FAULTS_MAX:
                self.faults.append(fault)
                log.error("the index is damaged: %s: %s", fault, REPAIR)
            else:
                self.faults_unnamed += 1


class Scrubber:
    """`run` is the task. `index` is the store's; `wall` gives seconds since 1970."""

    def __init__(
        self,
        store: Keeper,
        index: Index,
        config: ScrubConfig,
        around: Around | None = None,
        *,
        wall: Callable[[], float] = time.time,
        open_file: OpenFile = os.open,
    ) -> None:
        self._store, self._index, self._config = store, index, config
        self._around = around or Around()
        self._wall, self._open_file = wall, open_file
        self._folder = store.path / "segments"
        self._record = ScrubRecord()
        self._run: Run | None = None
        self._last: dict[str, Any] | None = None
        self._runs = self._finished = 0
        self._bytes_total = 0  # Of the run under way; 0 where nobody knows.
        self._asked = False
        self._asked_event = trio.Event()
        self._not_before_s = 0.0  # By the loop's clock, as all that follow.
        self._paid_until_s = self._saved_s = 0.0
        self._stage = "idle"
        self._pause = ""
        self._rotten: set[ChunkId] = set()
        self._all_rotten = False
        self._rot_event = trio.Event()
        self._away: dict[ViewNo, set[ChunkId]] = {}  # What waits for Glance.
        self._away_event = trio.Event()
        self._lost: set[tuple[ViewNo, SpanNo]] = set()
        self._repeats = logs.Repeats(log)

    # ── for everybody, on the loop ──

    def rot_found(self, chunks: Iterable[ChunkId]) -> None:
        """These chunks were quarantined: what names them is to be mended soon."""
        before = len(self._rotten)
        self._rotten.update(chunks)
        if len(self._rotten) == before:
            return
        if len(self._rotten) > GATHERED_MAX:
            self._rotten.clear()
            self._all_rotten = True
        self._rot_event.set()

    def start(self) -> int:
        """A run is to begin now; one that is under way is to go on at any hour. Returns its number."""
        if self._run is not None:
            self._run.by_interval = False
            number = self._run.number
        else:
            self._asked = True
            number = self._runs + 1
        self._asked_event.set()
        return number

    def handlers(self) -> dict[str, Handler]:
        return {"scrub": self._answer_scrub, "scrub-status": self._answer_status}

    async def _answer_scrub(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"was_running": self._run is not None or self._asked, "run": self.start()}

    async def _answer_status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self.status()

    def status(self) -> dict[str, Any]:
        """For `status`. Times in seconds since 1970, None for never; `share` is how much of `bytes_total` is seen;
        counts are those of the run that is under way, or of the last one; `last` is how that ended."""
        record = self._record
        under_way = record.end_chunk != 0
        return {
            "state": f"{self._stage}, waits for {self._pause}" if self._pause else self._stage,
            "run": self._run.number if self._run is not None else None,
            "finished": self._finished,
            "share": self._share() if under_way else None,
            "bytes_total": max(self._bytes_total, record.verified_bytes) if under_way else None,
            "began": record.began_s or None,
            "ended": record.ended_s or None,
            "next": self._next_start(),
            "bytes_verified": record.verified_bytes,
            "rotten": record.rotten,
            "healed": record.healed,
            "lost": record.lost,
            "to_mend": len(self._rotten) + sum(map(len, self._away.values())),
            "last": self._last,
        }

    def _share(self) -> float:
        """Of the bytes, where it is known how many there are: numbers of chunks that went long ago are many in an
        old store, and pass in no time."""
        record = self._record
        if self._stage == "reading" and self._bytes_total:
            return round(min(record.verified_bytes / self._bytes_total, 1.0), 4)
        return round(record.next_chunk / record.end_chunk, 4)

    def _next_start(self) -> float | None:
        if self._run is not None:
            return None
        at = next_start(self._record.began_s, self._config.interval, self._record.end_chunk != 0, self._wall())
        return None if at == float("inf") else at

    # ── the task ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. How far it is then goes into the store with its last commit."""
        self._not_before_s = trio.current_time() + QUIET_S
        self._record = await trio.to_thread.run_sync(self._stored)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mend_what_rots)
            nursery.start_soon(self._ask_again)
            task_status.started()
            while True:
                await self._until_due()
                self._runs += 1
                self._run = Run(self._runs, by_interval=not self._asked, began_s=trio.current_time())
                self._asked = False
                try:
                    await self._scrub(self._run)
                except Exception:  # A bug, or a store that fails: reads go on, and so must the daemon.
                    log.exception("unexpected failure of a scrub: it goes on in %d s", FAILED_S)
                    self._not_before_s = trio.current_time() + FAILED_S
                    self._last = None
                finally:
                    if self._record.end_chunk:
                        self._save()
                    self._finished, self._run = self._run.number, None
                    self._stage, self._pause = "idle", ""

    def _stored(self) -> ScrubRecord:
        record = self._store.get(Table.META, SCRUB_KEY)
        try:
            return ScrubRecord() if record is None else ScrubRecord.decode(record)
        except RecordCorrupt as error:
            log.error("%s: the next scrub begins at the beginning", error)
            return ScrubRecord()

    async def _until_due(self) -> None:
        while not self._asked:
            now_s = self._wall()
            under_way = self._record.end_chunk != 0
            wait_s = next_start(self._record.began_s, self._config.interval, under_way, now_s) - now_s
            wait_s = max(wait_s, self._not_before_s - trio.current_time())
            if wait_s <= 0:
                wait_s = self._hours_wait()
                if wait_s == 0:
                    return
            with trio.move_on_after(min(wait_s, POLL_S)):
                await self._asked_event.wait()
            self._asked_event = trio.Event()

    def _hours_wait(self) -> float:
        local = time.localtime(self._wall())
        return wait_for_hours(self._config.hours, local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec)

    def _save(self) -> None:
        self._store.put(Table.META, SCRUB_KEY, self._record.encode())
        self._saved_s = trio.current_time()

    def _note(self, **changes: Any) -> None:
        self._record = self._record._replace(**changes)

    # ── one run ──

    async def _scrub(self, run: Run) -> None:
        if self._record.end_chunk == 0:
            await self._store.flush()  # What has landed by now is part of the run.
            counters = await trio.to_thread.run_sync(self._store.get, Table.META, COUNTERS_KEY)
            end = ChunkId(Counters.decode(counters or b"").chunk)
            self._record = ScrubRecord(1, end, self._wall(), self._record.ended_s)
            self._save()
        self._bytes_total = self._around.live_bytes()
        self._lost.clear()
        self._paid_until_s = trio.current_time()
        self._stage = "reading"
        await self._read_chunks(run)
        self._stage = "comparing recipes"
        await self._compare_recipes(run)
        self._stage = "comparing counts"
        await self._compare_counts(run)
        self._note(next_chunk=0, end_chunk=0, ended_s=self._wall())
        self._save()
        self._conclude(run)

    def _conclude(self, run: Run) -> None:
        record = self._record
        took_s = trio.current_time() - run.began_s
        faults = len(run.faults) + run.faults_unnamed
        status = Status.SOUND
        if record.rotten or record.healed or run.waiting or run.unsettled:
            status = Status.HEALED
        if record.lost or faults:
            status = Status.DAMAGED
        self._last = {
            "run": run.number, "exit_status": int(status), "seconds": round(took_s, 1),
            "bytes_verified": record.verified_bytes, "rotten": record.rotten, "healed": record.healed,
            "waiting": run.waiting, "lost": record.lost, "faults": list(run.faults), "faults_in_all": faults,
            "unsettled": run.unsettled, "bytes_given_back": run.given_back, "counts_compared": not run.uncompared,
        }  # fmt: skip
        log.log(
            (logging.INFO, logging.WARNING, logging.ERROR)[status],
            "scrub: %d MiB verified in %.0f s; %s rotten, %s to be fetched again, "
            "%d when Glance is back, %d lost; %s; %d MiB given back",
            record.verified_bytes >> 20, took_s, counted(record.rotten, "chunk"), counted(record.healed, "span"),
            run.waiting, record.lost,
            f"{counted(faults, 'fault')} of the index: {REPAIR}" if faults else "the index is sound",
            run.given_back >> 20,
        )  # fmt: skip

    # ── its parts ──

    async def _read_chunks(self, run: Run) -> None:
        scan = ChunkScan(
            self._index,
            self._folder,
            ChunkId(self._record.next_chunk),
            ChunkId(self._record.end_chunk),
            self._open_file,
        )
        try:
            while True:
                await self._courtesy(run, scan)
                step = await trio.to_thread.run_sync(scan.step)
                if step is None:
                    break
                self._paid_until_s = paid_until(
                    self._paid_until_s, step.bytes_read, self._config.bandwidth, trio.current_time()
                )
                await self._take(run, scan, step)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(scan.close)

    async def _take(self, run: Run, scan: ChunkScan, step: Step) -> None:
        for error in step.errors:
            self._repeats.error("read", "a scrub could not read: %s", error)
            self._around.note_error(error)
        if step.errors and self._around.disk_unwell():
            # A disk that fails altogether says nothing of single chunks.
            await self._wait_while(self._around.disk_unwell, AWAY_S, "the disk", scan)
            again, step.suspects = step.suspects, []
            await trio.to_thread.run_sync(self._look_again, scan, again, step)
        run.fault(step.faults)
        if step.suspects:
            await self._quarantine(run, scan, step.suspects)
        self.rot_found(step.rotten)
        self._note(
            verified_bytes=self._record.verified_bytes + step.bytes_verified,
            next_chunk=step.next_chunk or self._record.next_chunk,
        )
        if trio.current_time() >= self._saved_s + SAVE_S:
            self._save()

    @staticmethod
    def _look_again(scan: ChunkScan, suspects: list[Suspect], step: Step) -> None:
        for suspect in suspects:
            scan.look_again(suspect.piece, step)

    async def _quarantine(self, run: Run, scan: ChunkScan, suspects: list[Suspect]) -> None:
        for (segment, what), count in Counter((s.piece.segment, s.what) for s in suspects).items():
            log.error("a scrub found %s in segment %d: %s", counted(count, "chunk"), segment, what)
        for tried in range(QUARANTINE_TRIES):
            if tried > 1:
                await trio.sleep(AWAY_S)  # The writer was busy with a failure of its own.
            seen = {suspect.chunk: (SegmentNo(suspect.piece.segment), suspect.piece.page) for suspect in suspects}
            rotten = set(await self._store.quarantine(list(seen), seen))
            self._note(rotten=self._record.rotten + len(rotten))
            self.rot_found(rotten)
            suspects = [suspect for suspect in suspects if suspect.chunk not in rotten]
            if not suspects:
                return
            # Gone since, or moved.
            again = Step()
            await trio.to_thread.run_sync(scan.forget, suspects)
            await trio.to_thread.run_sync(self._look_again, scan, suspects, again)
            suspects = again.suspects
            if not suspects:
                return
        run.unsettled += len(suspects)
        chunks = counted(len(suspects), "rotten chunk")
        log.error("%s could not be quarantined: the next scrub finds what is left", chunks)

    async def _compare_recipes(self, run: Run) -> None:
        await self._store.flush()
        key: bytes | None = b""
        while key is not None:
            await self._courtesy(run)
            found = await trio.to_thread.run_sync(looking.walk, self._index, self._store.span_size, key)
            run.fault(found.faults)
            if found.bad:
                run.waiting += await self._settle(found.bad)
            key = found.last_key

    async def _compare_counts(self, run: Run) -> None:
        for _ in range(TOTALS_TRIES):
            await self._courtesy(run)
            totals = await trio.to_thread.run_sync(
                looking.totals, self._index, self._folder, self._store.span_size, self._should_yield
            )
            if totals is not None:
                break
            await trio.sleep(TOTALS_AGAIN_S)
        else:
            run.uncompared = True
            log.warning("a scrub could not compare counts: the index was wanted all the time")
            return
        run.fault(totals.faults)
        run.uncompared = bool(totals.unread)
        if totals.excess:
            run.given_back = await self._punch_again(totals.excess)

    async def _punch_again(self, excess: Mapping[SegmentNo, int]) -> int:
        segments = sorted(excess)[: looking.REPUNCHED_MAX]
        dead = await trio.to_thread.run_sync(looking.dead_extents, self._index, segments, self._should_yield)
        if dead is None:
            return 0
        # Chunks that were moved away can be read where they were, by maps that are older than that.
        await self._store.forget_segments(frozenset(segments))
        given_back = 0
        for segment, extents in dead.items():
            try:
                n = await trio.to_thread.run_sync(looking.repunch, self._folder, segment, extents)
            except OSError as error:
                if error.errno != errno.ENOENT:  # Compaction was faster.
                    log.error("segment %d: freed bytes cannot be given back: %s", segment, error)
                continue
            log.warning("segment %d held %d bytes that no chunk names; %d given back", segment, excess[segment], n)
            given_back += n
        return given_back

    def _should_yield(self) -> bool:
        """In a thread: whoever stops the daemon need not wait for it."""
        trio.from_thread.check_cancelled()
        return self._index.wanted

    # ── pauses ──

    async def _courtesy(self, run: Run, scan: ChunkScan | None = None) -> None:
        """Returns when the run may do its next bit of work."""
        pause_s = self._paid_until_s - trio.current_time()
        if pause_s > 0:
            if scan is not None and pause_s > RESTED_S:
                await trio.to_thread.run_sync(scan.rest)
            await trio.sleep(pause_s)
        if run.by_interval and self._hours_wait():
            await self._wait_while(lambda: run.by_interval and self._hours_wait() > 0, 60.0, "its hours", scan)
        if self._around.disk_unwell():
            await self._wait_while(self._around.disk_unwell, AWAY_S, "the disk", scan)
        guests = self._around.guests
        if guests is not None and guests.waiting:
            self._pause = "guests"
            await guests.until_calm(COURTESY_S)
            self._pause = ""

    async def _wait_while(
        self, condition: Callable[[], bool], every_s: float, what: str, scan: ChunkScan | None = None
    ) -> None:
        self._pause = what
        if scan is not None:
            await trio.to_thread.run_sync(scan.rest)
            self._save()
        while condition():
            with trio.move_on_after(every_s):
                await self._asked_event.wait()
            self._asked_event = trio.Event()
        self._pause = ""

    # ── mending ──

    async def _mend_what_rots(self) -> None:
        while True:
            await self._rot_event.wait()
            await trio.sleep(GATHER_S)
            if self._around.disk_unwell():
                await trio.sleep(AWAY_S)
                continue
            self._rot_event = trio.Event()
            began_s = trio.current_time()
            try:
                await self._mend_rotten()
            except Exception:  # As in a run.
                log.exception("unexpected failure of mending: the next scrub finds what is left")
            # However much rots: no more than a tenth of the time is spent on walks.
            await trio.sleep(10 * (trio.current_time() - began_s))

    async def _ask_again(self) -> None:
        """What had to wait for Glance is looked at when it is back."""
        while True:
            if not self._away:
                self._away_event = trio.Event()
                await self._away_event.wait()
            await trio.sleep(AWAY_S)
            views = {view.number: view for view in self._store.views()}
            for number in list(self._away):
                view = views.get(number)
                if view is None or await self._fate(view) is not Fate.AWAY:
                    self.rot_found(self._away.pop(number))

    async def _mend_rotten(self) -> None:
        """Mends what names the chunks that were reported."""
        chunks, self._rotten = self._rotten, set()
        every, self._all_rotten = self._all_rotten, False
        if not chunks and not every:
            return
        # What was landed before the quarantine may name them, and not be committed.
        await self._store.flush()
        key: bytes | None = b""
        while key is not None:
            found = await trio.to_thread.run_sync(
                partial(looking.walk, self._index, self._store.span_size, key, None if every else chunks)
            )
            await self._settle(found.bad)
            key = found.last_key

    async def _fate(self, view: StoredView) -> Fate:
        return Fate.GONE if view.record.kind is ViewKind.ENDED else await self._around.fate(view)

    async def _settle(self, bad: Collection[BadSpan]) -> int:
        """Makes absent what can be fetched again, says what is lost, and remembers the rest; returns how many
        spans that is."""
        views = {view.number: view for view in self._store.views()}
        fates: dict[ViewNo, Fate] = {}
        mend: list[BadSpan] = []
        waiting = 0
        for span in bad:
            view = views.get(span.view)
            if view is None:
                continue  # Forgotten since, or a fault that was reported.
            if span.view not in fates:
                fates[span.view] = await self._fate(view)
            match fates[span.view]:
                case Fate.FETCHABLE:
                    mend.append(span)
                case Fate.AWAY:
                    waiting += 1
                    self._away.setdefault(span.view, set()).update(span.chunks)
                    self._away_event.set()
                case Fate.GONE:
                    self._lose(view, span)
        if mend:
            healed = await self._store.mend([(span.view, span.span) for span in mend])
            self._note(healed=self._record.healed + healed)
            for span in mend:
                if self._around.leased(views[span.view]):
                    self._around.refetch(views[span.view], span.span)
        return waiting

    def _lose(self, view: StoredView, span: BadSpan) -> None:
        if (span.view, span.span) in self._lost:
            return
        self._lost.add((span.view, span.span))
        self._note(lost=self._record.lost + 1)
        for extent in span.extents:
            log.error(
                "LOST: %d bytes at %d are rotten, and Glance has the image no more",
                min(extent.end, view.size) - extent.start, extent.start, image=view.record.image,
            )  # fmt: skip
