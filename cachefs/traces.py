"""Boot traces: what is read first of an image after it was opened is recorded, kept over restarts, and fetched
ahead of the next guest. Rule: a trace is a hint. Whatever becomes of one, no read fails or waits for it, and a
handle that is not recorded has nothing of this in its way.

Recording. For some seconds after an open of which the trace is not known, or of which little is cached, handles of
the view read through `RecordingFile`. All of them together are one recording, which ends at its time (or with the
daemon) and becomes, or changes, the trace of the image's content (see `plan.trace`).

Replaying. What a trace names and is absent is asked for in few requests, in the order of need, up to AHEAD of them
at once, behind demand and reading ahead, and before hydration. A guest that misses a block of a request that is
under way, or waits for its turn, joins and hurries it. A replay gives way to guests that wait for anything else,
and ends early when nobody leases the view any more, the store takes nothing, or the origin fails.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import trio

from cachefs import logs
from cachefs.blocks import Blocks
from cachefs.bounds import TRACE_RESERVED_MAX
from cachefs.control import Handler
from cachefs.errors import ControlError, ImageCondemned, OriginError
from cachefs.fetcher import TRANSLATIONS_MAX, Fetcher
from cachefs.flights import Flight, Priority
from cachefs.plan import trace, trace_file
from cachefs.plan.extents import BLOCK, Extent
from cachefs.plan.trace import Pace
from cachefs.plan.trace_file import NamedTrace
from cachefs.store import format as f
from cachefs.store.content import Store
from cachefs.store.format import OriginMode, SpanNo, Table, TraceRecord, ViewKind, ViewNo
from cachefs.store.survey import UNDECODABLE, decode_trace
from cachefs.store.view import StoredView
from cachefs.uses import Uses
from cachefs.views import View
from cachefs.views.recording import RecordingFile
from cachefs.words import counted

log = logs.get(__name__)

# How many are kept, and how much memory their records may take. Those that were not used for longest go.
TRACES_MAX, RECORDS_BYTES_MAX = trace_file.TRACES_MAX, 16 << 20
# Recordings at once, and handles of each: one more takes the place of the one that noted least.
RECORDINGS_MAX, FILES_MAX = 32, 16
# Blocks that all handles together may have noted: some 25 MB.
NOTED_MAX = 1 << 18
# A trace of fewer blocks is somebody's look at the header: recorded again whenever it can be.
FULL_BLOCKS = 64
# Requests that wait for a place, so that guests can join them.
AHEAD = 64
# A link that is another one again and again is not followed for ever: the last plan is carried out.
PLANS_MAX = 8
# Before each try; after a failure nothing more is asked for in one.
PAUSES_S = (0.0, 1.0, 5.0)
# What was replayed, and not kept, is not fetched again at each open.
AGAIN_S = 60.0
# When a trace was used is written down to within so much.
USED_S = 3600.0
# Of a disk inside a qcow2, a byte of the guest's costs at least this much of the file.
DENSITY_MIN = 0.25
_PIECE = 64
# At runs of a trace in one step of the loop: each takes some 30 µs beside many flights, and guests wait meanwhile.
_LOOKS = 2


class LeasesOfViews(Protocol):
    """What is asked of leases."""

    def is_leased(self, view: StoredView) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Known:
    """One trace as the store has it, and what is asked of it without decoding it."""

    record: bytes
    size: int
    recorded_s: float
    used_s: float
    recordings: int
    runs: int
    blocks: int

    @classmethod
    def of(cls, key: bytes, found: TraceRecord, record: bytes | None = None) -> _Known:
        blocks = sum(run.blocks for run in found.runs)
        return cls(
            found.encode(key) if record is None else record,
            found.size,
            found.recorded_s,
            found.used_s,
            found.recordings,
            len(found.runs),
            blocks,
        )


class _Made(NamedTuple):
    """What a recording came to."""

    key: bytes
    known: _Known
    spans: list[SpanNo]


@dataclass(eq=False)
class _Recording:
    """One under way. Who made a handle is told when it is over."""

    view: StoredView
    began_s: float
    files: list[tuple[RecordingFile, Callable[[], None]]] = field(default_factory=list)


@dataclass(eq=False)
class _Replay:
    """One under way. `ahead` are places among the requests that may be asked for at once."""

    view: StoredView
    flights: set[Flight] = field(default_factory=set)
    ahead: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(AHEAD))
    one_ended: trio.Event = field(default_factory=trio.Event)  # The next one to end.
    error: OriginError | None = None
    bytes: int = 0


class Traces:
    """See the module. `run` is its task, `save` is for the end; everything else is called on the loop. `seconds`
    is how long is recorded, 0 for never. `names_of` gives what the content of an image is called, the best name
    first; `images` all that are known, `name_of` what people call one. `clock` gives the seconds since 1970."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        blocks: Blocks,
        uses: Uses,
        leases: LeasesOfViews,
        *,
        seconds: float,
        names_of: Callable[[str], Sequence[str]],
        images: Callable[[], Iterable[str]] = lambda: (),
        name_of: Callable[[str], str | None] = lambda image: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._fetcher, self._blocks, self._uses, self._leases = store, fetcher, blocks, uses, leases
        self._seconds, self._names_of, self._images, self._clock = seconds, names_of, images, clock
        self._name_of = name_of
        self._known: dict[bytes, _Known] = {}
        self._recordings: dict[ViewNo, _Recording] = {}
        self._replays: dict[ViewNo, _Replay] = {}
        self._replayed: dict[ViewNo, tuple[float, int]] = {}  # When that ended, and what was cached then.
        self._nursery: trio.Nursery | None = None
        self.on_replayed: Callable[[], None] = lambda: None  # Whoever waited for a replay may go on.
        self.recorded = self.replayed = self.bytes_replayed = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. What is being recorded then is for `save`."""
        try:
            await self.load()
        except Exception:  # Without them everything works as it did before them.
            log.exception("the boot traces are not known")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # ── what is known ──

    async def load(self) -> None:
        """Takes up what outlived the last daemon."""
        for key, known in await trio.to_thread.run_sync(self._load):
            if known is None:
                log.warning("a boot trace cannot be read: forgotten")
                self._store.put(Table.TRACES, key, None)
            else:
                self._known.setdefault(key, known)
        self._forget_oldest(b"")

    def _load(self) -> list[tuple[bytes, _Known | None]]:
        found: list[tuple[bytes, _Known | None]] = []
        for key, record in self._store.items(Table.TRACES):
            try:
                # Its seal must do here; what is used is looked at more closely then.
                known = _Known.of(key, TraceRecord.decode(key, record), record)
                found.append((key, known if trace.is_content(f.split_trace_key(key)[0]) else None))
            except UNDECODABLE:
                found.append((key, None))
        return found

    def _find(self, view: StoredView) -> tuple[bytes, _Known] | None:
        for name in self._names_of(view.record.image):
            key = f.trace_key(name, view.record.kind)
            known = self._known.get(key)
            if known is not None and known.size == view.size:
                return key, known
        return None

    def _put(self, key: bytes, known: _Known) -> None:
        self._known[key] = known
        self._store.put(Table.TRACES, key, known.record)
        self._forget_oldest(key)

    def _drop(self, key: bytes) -> None:
        if self._known.pop(key, None) is not None:
            self._store.put(Table.TRACES, key, None)

    def _forget_oldest(self, but: bytes) -> None:
        size = sum(len(known.record) for known in self._known.values())
        if len(self._known) <= TRACES_MAX and size <= RECORDS_BYTES_MAX:
            return
        for key in sorted(self._known.keys() - {but}, key=lambda key: self._known[key].used_s):
            if len(self._known) <= TRACES_MAX and size <= RECORDS_BYTES_MAX:
                return
            size -= len(self._known[key].record)
            self._drop(key)

    # ── for whoever opens images, and for hydration ──

    def opened(self, view: StoredView, file: View, done: Callable[[], None]) -> View:
        """Somebody opens `view`, and would read it by `file`: what to read by until `done` is called. Never
        fails."""
        try:
            return self._opened(view, file, done)
        except Exception:  # A bug in a hint is no reason to refuse an open.
            log.exception("unexpected failure of a boot trace", image=view.record.image)
            return file

    def _opened(self, view: StoredView, file: View, done: Callable[[], None]) -> View:
        if view.record.kind not in trace.KINDS or self._nursery is None:
            return file
        found = self._find(view)
        if found is not None and self._is_to_be_used(view):
            replay = self._replays[view.number] = _Replay(view)
            self._nursery.start_soon(self._run_alone, self._use, replay, *found)
        recording = self._recordings.get(view.number)
        if recording is None:
            if not self._is_to_be_recorded(view, found[1] if found is not None else None):
                return file
            recording = self._recordings[view.number] = _Recording(view, trio.current_time())
            self._nursery.start_soon(self._run_alone, self._end_in_time, recording)
        if len(recording.files) >= FILES_MAX:
            least = min(recording.files, key=lambda one: len(one[0].touches))
            recording.files.remove(least)
            self._end_file(*least)
        recorder = RecordingFile(file, view.size, recording.began_s, trace.SCAN_BLOCKS, self._look_at)
        recording.files.append((recorder, done))
        return recorder

    def is_replaying(self, view: StoredView) -> bool:
        """Whether a trace of its image is being fetched, of this view or another."""
        return any(replay.view.record.image == view.record.image for replay in self._replays.values())

    def before_hydration(self, view: StoredView) -> Sequence[Extent]:
        """What its trace names and is absent, as far as that is known without looking: requests in the order of
        need. Empty when there is no trace, and while a replay fetches it, which goes first anyway."""
        found = self._find(view) if view.record.kind in trace.KINDS else None
        if found is None or self.is_replaying(view) or view.complete:
            return ()
        record = TraceRecord.decode(found[0], found[1].record)
        needed = trace.extents(record.runs, view.size)
        return trace.requests([gap for extent in needed for gap in view.absent(extent)], self._pace(view))

    def status(self) -> dict[str, object]:
        """For `status`: counts since the start, sizes in bytes."""
        return {
            "known": len(self._known),
            "recording": len(self._recordings),
            "replaying": len(self._replays),
            "recorded": self.recorded,
            "replayed": self.replayed,
            "bytes_replayed": self.bytes_replayed,
        }

    @staticmethod
    async def _run_alone(work: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await work(*args)
        except Exception:  # Nobody waits for it, and nobody is to suffer from it.
            log.exception("unexpected failure of a boot trace")

    # ── recording ──

    def _is_to_be_recorded(self, view: StoredView, known: _Known | None) -> bool:
        if not self._seconds or not view.size or len(self._recordings) >= RECORDINGS_MAX:
            return False
        if known is None or known.blocks < min(FULL_BLOCKS, view.size // BLOCK // 4):
            return True
        return view.cached < known.blocks * BLOCK // 2

    def _look_at(self, file: RecordingFile) -> None:
        """It has noted many blocks: whoever reads on and on is not recorded any longer."""
        noted = len(file.touches)
        files = [file for recording in self._recordings.values() for file, _ in recording.files]
        is_scan = trace.is_scan(list(file.touches))
        if not is_scan and noted < trace.BLOCKS_MAX and sum(len(one.touches) for one in files) < NOTED_MAX:
            file.look_at = 2 * noted
            return
        for recording in self._recordings.values():
            for one, done in recording.files:
                if one is file:
                    self._end_file(one, done)
        if is_scan:
            file.touches.clear()

    async def _end_in_time(self, recording: _Recording) -> None:
        await trio.sleep(self._seconds)
        made = self._making(recording.view, self._end(recording))
        self._take(recording.view, await trio.to_thread.run_sync(made))

    def _end(self, recording: _Recording) -> list[Mapping[int, int]]:
        """From now on nothing is noted, and the handles read as if nothing had been."""
        del self._recordings[recording.view.number]
        for file, done in recording.files:
            self._end_file(file, done)
        return [file.touches for file, _ in recording.files]

    @staticmethod
    def _end_file(file: RecordingFile, done: Callable[[], None]) -> None:
        if not file.is_over:
            file.end()
            done()

    def _making(self, view: StoredView, touches: Sequence[Mapping[int, int]]) -> Callable[[], _Made | None]:
        """Puts together what is known and what was recorded, by its best name; None where that was no boot. May be
        called in a thread."""
        found, now_s = self._find(view), self._clock()
        key = f.trace_key(self._names_of(view.record.image)[0], view.record.kind)

        def make() -> _Made | None:
            runs = trace.recorded(touches)
            if not runs:
                return None
            recordings = 0
            if found is not None:
                with suppress(*UNDECODABLE):
                    known = decode_trace(found[0], found[1].record)
                    runs, recordings = trace.merged(known.runs, runs), known.recordings
            made = _Known.of(key, TraceRecord(view.size, now_s, now_s, recordings + 1, runs))
            return _Made(key, made, trace.spans(runs, self._store.span_size, self._uses.boot_spans_max))

        return make

    def _take(self, view: StoredView, made: _Made | None) -> None:
        if made is None:
            log.debug("nothing was read of it as a boot does: no trace", image=view.record.image)
            return
        if view.record.kind not in trace.KINDS:
            return  # It ended meanwhile.
        for name in self._names_of(view.record.image):
            key = f.trace_key(name, view.record.kind)
            if key != made.key:
                self._drop(key)  # From before the hash was known.
        self._put(made.key, made.known)
        self._uses.set_boot(view.number, made.spans)
        self.recorded += 1
        blocks, runs = made.known.blocks, made.known.runs
        log.info(
            "boot trace: %s of 64 KiB in %s", counted(blocks, "block"), counted(runs, "run"),
            image=view.record.image,
        )  # fmt: skip

    def save(self) -> None:
        """Ends all recordings: at the end, before uses are saved and the writer stops."""
        for recording in list(self._recordings.values()):
            try:
                self._take(recording.view, self._making(recording.view, self._end(recording))())
            except Exception:  # The rest of the stop must not suffer from it.
                log.exception("unexpected failure of a boot trace")

    # ── replaying ──

    def _is_to_be_used(self, view: StoredView) -> bool:
        if view.number in self._replays:
            return False
        ended_s, cached = self._replayed.get(view.number, (-float("inf"), 0))
        return trio.current_time() >= ended_s + AGAIN_S or 2 * view.cached < cached

    async def _use(self, replay: _Replay, key: bytes, known: _Known) -> None:
        view = replay.view
        try:
            now_s = self._clock()
            try:
                needed, spans, newer = await trio.to_thread.run_sync(self._unpacked, key, known, now_s)
            except UNDECODABLE:
                log.warning("its boot trace cannot be read: forgotten", image=view.record.image)
                self._drop(key)
                return
            if newer is not None and self._known.get(key) is known:
                self._put(key, newer)
            self._uses.set_boot(view.number, spans)
            for pause_s in PAUSES_S:
                await trio.sleep(pause_s)
                replay.error = None
                if self._may_go_on(replay):
                    await self._replay(replay, needed)
                if replay.error is None:
                    break
                log.debug("its boot trace waits: %s", replay.error, image=view.record.image)
        finally:
            del self._replays[view.number]
            self.on_replayed()
            if len(self._replayed) >= TRACES_MAX:
                self._replayed.clear()
            if self._leases.is_leased(view):
                self._replayed[view.number] = trio.current_time(), view.cached

    def _unpacked(
        self, key: bytes, known: _Known, now_s: float
    ) -> tuple[list[Extent], list[SpanNo], _Known | None]:
        """In a thread: what is needed, its spans, and the record anew where it was not used for long."""
        record = decode_trace(key, known.record)
        newer = None
        if abs(now_s - record.used_s) > USED_S:
            newer = _Known.of(key, replace(record, used_s=now_s))
        spans = trace.spans(record.runs, self._store.span_size, self._uses.boot_spans_max)
        return trace.extents(record.runs, record.size), spans, newer

    def _may_go_on(self, replay: _Replay) -> bool:
        view = replay.view
        return (
            replay.error is None
            and view.condemned is None
            and view.record.kind in trace.KINDS
            and view.record.origin is not OriginMode.STREAM
            and not view.complete
            and self._store.health.may_write
            and self._store.writer.trouble is None
            and self._leases.is_leased(view)
        )

    async def _replay(self, replay: _Replay, needed: list[Extent]) -> None:
        view = replay.view
        absent = await self._not_asked_for(view, needed)
        if not absent:
            return
        log.debug("%d runs of its boot trace are absent", len(absent), image=view.record.image)
        async with trio.open_nursery() as flying:
            for changes_left in reversed(range(PLANS_MAX)):
                if not absent or await self._ask_for_all(replay, absent, flying, changes_left > 0):
                    break
                if not self._may_go_on(replay):
                    return
                absent = await self._not_asked_for(view, absent)
        if replay.error is None and replay.bytes:
            self.replayed += 1
            log.info("boot trace: %d bytes fetched ahead", replay.bytes, image=view.record.image)

    async def _ask_for_all(
        self, replay: _Replay, needed: Sequence[Extent], flying: trio.Nursery, may_change: bool
    ) -> bool:
        """Returns when all of it has come. False when it did not: the replay is over, or it `may_change` and the
        link is not what it was taken for; then what has not begun is asked for no more."""
        pace, came = self._pace(replay.view), replay.bytes

        def is_another() -> bool:
            # Only when something has come: a link that swings is not to have it planned again for nothing.
            return may_change and replay.bytes > came and not pace.is_like(self._pace(replay.view))

        for extent in await trio.to_thread.run_sync(trace.requests, needed, pace):
            await self._ask_for(replay, extent, flying)
            if not self._may_go_on(replay):
                return False
            if is_another():
                break
        else:
            while replay.flights and not is_another():
                await replay.one_ended.wait()
            if not replay.flights:
                return True
        for waiting in list(replay.flights):
            self._fetcher.withdraw(waiting)
        return False

    async def _not_asked_for(self, view: StoredView, needed: Sequence[Extent]) -> list[Extent]:
        """What of it is absent, and nobody brings. Spans that nobody has looked at count as absent: `_ask_for`
        looks at them."""
        found = []
        for at, extent in enumerate(needed):
            for gap in view.absent(extent):
                found.extend(self._fetcher.not_under_way(view, gap))
            if at % _LOOKS == 0:
                await trio.lowlevel.checkpoint()
        return found

    def _pace(self, view: StoredView) -> Pace:
        link = self._fetcher.link
        at_once = max(self._fetcher.connections - TRACE_RESERVED_MAX, 1)
        rate, cost_s = link.rate or trace.UNMEASURED.rate, link.cost_s or trace.UNMEASURED.cost_s
        if view.record.kind is not ViewKind.RAW:
            return Pace(cost_s, rate, at_once)
        # Of the disk inside, few flights go at once; what lies between two blocks is packed, or not even there.
        original = self._store.known_view(view.record.image, ViewKind.ORIGINAL)
        density = original.size / view.size if original is not None else 1.0
        at_once = min(at_once, TRANSLATIONS_MAX - TRACE_RESERVED_MAX)
        return Pace(cost_s, rate / min(max(density, DENSITY_MIN), 1.0), at_once)

    async def _ask_for(self, replay: _Replay, extent: Extent, flying: trio.Nursery) -> None:
        """Starts what is absent of `extent`, and nobody brings."""
        view = replay.view
        at = extent.start
        while at < extent.end:
            await replay.ahead.acquire()
            if view.cached:
                with suppress(ImageCondemned):  # As `_may_go_on` will say.
                    await self._blocks.load(view, Extent(at, extent.end))
            # From here to the start no await: others fetch the same image.
            gaps = view.absent(Extent(at, extent.end))
            part = next((part for gap in gaps for part in self._fetcher.not_under_way(view, gap)), None)
            if part is None or not self._may_go_on(replay):
                replay.ahead.release()
                return
            flight = self._fetcher.start(view, part, Priority.TRACE)
            replay.flights.add(flight)
            flying.start_soon(self._watch, replay, flight, part)
            at = part.end

    async def _watch(self, replay: _Replay, flight: Flight, part: Extent) -> None:
        await flight.ended.wait()
        replay.flights.discard(flight)
        replay.ahead.release()
        replay.one_ended.set()
        replay.one_ended = trio.Event()
        if flight.error is not None:
            replay.error = flight.error
        else:
            brought = max(0, min(flight.at, part.end) - part.start)
            replay.bytes += brought
            self.bytes_replayed += brought
        if not self._may_go_on(replay):
            for waiting in list(replay.flights):
                self._fetcher.withdraw(waiting)

    # ── commands ──

    def handlers(self) -> dict[str, Handler]:
        return {"trace-list": self._list, "trace-export": self._export, "trace-import": self._import}

    async def _list(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every trace that is known, with the images of this node that have its content."""
        images: dict[str, list[str]] = {}
        for at, image in enumerate(list(self._images())):
            for name in self._names_of(image):
                images.setdefault(name, []).append(image)
            if at % _PIECE == 0:
                await trio.lowlevel.checkpoint()
        rows = []
        for key, known in list(self._known.items()):
            content, kind = f.split_trace_key(key)
            rows.append(
                {
                    "content": content,
                    "kind": kind.name.lower(),
                    "images": images.get(content, []),
                    "names": [self._name_of(image) for image in images.get(content, [])],
                    "size": known.size,
                    "blocks": known.blocks,
                    "runs": known.runs,
                    "recorded": int(known.recorded_s),
                    "recordings": known.recordings,
                }
            )
        return rows

    async def _export(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One trace, as a file has it."""
        content, kind = str(request.get("content")), str(request.get("kind"))
        key = next((key for key in self._known if _is_called(key, content, kind)), None)
        if key is None:
            raise ControlError("trace-export", f"no trace of {content} ({kind}) is known")
        record = await trio.to_thread.run_sync(decode_trace, key, self._known[key].record)
        return trace_file.to_fields(NamedTrace(*f.split_trace_key(key), record))

    async def _import(self, request: Mapping[str, Any]) -> int:
        """Takes traces in place of what is known of their content; all of them, or none. Returns how many."""
        given = request.get("traces")
        if not isinstance(given, list) or len(given) > TRACES_MAX:
            raise ControlError("trace-import", f"takes up to {TRACES_MAX} traces")
        for key, known in await trio.to_thread.run_sync(_checked, given, self._clock()):
            self._put(key, known)
        await self._store.flush()
        return len(given)


def _checked(given: Sequence[object], now_s: float) -> list[tuple[bytes, _Known]]:
    """In a thread: traces as they came over the socket. Raises TraceRefused."""
    found = []
    for fields in given:
        content, kind, record = trace_file.from_fields(fields)
        key = f.trace_key(content, kind)
        found.append((key, _Known.of(key, replace(record, used_s=now_s))))
    return found


def _is_called(key: bytes, content: str, kind: str) -> bool:
    found, of = f.split_trace_key(key)
    return found == content and of.name.lower() == kind
