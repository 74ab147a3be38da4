"""The one task that changes the store: lands what is handed to it, commits in groups, punches what was freed.
Rule: nobody else begins a write transaction or appends to a segment.

Landing and committing are two stages, each in a worker thread and at most one call of each at a time. What
has landed can be read at once (its bytes are in the segment's pages of the kernel's cache); it is durable
after the commit, which syncs the segments first. So a group may wait for a slow disk while the next one lands,
and a crash loses at most what was not committed: fetched bytes, which are fetched again.

When a commit fails nothing may be assumed of what was unsynced (the kernel drops pages that it could not
write), so the writer goes back to the committed state: everything that landed since is absent again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import trio

from cachefs.errors import CachefsError, RecordCorrupt, StoreFull
from cachefs.store.format import Punch, SpanNo, ViewNo, ViewRecord
from cachefs.store.index import Index, WriteSet
from cachefs.store.landing import Landed, Lander
from cachefs.store.ledger import Layer, Ledger
from cachefs.store.segments import Segments

log = logging.getLogger(__name__)

# One thread call lands about this much: short enough that what has landed is soon readable.
GROUP_BYTES = 16 << 20
# This much landed is committed without waiting for the interval.
COMMIT_BYTES = 256 << 20
# With this much landed and not committed, landing waits for the disk: a bound on what a crash can lose.
UNCOMMITTED_BYTES_MAX = 1 << 30
# After a failed commit or a full disk nothing is kept for this long.
BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Land:
    """Keep `data` (whole pages) from byte `start` of a span. `done(kept)` is called on the loop when the
    bytes can be read from the store, or will not be."""

    view: ViewNo
    span: SpanNo
    start: int
    data: memoryview
    done: Callable[[bool], None]


@dataclass(frozen=True, slots=True)
class SetView:
    view: ViewNo
    record: ViewRecord


@dataclass(frozen=True, slots=True)
class SetImage:
    """`record` None forgets the image. `number` is the one it was given, 0 for none new."""

    key: bytes
    record: bytes | None
    number: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """The chunk at `page` of a span could not be read: look at it again, and quarantine it if it is rotten.
    `done` is set on the loop afterwards."""

    view: ViewNo
    span: SpanNo
    page: int
    done: trio.Event


@dataclass(frozen=True, slots=True)
class _Punched:
    punches: list[Punch]


@dataclass(frozen=True, slots=True)
class _Flush:
    done: trio.Event


Command = Land | SetView | SetImage | Doubt | _Punched | _Flush


class Readers(Protocol):
    """Who must hear what changed, on the loop and before anything that was replaced is punched."""

    def published(self, landed: Iterable[Landed]) -> None:
        """These spans are as said, and no longer as they were."""

    def went_back(self, views: dict[ViewNo, ViewRecord]) -> None:
        """Everything is as it was committed: look every span up again."""

    def rot_found(self) -> None:
        """A chunk is unusable now: look every span up again."""


class Writer:
    """`submit` hands over work in order; `run` is the task. `idle_s` is the longest that landed bytes stay
    uncommitted (seconds). `reload` gives a ledger of the committed state, for going back to it."""

    def __init__(
        self,
        index: Index,
        segments: Segments,
        ledger: Ledger,
        lander: Callable[[Ledger], Lander],
        reload: Callable[[], Ledger],
        readers: Readers,
        commit_interval_s: float = 1.0,
    ) -> None:
        self._index, self._segments, self._readers = index, segments, readers
        self._ledger, self._make_lander, self._reload = ledger, lander, reload
        self._lander = lander(ledger)
        self._interval_s = commit_interval_s
        self._queue: deque[Command] = deque()
        self._wake = trio.Event()
        self._commit_done: trio.Event | None = None
        self._commit_failed: Exception | None = None
        self._flushing: list[trio.Event] = []
        self._flushing_failed: list[trio.Event] = []
        self._first_uncommitted_s: float | None = None
        self._resume_s = 0.0
        self._stopping = False
        self.not_kept_bytes = 0
        self.trouble: str | None = None  # Why bytes are not kept at the moment, for `status`.
        self.commits = 0

    # ── for everybody, on the loop ──

    @property
    def lander(self) -> Lander:
        return self._lander

    @property
    def ledger(self) -> Ledger:
        """For look-ups, from any thread: never older than what was last published."""
        return self._ledger

    @property
    def queued_bytes(self) -> int:
        return sum(len(c.data) for c in self._queue if isinstance(c, Land))

    def submit(self, command: Command) -> None:
        """In order, without waiting: whoever lands bytes keeps them within a bound of its own until `done`."""
        self._queue.append(command)
        self._wake.set()

    async def flush(self) -> None:
        """Returns when everything that was submitted before is durable, or was given up."""
        done = trio.Event()
        self.submit(_Flush(done))
        await done.wait()

    def stop(self) -> None:
        """`run` returns after everything that was submitted is landed and committed."""
        self._stopping = True
        self._wake.set()

    # ── the task ──

    async def run(self) -> None:
        last_try = False
        async with trio.open_nursery() as nursery:
            while True:
                if self._commit_failed is not None:
                    await self._go_back()
                    if last_try:
                        self._give_up()
                        break
                    last_try = self._stopping  # What is no fetched byte deserves one more.
                group = self._take()
                if group:
                    await self._land(group)
                if self._commit_failed is not None:
                    continue  # While we landed: on a layer that is lost nothing more can be committed.
                if self._commit_done is None and self._is_due():
                    await self._begin_commit(nursery)
                elif self._stopping and not self._queue and self._commit_done is None:
                    break
                await self._wait()

    def _take(self) -> list[Command]:
        if self._waits_for_disk():
            return []
        group: list[Command] = []
        size = 0
        while self._queue and size < GROUP_BYTES:
            command = self._queue.popleft()
            if isinstance(command, _Flush):
                self._flushing.append(command.done)
                continue
            group.append(command)
            size += len(command.data) if isinstance(command, Land) else 256
        return group

    def _waits_for_disk(self) -> bool:
        return self._commit_done is not None and self._ledger.open.bytes_appended > UNCOMMITTED_BYTES_MAX

    def _is_due(self) -> bool:
        if not self._ledger.open:
            for event in self._flushing:
                event.set()
            self._flushing.clear()
            return False
        assert self._first_uncommitted_s is not None
        old = trio.current_time() >= self._first_uncommitted_s + self._interval_s  # As `_wait` reckons.
        large = self._ledger.open.bytes_appended >= COMMIT_BYTES
        return large or bool(self._flushing) or self._stopping or old

    async def _wait(self) -> None:
        """Until there is something to do. Everything that makes work sets `_wake` before it is looked at."""
        if self._queue and not self._waits_for_disk():
            return
        deadline = float("inf")
        if self._ledger.open and self._commit_done is None and self._first_uncommitted_s is not None:
            deadline = self._first_uncommitted_s + self._interval_s
        with trio.move_on_at(deadline):
            await self._wake.wait()
        self._wake = trio.Event()

    # ── landing ──

    async def _land(self, group: list[Command]) -> None:
        if self._first_uncommitted_s is None:
            self._first_uncommitted_s = trio.current_time()
        keep = trio.current_time() >= self._resume_s
        rotten = self._lander.rotten_found
        try:
            landed, outcomes, trouble = await trio.to_thread.run_sync(self._land_all, group, keep)
        except Exception as error:  # A bug in landing costs what had landed since the commit, not the mount.
            log.exception("unexpected failure of landing: going back to what is committed")
            self._give_up_group(group)
            self._commit_failed = error
            return
        if trouble is not None:
            self._note_trouble(trouble)
        elif keep and landed:
            self._note_trouble(None)
        # From here to the end no await: readers see the new maps before anything replaced can be punched.
        self._readers.published(landed)
        if self._lander.rotten_found != rotten:
            self._readers.rot_found()
        for command, kept in outcomes:
            if not kept:
                self.not_kept_bytes += len(command.data)
            command.done(kept)
        for doubt in group:
            if isinstance(doubt, Doubt):
                doubt.done.set()

    def _land_all(
        self, group: list[Command], keep: bool
    ) -> tuple[list[Landed], list[tuple[Land, bool]], Exception | None]:
        landed: dict[tuple[ViewNo, SpanNo], Landed] = {}
        outcomes: list[tuple[Land, bool]] = []
        trouble: Exception | None = None
        for command in group:
            match command:
                case Land(view, span, start, data):
                    kept = False
                    if keep and trouble is None:
                        try:
                            new = self._lander.land(view, span, start, data)
                            landed.pop((view, span), None)  # The latest is published last: it has the right total.
                            landed[view, span] = new
                            kept = True
                        except (StoreFull, OSError) as error:
                            trouble = error
                        except RecordCorrupt as error:
                            log.error("span %d of view %d is not kept: %s", span, view, error)
                    outcomes.append((command, kept))
                case SetView(view, record):
                    known = self._ledger.views.get(view)
                    cached = known.cached if known is not None else 0
                    self._ledger.set_view(view, record.with_cached(cached))
                case SetImage(key, image_record, number):
                    self._ledger.set_image(key, image_record, number)
                case Doubt(view, span, page):
                    self._lander.doubt(view, span, page)
                case _Punched(punches):
                    self._ledger.punched(punches)
                case _:
                    raise AssertionError(command)
        return list(landed.values()), outcomes, trouble

    def _note_trouble(self, error: Exception | None) -> None:
        if error is None:
            if self.trouble is not None:
                log.info("the store takes bytes again")
            self.trouble = None
            return
        self._resume_s = trio.current_time() + BACKOFF_S
        if self.trouble is None:
            log.warning("the store does not keep what is fetched now: %s; reads go on uncached", error)
        self.trouble = str(error)

    # ── committing ──

    async def _begin_commit(self, nursery: trio.Nursery) -> None:
        layer, writes = await trio.to_thread.run_sync(self._ledger.seal)
        self._first_uncommitted_s = None
        flushing, self._flushing = self._flushing, []
        self._commit_done = trio.Event()
        nursery.start_soon(self._commit, layer, writes, flushing)

    async def _commit(self, layer: Layer, writes: WriteSet, flushing: list[trio.Event]) -> None:
        try:
            await trio.to_thread.run_sync(self._commit_in_thread, layer, writes)
        except (OSError, CachefsError) as error:
            self._commit_failed = error
            self._flushing_failed.extend(flushing)  # Told when the readers were: see `_go_back`.
        else:
            self.commits += 1
            self._ledger.committed()
            # The chunks that this commit freed are in no recipe and no reader's map: `published` saw to it.
            if layer.punches:
                self._queue.appendleft(_Punched(await trio.to_thread.run_sync(self._punch, layer.punches)))
            for event in flushing:
                event.set()
        assert self._commit_done is not None
        self._commit_done.set()
        self._commit_done = None
        self._wake.set()

    def _commit_in_thread(self, layer: Layer, writes: WriteSet) -> None:
        self._segments.sync(layer.appended, created=layer.created_segment)
        self._index.commit(writes)
        self._index.trim()

    def _punch(self, punches: list[Punch]) -> list[Punch]:
        """Those that were done. The notes of the others stay, for the next start."""
        done = []
        for punch in punches:
            try:
                self._segments.punch(punch)
                done.append(punch)
            except OSError as error:
                log.error("%s: %s", punch, error)
        return done

    async def _go_back(self) -> None:
        """To the committed state, after a commit that failed: what had landed since is absent again."""
        if self._commit_done is not None:
            await self._commit_done.wait()
        error, self._commit_failed = self._commit_failed, None
        assert error is not None
        lost = self._ledger
        self._ledger = await trio.to_thread.run_sync(self._reload)
        self._ledger.take_over(lost)
        self._lander = self._make_lander(self._ledger)
        self._first_uncommitted_s = trio.current_time()
        self._note_trouble(error)
        # Readers first: whoever still holds a map of what is lost looks again after its wait.
        self._readers.went_back(dict(self._ledger.views))
        for event in self._flushing_failed:
            event.set()
        self._flushing_failed.clear()
        await trio.to_thread.run_sync(self._cut_lost, lost)

    def _give_up_group(self, group: list[Command]) -> None:
        """Nothing of it landed; what is no bytes is done again (it may be done twice)."""
        for command in group:
            if isinstance(command, Land):
                self.not_kept_bytes += len(command.data)
                command.done(False)
            elif isinstance(command, Doubt):
                command.done.set()
        self._queue.extendleft(reversed([c for c in group if not isinstance(c, Land | Doubt)]))

    def _give_up(self) -> None:
        """The last commit failed and there will be no other: whoever waits is told."""
        for event in self._flushing:
            event.set()
        for command in self._queue:
            match command:
                case Land():
                    self.not_kept_bytes += len(command.data)
                    command.done(False)
                case Doubt() | _Flush():
                    command.done.set()
        self._flushing.clear()
        self._queue.clear()

    def _cut_lost(self, lost: Ledger) -> None:
        for segment in lost.uncommitted_segments():
            record = self._ledger.segments.get(segment)
            try:
                self._segments.truncate(segment, record.end if record is not None else 0)
            except OSError as error:
                # Space, no more: nothing is appended to it again, and the next start cuts it off.
                log.error("segment %d: %s", segment, error)
