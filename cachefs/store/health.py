"""Whether the store's disk is to be used: judged by what fails, and by probes once something did. Rule: knows no
bytes and no index; it says what may be tried, and whoever asks decides what to do instead.

Reads and writes are judged apart, because disks are: a filesystem that went read-only still gives what it has, and
the page cache hides a dead disk from writers for long. Each `Side` is a machine of three states.

    HEALTHY   everything may be tried, each for `limit_s` at most.
    DEGRADED  after ERRORS_MAX errors within ERRORS_S, or as soon as one operation hangs. AT_ONCE operations at a
              time, for a shorter limit, and a probe each PROBE_S. GOOD_PROBES in a row (more after a relapse) make
              it HEALTHY, BAD_PROBES in a row DOWN.
    DOWN      nothing but a probe each PROBE_DOWN_S. One that succeeds makes it DEGRADED.

A thread that hangs in the kernel cannot be ended. It is left behind and counted until it comes back: while AT_ONCE
of them hang, a degraded side admits nothing. While a probe hangs there is no second one; each pause in which it
still hangs counts as a bad probe.

What it means at each place that touches the disk:

- What the kernel has cached is read in every state: RWF_NOWAIT never waits for the disk and needs no look-up.
- A stored read, or the loading of a map, is an `attempt` of the reads. What is not admitted, fails or is late is
  unreadable for now: it is fetched, served from memory and not kept. Nothing is quarantined unless reads are
  HEALTHY: a chunk on a dying disk is not rotten.
- The index is looked up only while reads are HEALTHY (`may_look_up`); otherwise a map that is not in memory is
  taken for absent. A page of LMDB's map that the disk does not give ends the process (SIGBUS), and no exception
  says so before.
- Bytes to keep are refused at once unless `may_write`, those that wait in the writer's queue too: their memory is
  needed for what readers wait for. What is in the writer's hands stays there until its thread is back.
- What the writer's threads do is done `patiently`: it is never left behind, because it owns the layer that it
  writes. That it is late is noted, so that nobody waits for it.
- Eviction, scrubbing and mending stand still unless both sides are HEALTHY.
- The end of the daemon waits STOP_S for the last commit, then goes without it: fetched bytes are fetched again. A
  thread that hangs in fdatasync holds up the end of the process itself; nobody can help that.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from cachefs import logs
from cachefs.errors import StoreError
from cachefs.plan.extents import PAGE

log = logs.get(__name__)

T = TypeVar("T")
Args = TypeVarTuple("Args")

ERRORS_MAX, ERRORS_S = 5, 60.0
# What does not come in this time is quicker fetched. A loaded disk with a hundred reads queued still gives it.
READ_LIMIT_S, READ_LIMIT_DEGRADED_S = 5.0, 1.0
# A commit may have a GiB to sync; slow disks do 50 MB/s. Landing goes to the page cache, 16 MiB at a time, or
# past it to the disk: while it stands, memory fills with what came after it, and then readers wait for it.
WRITE_LIMIT_S, LANDING_LIMIT_S = 30.0, 8.0
LANDING = "landing"
AT_ONCE = 2
# Pages that a probe looks at for one that the kernel has not got.
_PROBED_PAGES = 16
PROBE_S, PROBE_DOWN_S, PROBE_LIMIT_S = 1.0, 10.0, 5.0
GOOD_PROBES, GOOD_PROBES_MAX, BAD_PROBES = 3, 60, 5
# A side that fails again within this time after it was good has to be good for twice as long.
RELAPSE_S = 600.0
# How long the end of the daemon waits for a commit when the disk is not healthy.
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the disk is waited for, and how often it is probed, in seconds."""

    read_s: float = READ_LIMIT_S
    read_degraded_s: float = READ_LIMIT_DEGRADED_S
    write_s: float = WRITE_LIMIT_S
    landing_s: float = LANDING_LIMIT_S
    probe_every_s: float = PROBE_S
    probe_down_every_s: float = PROBE_DOWN_S
    probe_s: float = PROBE_LIMIT_S
    stop_s: float = STOP_S


PATIENCE = Patience()

# Errors that say nothing about the disk: it is full, or the process lacks something.
_NOT_THE_DISK = frozenset(
    (
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EBADF,
        errno.EOPNOTSUPP,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.EFBIG,
    )
)


def is_disk_fault(error: OSError) -> bool:
    """Whether the disk (or the filesystem, which gave up over it) is to blame."""
    return error.errno not in _NOT_THE_DISK


class DiskUnusable(StoreError):
    """The disk was not asked, failed, or did not answer in time; `why` in words. Where it failed at one place of a
    view, that is `offset`, and `before` is what was wanted and came before it."""

    def __init__(self, why: str, offset: int | None = None, before: bytes | bytearray = b"") -> None:
        super().__init__(why)
        self.why, self.offset, self.before = why, offset, before


class State(IntEnum):
    """The greater, the worse."""

    HEALTHY = 0
    DEGRADED = 1
    DOWN = 2


# `trio.to_thread.run_sync`, or what stands for it.
ToThread = Callable[..., Awaitable[Any]]


@dataclass(eq=False)
class Operation:
    """Something that a thread does on the disk. `noted`: that it hangs was taken into account."""

    what: str
    until_s: float
    noted: bool = False


@dataclass
class Side:
    """The reads, or the writes, of one disk. All on the loop. `name` is a plural, for the log. `on_change` is
    called after each change of the state, and when an operation begins or ceases to hang."""

    name: str
    limit_s: float
    limit_degraded_s: float
    on_change: Callable[[], None] = lambda: None
    clock: Callable[[], float] = trio.current_time
    to_thread: ToThread = trio.to_thread.run_sync
    patience: Patience = PATIENCE
    state: State = State.HEALTHY
    why: str | None = None
    since_s: float | None = None  # Seconds since 1970, for whoever asks: `clock` is for the loop.
    errors: int = 0  # All there were.
    under_way: set[Operation] = field(default_factory=set)
    _recent: deque[float] = field(default_factory=deque)
    _good: int = 0
    _bad: int = 0
    _needed: int = GOOD_PROBES
    _healthy_since_s: float = -math.inf
    _probe: Operation | None = None
    _turn: trio.Event = field(default_factory=trio.Event)  # Of the state.
    _watch_until_s: float = -math.inf
    _sooner: trio.Event = field(default_factory=trio.Event)  # Something is to be watched sooner than that.

    # ── what happened ──

    def note_error(self, what: str) -> None:
        """An operation failed by the disk's fault."""
        now_s = self.clock()
        self.errors += 1
        self._good = 0
        self._recent.append(now_s)
        while self._recent[0] <= now_s - ERRORS_S:
            self._recent.popleft()
        if self.state is State.HEALTHY and len(self._recent) >= ERRORS_MAX:
            self._degrade(f"{len(self._recent)} {self.name} failed within {ERRORS_S:.0f} s, at last {what}")

    def note_late(self, operation: Operation) -> None:
        """It hangs. Who waits for the disk must not be many, so one is enough."""
        if operation.noted:
            return
        operation.noted = True
        self.errors += 1
        self._good = 0
        if self.state is State.HEALTHY:
            self._degrade(f"{operation.what} hangs")
        else:
            self.on_change()

    def note_probe(self, failure: str | None) -> None:
        """How a probe went."""
        if failure is None:
            self._good, self._bad = self._good + 1, 0
            if self.state is State.DOWN:
                self._enter(State.DEGRADED, "a probe of it succeeded")
                self._good = 1
            elif self.state is State.DEGRADED and self._good >= self._needed:
                self._enter(State.HEALTHY, f"{self._good} probes in a row succeeded")
        else:
            self._good, self._bad = 0, self._bad + 1
            if self.state is State.DEGRADED and self._bad >= BAD_PROBES:
                self._enter(State.DOWN, f"{self._bad} probes in a row failed, at last {failure}")

    def _degrade(self, why: str) -> None:
        relapse = self.clock() < self._healthy_since_s + RELAPSE_S
        self._needed = min(self._needed * 2, GOOD_PROBES_MAX) if relapse else GOOD_PROBES
        self._enter(State.DEGRADED, why)

    def _enter(self, state: State, why: str) -> None:
        level = logging.INFO if state is State.HEALTHY else logging.WARNING
        log.log(level, "%s of the store's disk: %s (%s)", self.name, _WORDS[state], why)
        self.state, self.since_s = state, time.time()
        self._good = self._bad = 0
        self._recent.clear()
        if state is State.HEALTHY:
            self.why = None
            self._healthy_since_s = self.clock()
        else:
            self.why = why
        self._turn.set()
        self._turn = trio.Event()
        self.on_change()

    # ── what may be tried ──

    @property
    def hung(self) -> int:
        """Operations that are late and not back."""
        return sum(operation.noted for operation in tuple(self.under_way))

    @property
    def admits(self) -> bool:
        """Whether one more operation may begin now."""
        if self.state is State.DEGRADED:
            return len(self.under_way) < AT_ONCE
        return self.state is State.HEALTHY

    async def attempt(
        self, what: str, work: Callable[[*Args], T], *args: *Args, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        """What `work` returns, from a thread, which is left behind when it is late: it must own what it writes to.
        Raises DiskUnusable; an OSError that is not the disk's fault as it is."""
        if not self.admits:
            raise DiskUnusable(f"{self.name} are {_WORDS[self.state]}")
        limit_s = self.limit_s if self.state is State.HEALTHY else self.limit_degraded_s
        operation = self.begin(what, limit_s)
        began: list[bool] = []

        def in_thread() -> T:
            began.append(True)
            try:
                return work(*args)
            finally:
                self.under_way.discard(operation)

        failure: OSError | None = None
        try:
            with trio.move_on_after(limit_s):
                result: T = await self.to_thread(in_thread, abandon_on_cancel=True, limiter=limiter)
                return result
        except OSError as error:
            if not is_disk_fault(error):
                raise
            failure = error
        finally:
            if not began:
                self.under_way.discard(operation)  # It waited for its turn only.
        if failure is None:
            self.note_late(operation)
            raise DiskUnusable(f"{what} did not come in {limit_s:.0f} s")
        self.note_error(f"{what}: {failure.strerror}")
        raise DiskUnusable(f"{what}: {failure.strerror}") from failure

    async def patiently(self, what: str, work: Callable[[*Args], T], *args: *Args) -> T:
        """The same for a thread that must not be left behind: waits to its end, and notes that it is late. Raises
        what `work` raises."""
        limit_s = min(self.limit_s, self.patience.landing_s) if what == LANDING else self.limit_s
        operation = self.begin(what, limit_s)
        try:
            result: T = await self.to_thread(work, *args)
            return result
        except OSError as error:
            if is_disk_fault(error):
                self.note_error(f"{what}: {error.strerror or error}")
            raise
        finally:
            self.under_way.discard(operation)
            if operation.noted:
                self.on_change()

    def begin(self, what: str, limit_s: float) -> Operation:
        """An operation is under way until it is taken out of `under_way`."""
        operation = Operation(what, self.clock() + limit_s)
        self.under_way.add(operation)
        if operation.until_s < self._watch_until_s:  # Seldom: the one before is to end before this one.
            self._sooner.set()
        return operation

    # ── tasks ──

    async def watch(self) -> None:
        """Notes what is late where nobody, or nobody any more, waits with a limit."""
        while True:
            self._sooner = trio.Event()
            late_at_s = [operation.until_s for operation in tuple(self.under_way) if not operation.noted]
            self._watch_until_s = min(late_at_s, default=math.inf)
            with trio.move_on_after(max(self._watch_until_s - self.clock(), 0)):
                await self._sooner.wait()
            for operation in tuple(self.under_way):
                if operation.until_s <= self.clock():
                    self.note_late(operation)

    async def probe(self, work: Callable[[], object]) -> None:
        """Probes while the side is not healthy. `work` raises OSError when the disk fails."""
        while True:
            while self.state is State.HEALTHY:
                await self._turn.wait()
            degraded = self.state is State.DEGRADED
            await trio.sleep(self.patience.probe_every_s if degraded else self.patience.probe_down_every_s)
            self.note_probe(await self._probe_once(work))

    async def _probe_once(self, work: Callable[[], object]) -> str | None:
        """What is wrong; None when nothing is."""
        if self._probe is not None:
            return "a probe that still hangs"
        self._probe = probe = Operation("a probe", 0)

        def in_thread() -> None:
            try:
                work()
            finally:
                self._probe = None

        try:
            with trio.move_on_after(self.patience.probe_s):
                await self.to_thread(in_thread, abandon_on_cancel=True)
                return None
        except OSError as error:
            return f"a probe: {error.strerror or error}"
        assert self._probe in (probe, None)
        return f"a probe that did not end in {self.patience.probe_s:.0f} s"

    def status(self) -> dict[str, Any]:
        """From any thread."""
        return {
            "state": self.state.name.lower(),
            "why": self.why,
            "since": None if self.since_s is None else int(self.since_s),
            "errors": self.errors,
            "hung": self.hung,
        }


_WORDS = {
    State.HEALTHY: "healthy again",
    State.DEGRADED: "degraded: few at a time, until probes succeed",
    State.DOWN: "down: the disk is left alone but for probes, and images are served from Glance",
}


class Health:
    """Both sides. `on_change` is called on the loop after each change that its user may have to act on."""

    def __init__(
        self,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = trio.current_time,
        to_thread: ToThread = trio.to_thread.run_sync,
        patience: Patience = PATIENCE,
    ) -> None:
        self.on_change = on_change
        self.patience = patience
        rest = self._changed, clock, to_thread, patience
        self.reads = Side("reads", patience.read_s, patience.read_degraded_s, *rest)
        self.writes = Side("writes", patience.write_s, patience.write_s, *rest)

    def _changed(self) -> None:
        self.on_change()

    @property
    def state(self) -> State:
        """The worse one."""
        return max(self.reads.state, self.writes.state)

    @property
    def why(self) -> str | None:
        return self.reads.why if self.reads.state >= self.writes.state else self.writes.why

    @property
    def may_read(self) -> bool:
        """Whether a read that may wait for the disk can begin."""
        return self.reads.admits

    @property
    def may_look_up(self) -> bool:
        """Whether pages of the index may be faulted in: a fault that fails ends the process."""
        return self.reads.state is State.HEALTHY

    @property
    def may_write(self) -> bool:
        """Whether bytes may be handed to the writer. Landing looks the index up, so it needs healthy reads."""
        return self.may_look_up and self.writes.state is not State.DOWN and not self.writes.hung

    async def run(self, read_probe: Callable[[], object], write_probe: Callable[[], object]) -> None:
        """The task: while all is well, it sleeps."""
        async with trio.open_nursery() as nursery:
            for side, work in ((self.reads, read_probe), (self.writes, write_probe)):
                nursery.start_soon(side.probe, work)
                nursery.start_soon(side.watch)

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state.name.lower(),
            "why": self.why,
            "reads": self.reads.status(),
            "writes": self.writes.status(),
        }


# ── Probes ────────────────────────────────────────────────────────────────────────────────────────────


def read_probe(files: Mapping[Any, int], rng: random.Random | None = None) -> None:
    """Reads a page of one of the open files that the kernel has not cached. Where it seems to have all, it gives
    one up for that. Raises OSError.

    Not with O_DIRECT: a thread that waits for such a read cannot be killed, and would outlive the daemon."""
    rng = rng or random.Random()
    chosen = [file for file in tuple(files.values()) if os.fstat(file).st_size >= PAGE]
    page = bytearray(PAGE)
    for tries_left in reversed(range(_PROBED_PAGES if chosen else 0)):
        file = rng.choice(chosen)
        offset = _data_from(file, rng.randrange(os.fstat(file).st_size // PAGE) * PAGE)
        # An open file of its own, through /proc (a removed segment has no name): readers keep their read-ahead.
        again = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME)
        try:
            os.posix_fadvise(again, 0, 0, os.POSIX_FADV_RANDOM)
            if not tries_left:
                os.posix_fadvise(again, offset, PAGE, os.POSIX_FADV_DONTNEED)
            if not tries_left or not _is_cached(again, page, offset):
                os.preadv(again, [page], offset)
                return
        finally:
            os.close(again)


def _data_from(file: int, offset: int) -> int:
    """Where the next bytes are that are on the disk: a hole says nothing of it."""
    try:
        # Nobody goes by the position of this descriptor.
        return os.lseek(file, offset, os.SEEK_DATA) // PAGE * PAGE
    except OSError:  # Nothing behind it; or this filesystem does not say.
        return offset


def _is_cached(file: int, page: bytearray, offset: int) -> bool:
    """Whether the page comes without the disk; holes do."""
    try:
        return os.preadv(file, [page], offset, os.RWF_NOWAIT) == PAGE
    except BlockingIOError:
        return False


def write_probe(folder: Path) -> None:
    """Makes a page durable in `<folder>/probe`. Raises OSError. That the disk is full is not its fault."""
    try:
        file = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(file, os.urandom(PAGE), 0)
            os.fdatasync(file)
        finally:
            os.close(file)
    except OSError as error:
        if is_disk_fault(error):
            raise
