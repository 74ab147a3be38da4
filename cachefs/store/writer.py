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

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import trio

from cachefs import logs
from cachefs.errors import CachefsError, RecordCorrupt, StoreFull
from cachefs.store import turns
from cachefs.store.format import ChunkId, Punch, SegmentNo, SpanNo, Table, ViewNo, ViewRecord
from cachefs.store.index import Index, WriteSet
from cachefs.store.landing import Landed, Lander
from cachefs.store.ledger import Found, Layer, Ledger
from cachefs.store.segments import Segments

log = logs.get(__name__)

# One thread call lands about this much: short enough that what has landed is soon readable.
GROUP_BYTES = 16 << 20
# This much landed is committed without waiting for the interval.
COMMIT_BYTES = 64 << 20
# Looking for chunks like those of a span touches some 100 pages of a large index: after so many landings they
# count as this process's memory no more.
TRIM_LANDINGS = 2
# With this much landed and not committed, landing waits for the disk: a bound on what a crash can lose.
UNCOMMITTED_BYTES_MAX = 1 << 30
# What goes is looked up when a commit is over, if that is soon: two threads at LMDB delay reads more than one.
COMMIT_FIRST_S = 0.2
# More holes than this are made by several threads.
PUNCH_ALONE, PUNCH_THREADS = 64, 4
# Landings that met the limit wait so long for eviction to make room.
HELD_S = 10.0
# After a failed commit or a full disk nothing is kept for this long.
BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Land:
    """Keep `data` (whole pages) from byte `start` of a span. `done(kept)` is called on the loop when the
    bytes can be read from the store, or will not be. `in_passing`: nobody is expected to read them soon."""

    view: ViewNo
    span: SpanNo
    start: int
    data: memoryview
    done: Callable[[bool], None]
    in_passing: bool = False


@dataclass(frozen=True, slots=True)
class LandZeros:
    """These spans are zeros, where nothing of them is here. `reply`: those that have something else, once the rest
    can be read; None where nothing is kept."""

    view: ViewNo
    spans: Sequence[SpanNo]
    reply: Reply[list[SpanNo] | None]


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


T = TypeVar("T")


class Reply(Generic[T]):
    """What a command comes to; `wait` returns it once it is so."""

    def __init__(self, otherwise: T) -> None:
        self.value = otherwise
        self._event = trio.Event()

    def set(self, value: T) -> None:
        self.value = value
        self._event.set()

    def give_up(self) -> None:
        """Nothing came of it."""
        self._event.set()

    async def wait(self) -> T:
        await self._event.wait()
        return self.value


@dataclass(frozen=True, slots=True)
class Drop:
    """These spans become absent. `reply`: bytes of segments that were freed, once their space is back."""

    spans: Sequence[tuple[ViewNo, SpanNo]]
    reply: Reply[int]


@dataclass(frozen=True, slots=True)
class Mend:
    """What is in chunks that are missing or rotten becomes absent. `reply`: how many spans changed."""

    spans: Sequence[tuple[ViewNo, SpanNo]]
    reply: Reply[int]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Looks at chunks again. `reply`: those that are rotten, and will not be read again."""

    chunks: Sequence[ChunkId]
    seen: Mapping[ChunkId, tuple[SegmentNo, int]]  # Where somebody saw on the disk that they are: segment, page.
    reply: Reply[list[ChunkId]]


@dataclass(frozen=True, slots=True)
class Move:
    """Writes the chunks that lie in `sources` once more. `reply`: bytes, once they are durable there."""

    chunks: Sequence[ChunkId]
    sources: frozenset[SegmentNo]
    reply: Reply[int]


@dataclass(frozen=True, slots=True)
class Remove:
    """Removes segments in which no chunk lies and that no map names. `reply`: how many are gone."""

    segments: Sequence[SegmentNo]
    reply: Reply[int]


@dataclass(frozen=True, slots=True)
class DropView:
    """Forgets a view of which nothing is cached."""

    view: ViewNo


@dataclass(frozen=True, slots=True)
class Put:
    """A record that nothing else in the index refers to; None removes it."""

    table: Table
    key: bytes
    record: bytes | None


@dataclass(frozen=True, slots=True)
class _Punched:
    punches: list[Punch]


@dataclass(frozen=True, slots=True)
class _Flush:
    done: trio.Event


Asked = Drop | Mend | Quarantine | Move | Remove
Command = Land | LandZeros | SetView | SetImage | Doubt | Asked | DropView | Put | _Punched | _Flush


class Readers(Protocol):
    """Who must hear what changed, on the loop and before anything that was replaced is punched."""

    def published(self, landed: Iterable[Landed]) -> None:
        """These spans are as said, and no longer as they were."""

    def went_back(self, views: dict[ViewNo, ViewRecord]) -> None:
        """Everything is as it was committed: look every span up again."""

    def rot_found(self, chunks: Sequence[ChunkId]) -> None:
        """These chunks are unusable now: look every span up again."""

    def unreadable(self, chunks: Sequence[ChunkId]) -> None:
        """The disk did not give these chunks: they are to be fetched again."""

    def committed(self, chunks: Iterable[ChunkId]) -> None:
        """These new chunks are durable."""

    def failed(self, error: OSError) -> None:
        """The disk did not take what was to be landed."""

    def full(self, wanted: int) -> bool:
        """There is no room for `wanted` bytes. Whether somebody makes some, or says `no_room`."""
        ...


InThread = Callable[..., Awaitable[Any]]


async def _in_thread(what: str, work: Callable[..., Any], *args: Any) -> Any:
    return await trio.to_thread.run_sync(work, *args)


@dataclass
class _Told:
    """Who waits for one commit."""

    flushing: list[trio.Event]
    asked: list[tuple[Reply[int], int]]

    def all(self, *, failed: bool = False) -> None:
        for event in self.flushing:
            event.set()
        for reply, value in self.asked:
            reply.give_up() if failed else reply.set(value)


@dataclass
class _Outcome:
    """What came of a group: to be told on the loop."""

    landed: dict[tuple[ViewNo, SpanNo], Landed] = field(default_factory=dict)
    kept: list[Land] = field(default_factory=list)
    refused: list[Land] = field(default_factory=list)
    short: list[Land] = field(default_factory=list)  # There was no room for them.
    told: list[Callable[[], None]] = field(default_factory=list)
    asked: list[tuple[Reply[int], int]] = field(default_factory=list)  # Told when it is committed.
    made_room: bool = False
    trouble: OSError | None = None

    def publish(self, *landed: Landed) -> None:
        """The latest of a view comes last: it has the right total."""
        for new in landed:
            self.landed.pop((new.view, new.span), None)
            self.landed[new.view, new.span] = new


class Writer:
    """`submit` hands over work in order; `run` is the task. `idle_s` is the longest that landed bytes stay
    uncommitted (seconds). `reload` gives a ledger of the committed state, for going back to it. `in_thread` runs
    what it is given to its end in a thread, under the name that comes first."""

    def __init__(
        self,
        index: Index,
        segments: Segments,
        ledger: Ledger,
        lander: Callable[[Ledger], Lander],
        reload: Callable[[], Ledger],
        readers: Readers,
        commit_interval_s: float = 1.0,
        in_thread: InThread = _in_thread,
    ) -> None:
        self._in_thread = in_thread
        self._index, self._segments, self._readers = index, segments, readers
        self._ledger, self._make_lander, self._reload = ledger, lander, reload
        self._lander = lander(ledger)
        self._interval_s = commit_interval_s
        self._queue: deque[Command] = deque()
        self._wake = trio.Event()
        self._commit_done: trio.Event | None = None
        self._given_back: trio.Event | None = None  # The space that the last commit freed.
        self._commit_failed: Exception | None = None
        self._flushing: list[trio.Event] = []
        # What was asked for and is done in the open layer: told when that is committed.
        self._asked: list[tuple[Reply[int], int]] = []
        self._told_of_failure: list[_Told] = []
        self._landing = False
        self._landed_since_trim = 0
        self._sealed_is_committed = False
        self._held: deque[Land] = deque()  # They met the limit, and wait for room.
        self._held_until_s = float("inf")
        self._first_uncommitted_s: float | None = None
        self._resume_s = 0.0
        self._stopping = False
        self.not_kept_bytes = 0
        self._repeats = logs.Repeats(log)
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
        return sum(len(c.data) for c in (*self._queue, *self._held) if isinstance(c, Land))

    def no_room(self) -> None:
        """Nothing can be evicted: what met the limit is not kept."""
        held, self._held = self._held, deque()
        if not held:
            return
        self._held_until_s = float("inf")
        self._note_trouble(StoreFull(sum(len(land.data) for land in held)))
        for land in held:
            self.refuse(land)

    def room_again(self) -> None:
        """Space came back: what met the limit is tried again, before what came after it."""
        self._queue.extendleft(reversed(self._held))
        self._held.clear()
        self._held_until_s = float("inf")
        self._wake.set()

    def refuse_queued(self) -> None:
        """Nothing is kept now: memory that waits for the disk is needed by who waits for bytes."""
        waiting = [command for command in (*self._queue, *self._held) if isinstance(command, Land | Doubt)]
        self._queue = deque(command for command in self._queue if not isinstance(command, Land | Doubt))
        self._held.clear()
        for command in waiting:
            self._tell_given_up(command)

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
                if self._held and (self._stopping or trio.current_time() >= self._held_until_s):
                    self.no_room()
                group = self._take()
                if group:
                    await self._land(group)
                if self._commit_failed is not None:
                    continue  # While we landed: on a layer that is lost nothing more can be committed.
                if self._commit_done is None and self._is_due():
                    await self._begin_commit(nursery)
                elif self._stopping and not self._queue and not self._held and self._is_settled:
                    break
                await self._wait()

    def _take(self) -> list[Command]:
        if self._waits_for_disk():
            return []
        group: list[Command] = []
        size = 0
        while self._queue and size < GROUP_BYTES:
            if group and isinstance(self._queue[0], Drop):
                break  # That is a group by itself.
            command = self._queue.popleft()
            if isinstance(command, _Flush):
                self._flushing.append(command.done)
                continue
            if self._held and isinstance(command, Land):
                self._held.append(command)
                continue
            group.append(command)
            if isinstance(command, Drop):
                break
            size += len(command.data) if isinstance(command, Land) else 256
        return group

    def _waits_for_disk(self) -> bool:
        return self._commit_done is not None and self._ledger.open.bytes_appended > UNCOMMITTED_BYTES_MAX

    @property
    def _is_settled(self) -> bool:
        return self._commit_done is None and self._given_back is None

    def _is_due(self) -> bool:
        if not self._ledger.open:
            for event in self._flushing:
                event.set()
            self._flushing.clear()
            for reply, value in self._asked:
                reply.set(value)
            self._asked.clear()
            return False
        assert self._first_uncommitted_s is not None
        old = trio.current_time() >= self._first_uncommitted_s + self._interval_s  # As `_wait` reckons.
        large = self._ledger.open.bytes_appended >= COMMIT_BYTES
        return large or bool(self._flushing) or bool(self._asked) or self._stopping or old

    async def _wait(self) -> None:
        """Until there is something to do. Everything that makes work sets `_wake` before it is looked at."""
        if self._queue and not self._waits_for_disk():
            return
        deadline = float("inf")
        if self._ledger.open and self._commit_done is None and self._first_uncommitted_s is not None:
            deadline = self._first_uncommitted_s + self._interval_s
        if self._held:
            deadline = min(deadline, self._held_until_s)
        with trio.move_on_at(deadline):
            await self._wake.wait()
        self._wake = trio.Event()

    # ── landing ──

    async def _land(self, group: list[Command]) -> None:
        if self._first_uncommitted_s is None:
            self._first_uncommitted_s = trio.current_time()
        keep = trio.current_time() >= self._resume_s
        self._landing = True
        try:
            outcome: _Outcome
            if isinstance(group[0], Drop):
                outcome = await self._drop(group[0])
            else:
                outcome = await self._in_thread("landing", self._land_all, group, keep)
        except Exception as error:  # A bug in landing costs what had landed since the commit, not the mount.
            log.exception("unexpected failure of landing: going back to what is committed")
            self._give_up_group(group)
            self._commit_failed = error
            return
        finally:
            self._landing = False
            if self._sealed_is_committed:
                self._sealed_is_committed = False
                self._ledger.committed()
        if outcome.trouble is not None:
            self._readers.failed(outcome.trouble)
            self._note_trouble(outcome.trouble)
        elif keep and (outcome.landed or outcome.made_room):
            self._note_trouble(None)
        # From here to the end no await: readers see the new maps before anything replaced can be punched.
        self._readers.published(outcome.landed.values())
        rotten, self._lander.newly_rotten = self._lander.newly_rotten, []
        if rotten:
            self._readers.rot_found(rotten)
        unreadable, self._lander.newly_unreadable = self._lander.newly_unreadable, []
        if unreadable:
            self._readers.unreadable(unreadable)
        for land in outcome.kept:
            land.done(True)
        for land in outcome.refused:
            self.refuse(land)
        for tell in outcome.told:
            tell()
        self._asked.extend(outcome.asked)
        if outcome.short:
            self._hold(outcome.short)

    async def _drop(self, command: Drop) -> _Outcome:
        """On the loop, between reads: it is much work for Python, and nobody is in a hurry for it."""
        spans = list(dict.fromkeys(command.spans))
        out, freed, on_loop = _Outcome(), 0, turns.OnLoop()
        if self._commit_done is not None:
            with trio.move_on_after(COMMIT_FIRST_S):
                await self._commit_done.wait()
        with turns.changing_often():
            found = await self._in_thread("looking up what goes", self._look_ahead, spans)
            for view, span in spans:
                dropped = await on_loop.run(self._lander.drop(view, span, found))
                if dropped is not None:
                    self._readers.published([dropped[0]])  # At once: all together would take a millisecond.
                    freed += dropped[1]
        out.asked.append((command.reply, freed))
        out.made_room = freed > 0
        return out

    def _look_ahead(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> Found:
        with self._ledger.batch():
            return self._ledger.look_ahead(spans)

    def refuse(self, land: Land) -> None:
        """Its bytes are not kept."""
        self.not_kept_bytes += len(land.data)
        land.done(False)

    def _hold(self, lands: list[Land]) -> None:
        """Until there is room, or nobody makes any."""
        self._held.extend(lands)
        self._held_until_s = trio.current_time() + HELD_S
        if self._stopping or not self._readers.full(sum(len(land.data) for land in self._held)):
            self.no_room()

    def _land_all(self, group: list[Command], keep: bool) -> _Outcome:
        """In the landing thread."""
        out = _Outcome()
        with self._ledger.batch():
            for command in group:
                match command:
                    case Land():
                        self._land_one(command, keep, out)
                    case LandZeros():
                        self._land_zeros(command, keep, out)
                    case SetView(view, record):
                        known = self._ledger.views.get(view)
                        cached = known.cached if known is not None else 0
                        self._ledger.set_view(view, record.with_cached(cached))
                    case SetImage(key, image_record, number):
                        self._ledger.set_image(key, image_record, number)
                    case Put(table, key, other_record):
                        self._ledger.put(table, key, other_record)
                    case Doubt(view, span, page, done):
                        if (looked_at := self._lander.doubt(view, span, page)) is not None:
                            out.publish(looked_at)
                        out.told.append(done.set)
                    case DropView(view):
                        if view in self._ledger.views and not self._ledger.views[view].cached:
                            self._ledger.drop_view(view)
                    case _Punched(punches):
                        self._ledger.punched(punches)
                    case _Flush():
                        raise AssertionError("flushes are no work")
                    case _:
                        self._do_asked(command, out)
        self._landed_since_trim += len(out.kept)
        if self._landed_since_trim >= TRIM_LANDINGS:
            self._landed_since_trim = 0
            self._index.trim()
        return out

    def _land_one(self, command: Land, keep: bool, out: _Outcome) -> None:
        if not keep or out.trouble is not None or command.view not in self._ledger.views:
            out.refused.append(command)
            return
        if out.short:
            out.short.append(command)
            return
        try:
            landed = self._lander.land(
                command.view, command.span, command.start, command.data, in_passing=command.in_passing
            )
            out.publish(landed)
            out.kept.append(command)
        except StoreFull:
            out.short.append(command)
        except OSError as error:
            out.trouble = error
            out.refused.append(command)
        except RecordCorrupt as error:
            self._repeats.error("span", "span %d of view %d is not kept: %s", command.span, command.view, error)
            out.refused.append(command)

    def _land_zeros(self, command: LandZeros, keep: bool, out: _Outcome) -> None:
        others: list[SpanNo] | None = None
        if keep and out.trouble is None and not out.short and command.view in self._ledger.views:
            with suppress(StoreFull):
                landed, others = self._lander.land_zeros(command.view, command.spans)
                out.publish(*landed)
        out.told.append(partial(command.reply.set, others))

    def _do_asked(self, command: Asked, out: _Outcome) -> None:
        match command:
            case Mend(spans, reply):
                done = [found for span in spans if (found := self._lander.mend(*span)) is not None]
                out.publish(*(landed for landed, _ in done))
                out.told.append(partial(reply.set, len(done)))
            case Quarantine(chunks, seen, bad):
                rotten = [chunk for chunk in chunks if self._lander.quarantine(chunk, seen.get(chunk))]
                out.told.append(partial(bad.set, rotten))
            case Move(chunks, sources, reply):
                try:
                    out.asked.append((reply, self._lander.move(chunks, sources)))
                except (StoreFull, OSError) as error:
                    log.warning("segments are not compacted now: %s", error)
                    out.asked.append((reply, 0))
            case Remove(segments, reply):
                gone = sorted(set(segments) & set(self._lander.lifeless()))
                for segment in gone:
                    self._ledger.remove_segment(segment)
                out.asked.append((reply, len(gone)))
            case _:
                raise AssertionError(command)

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
        with turns.changing_often(wanted=bool(self._ledger.open.freed)):
            layer, writes = await trio.to_thread.run_sync(self._ledger.seal)
        self._first_uncommitted_s = None
        told = _Told(self._flushing, self._asked)
        self._flushing, self._asked = [], []
        self._commit_done = trio.Event()
        nursery.start_soon(self._commit, layer, writes, told, nursery)

    async def _commit(self, layer: Layer, writes: WriteSet, told: _Told, nursery: trio.Nursery) -> None:
        try:
            with turns.changing_often(wanted=bool(layer.freed)):
                await self._in_thread("a commit", self._commit_in_thread, layer, writes)
        except (OSError, CachefsError) as error:
            self._commit_failed = error
            self._told_of_failure.append(told)  # When the readers were: see `_go_back`.
        else:
            self.commits += 1
            self._readers.committed(layer.seen())
            if self._landing:  # It looks at a snapshot that may be older than this commit.
                self._sealed_is_committed = True
            else:
                self._ledger.committed()
            if self._given_back is not None:  # As fast as it is freed, and no faster.
                await self._given_back.wait()
            self._given_back = trio.Event()
            nursery.start_soon(self._give_back, layer, told, self._given_back)
        assert self._commit_done is not None
        self._commit_done.set()
        self._commit_done = None
        self._wake.set()

    async def _give_back(self, layer: Layer, told: _Told, done: trio.Event) -> None:
        """Beside the next commit, which has nothing to do with it."""
        try:
            with turns.changing_often(wanted=bool(layer.freed)):
                await self._give_back_space(layer)
        except Exception:  # It costs space until the next start, which does what is noted; not the mount.
            log.exception("unexpected failure of giving space back")
        told.all()
        self._given_back = None
        done.set()
        self._wake.set()

    async def _give_back_space(self, layer: Layer) -> None:
        # The chunks that this commit freed are in no recipe and no reader's map: `published` saw to it.
        if layer.punches:
            self._queue.appendleft(_Punched(await self._in_thread("punching", self._punch, layer.punches)))
        if layer.removed:
            for segment in layer.removed:
                self._segments.retire(segment)
            try:
                await self._in_thread("removing segments", self._segments.remove_retired, layer.removed)
            except OSError as error:
                log.error("a segment that holds nothing cannot be removed, until the next start: %s", error)
        if self._held and (layer.punches or layer.removed):
            self.room_again()

    def _commit_in_thread(self, layer: Layer, writes: WriteSet) -> None:
        self._segments.sync(layer.appended, created=layer.created_segment)
        self._index.commit(writes)
        self._index.trim()

    def _punch(self, punches: list[Punch]) -> list[Punch]:
        """Those that were done. The notes of the others stay, for the next start. Segments are punched side by
        side: a filesystem takes as long for one hole as for a MiB, and only what is on the same file waits."""
        by_segment: dict[SegmentNo, list[Punch]] = {}
        for punch in punches:
            by_segment.setdefault(punch.segment, []).append(punch)
        if len(punches) < PUNCH_ALONE or len(by_segment) == 1:
            return self._punch_each(punches)
        with ThreadPoolExecutor(PUNCH_THREADS, "punch") as threads:
            return [punch for done in threads.map(self._punch_each, by_segment.values()) for punch in done]

    def _punch_each(self, punches: list[Punch]) -> list[Punch]:
        done = []
        for punch in punches:
            try:
                self._segments.punch(punch)
                done.append(punch)
            except OSError as error:
                self._repeats.error("punch", "%s: %s", punch, error)
        return done

    async def _go_back(self) -> None:
        """To the committed state, after a commit that failed: what had landed since is absent again."""
        if self._commit_done is not None:
            await self._commit_done.wait()
        error, self._commit_failed = self._commit_failed, None
        assert error is not None
        lost = self._ledger
        self._ledger = await self._in_thread("reading the index", self._reload)
        self._ledger.take_over(lost)
        self._lander = self._make_lander(self._ledger)
        self._first_uncommitted_s = trio.current_time()
        self._note_trouble(error)
        # Readers first: whoever still holds a map of what is lost looks again after its wait.
        self._readers.went_back(dict(self._ledger.views))
        for told in self._told_of_failure:
            told.all(failed=True)
        self._told_of_failure.clear()
        _Told([], self._asked).all(failed=True)  # What they asked for went with the layer.
        self._asked.clear()
        await self._in_thread("cutting off what is lost", self._cut_lost, lost)

    def _give_up_group(self, group: list[Command]) -> None:
        """Nothing of it landed; what is neither bytes nor asked for is done again (it may be done twice)."""
        self._queue.extendleft(reversed([c for c in group if not self._tell_given_up(c)]))

    def _give_up(self) -> None:
        """The last commit failed and there will be no other: whoever waits is told."""
        _Told(self._flushing, self._asked).all(failed=True)
        for command in (*self._queue, *self._held):
            self._tell_given_up(command)
        self._flushing.clear()
        self._asked.clear()
        self._queue.clear()
        self._held.clear()

    def _tell_given_up(self, command: Command) -> bool:
        """Tells whoever waits for `command` that nothing came of it; False when nobody waits."""
        match command:
            case Land():
                self.refuse(command)
            case Doubt() | _Flush():
                command.done.set()
            case Drop() | Mend() | Quarantine() | Move() | Remove() | LandZeros():
                command.reply.give_up()
            case _:
                return False
        return True

    def _cut_lost(self, lost: Ledger) -> None:
        for segment in lost.uncommitted_segments():
            record = self._ledger.segments.get(segment)
            try:
                self._segments.truncate(segment, record.end if record is not None else 0)
            except OSError as error:
                # Space, no more: nothing is appended to it again, and the next start cuts it off.
                log.error("segment %d: %s", segment, error)
