"""What instance disks stand on: looks at the disks in some folders now and then, and leases every image of this
mount that one of them names. Rule: a lease never ends because something could not be seen.

Running or stopped, an instance has a disk; a qcow2 disk names the file below it in its header. The disks of all
folders are looked at (`instance_walk`) at the start, before anything is evicted; every `interval_s`; soon after an
image was closed, and when somebody has to know now. What a disk is found to name is leased at once. When a look
finds none that names an image, though it must have seen those that did (`plan.instances`), the lease has `grace_s`
left. That is counted from look to look by the clock that only goes on, while the daemon runs, and begins anew
when a disk is seen again or its folder cannot be.

A named image that was never read here is made known to the store (`take_up`), so that hydration finds it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any, NamedTuple

import trio

from cachefs import logs
from cachefs.errors import CachefsError, OriginError, OriginUnavailable
from cachefs.instance_walk import Walker, shown
from cachefs.leases import Leases, NamedBy
from cachefs.plan.instances import Base, Walk, standing
from cachefs.store.format import DiskEntry, ViewKind
from cachefs.words import counted

log = logs.get(__name__)

# Whoever wants to evict at the start waits for the first look no longer than this: a folder may hang.
FIRST_LOOK_MAX_S = 60.0
# One step of a walk takes some milliseconds. A folder that does not answer for so long is left to its thread.
STALL_S = 30.0
# After an image was closed the next look comes soon, and takes no more than a tenth of the time.
PAUSE_S, PAUSE_SHARE = 5.0, 9.0
# So often it is looked whether a folder of the mount was bound to somewhere else.
BINDS_S = 5.0
IMAGES_MAX = 100_000
# Images that are not known here are asked for one by one, no more in a row than these. One that cannot be had is
# asked for again after so long.
WANTED_MAX, AGAIN_S = 1000, 3600.0
NAMED_SHOWN = 20
_PIECE = 50


@dataclass
class _Folder:
    """What the last look at a folder came to."""

    trouble: str | None = "it was not looked at yet"
    entries: int = 0
    looked_at: int = 0
    found: int = 0
    unread: int = 0
    first_error: str | None = None
    took_s: float = 0.0


class Instances:
    """`run` is the task. `folders` in which disks are, `mountpoints`: every spelling of this mount's. `is_known`:
    the store has the view that the files of an image in a folder are read from; `take_up` makes it so, or
    raises. `binds`: where else a folder of the mount lies; where that changes, there is a look."""

    def __init__(
        self,
        leases: Leases,
        folders: Sequence[str],
        mountpoints: Sequence[str],
        interval_s: float,
        grace_s: float,
        *,
        own_device: Callable[[], int | None] = lambda: None,
        is_known: Callable[[str, ViewKind], bool] = lambda image, kind: True,
        take_up: Callable[[str, ViewKind], Awaitable[object]] | None = None,
        walker: Callable[[bytes, Sequence[bytes], Callable[[], int | None]], Walker] = Walker,
        binds: Callable[[], tuple[bytes, ...]] = lambda: (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._leases, self._interval_s, self._grace_s = leases, interval_s, grace_s
        self._folders = {os.fsencode(folder): _Folder() for folder in folders}
        self._mountpoints = [os.fsencode(mountpoint) for mountpoint in mountpoints]
        self._own_device, self._walker, self._clock = own_device, walker, clock
        self._is_known, self._take_up, self._binds = is_known, take_up, binds
        self._hanging: dict[bytes, Walker] = {}
        self._absent_s: dict[str, float] = {}  # When an image was last found not to be named any more.
        self._wanted: dict[Base, None] = {}  # To be taken up, in this order.
        self._wanting = trio.Event()
        self._not_taken: dict[Base, float] = {}  # And when that was found.
        self._wake, self._over = trio.Event(), trio.Event()
        self._begun = self._ended = self._asked = 0
        self._ended_s = self._took_s = 0.0
        self._something_closed = False
        leases.ready = trio.Event()
        leases.keeps_closed = True
        leases.look, leases.on_closed = self.look, self._note_closed

    # ── for everybody, on the loop ──

    async def look(self) -> None:
        """Returns when a look that begins after this call is over."""
        wanted = self._begun + 1
        self._asked = max(self._asked, wanted)
        self._wake.set()
        while self._ended < wanted:
            await self._over.wait()

    def want(self, image: str, kind: ViewKind) -> None:
        """An image was touched, or is named: it is to be known to the store, whoever reads it."""
        base = Base(image, ViewKind.RAW if kind is ViewKind.RESIZED else kind)
        tried_s = self._not_taken.get(base, -inf)
        if self._take_up is None or len(self._wanted) >= WANTED_MAX or trio.current_time() < tried_s + AGAIN_S:
            return
        if not self._is_known(*base):
            self._wanted[base] = None
            self._wanting.set()

    def _note_closed(self) -> None:
        self._something_closed = True
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For `status`; times in seconds."""
        named = self._leases.named.values()
        return {
            "images": len(named),
            "disks": sum(by.count for by in named if not by.are_gone),
            "looks": self._ended,
            "named": {image: str(by) for image, by in islice(self._leases.named.items(), NAMED_SHOWN)},
            "folders": [
                {
                    "path": shown(path),
                    "trouble": folder.trouble,
                    "entries": folder.entries,
                    "files": folder.looked_at,
                    "disks": folder.found,
                    "unread": folder.unread,
                    "first_error": folder.first_error,
                    "took": round(folder.took_s, 3),
                }
                for path, folder in self._folders.items()
            ],
        }

    # ── the task ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            nursery.start_soon(self._be_ready_in_time)
            nursery.start_soon(self._take_up_wanted)
            nursery.start_soon(self._look_when_bound)
            while True:
                try:
                    await self._look_once()
                except Exception:  # A lease that lasts too long is no reason to take the mount down.
                    log.exception("unexpected failure of looking at instance disks")
                self._leases.ready.set()
                self._ended, self._ended_s = self._begun, trio.current_time()
                self._over.set()
                self._over = trio.Event()
                await self._pause()

    async def _be_ready_in_time(self) -> None:
        with trio.move_on_after(FIRST_LOOK_MAX_S) as patience:
            await self._leases.ready.wait()
        if patience.cancelled_caught:
            log.warning("instance disks are still being looked at: what only a new one needs may be evicted")
            self._leases.ready.set()

    async def _look_when_bound(self) -> None:
        """A folder of the mount that is bound somewhere gives names there another meaning."""
        before: tuple[bytes, ...] = ()
        while True:
            try:
                now = await trio.to_thread.run_sync(self._binds)
            except OSError as error:
                log.debug("mounts cannot be read: %s", error)
                now = before
            if now != before:
                log.info("nova/ is bound to: %s", ", ".join(map(shown, now)) or "nothing any more")
                before = now
                self._asked = max(self._asked, self._begun + 1)
                self._wake.set()
            await trio.sleep(BINDS_S)

    async def _pause(self) -> None:
        """Until the next look is due, or somebody asks for one."""
        while self._asked <= self._begun:
            due_s = self._ended_s + self._interval_s
            if self._something_closed:
                due_s = min(due_s, self._ended_s + max(PAUSE_S, PAUSE_SHARE * self._took_s))
            with trio.move_on_at(due_s) as waiting:
                await self._wake.wait()
            if waiting.cancelled_caught:
                return
            self._wake = trio.Event()

    async def _look_once(self) -> None:
        self._begun += 1
        self._something_closed = False
        look, began_s = self._leases.begin_look(), trio.current_time()
        walks: list[Walk] = []
        async with trio.open_nursery() as nursery:
            for folder in self._folders:
                nursery.start_soon(self._walk, folder, walks)
        await self._conclude(walks)
        self._took_s = trio.current_time() - began_s
        self._leases.end_look(look)

    # ── one folder ──

    async def _walk(self, folder: bytes, walks: list[Walk]) -> None:
        began_s = trio.current_time()
        walker = self._hanging.pop(folder, None)
        if walker is None or not walker.busy:
            walker = self._walker(folder, self._mountpoints, self._own_device)
            await self._walk_with(walker)
        if walker.given_up:
            self._hanging[folder] = walker
            walks.append(Walk(folder, 0, False, {}))  # Its thread may still be at work on what it found.
        else:
            walks.append(walker.walk)
        self._note(folder, walker, trio.current_time() - began_s)

    async def _walk_with(self, walker: Walker) -> None:
        try:
            while not walker.done:
                with trio.move_on_after(STALL_S) as patience:
                    for path, base in await trio.to_thread.run_sync(walker.step, abandon_on_cancel=True):
                        self._lease_at_once(path, base, walker.place)
                if patience.cancelled_caught:
                    walker.trouble = "it does not answer"
                    break
        except Exception:  # Of one folder: the others are looked at all the same.
            log.exception("unexpected failure of looking at instance disks in %s", shown(walker.folder))
            walker.trouble = "unexpected failure"
        finally:
            if not walker.done:
                walker.given_up = True
                if not walker.busy:
                    walker.close()

    def _lease_at_once(self, path: bytes, base: Base, place: int) -> None:
        """Before the look is over: somebody may be about to evict."""
        if self._leases.is_named(*base):
            return
        named = self._leases.named.get(base.image)
        if named is None and len(self._leases.named) >= IMAGES_MAX:
            return
        before = () if named is None or named.are_gone else named.disks
        disks = (*before, DiskEntry(path, base.kind, place))
        count = len(disks) if named is None else max(named.count, len(disks))
        since_s = self._clock() if named is None else named.since_s
        self._leases.name(base.image, NamedBy(disks, count, since_s, self._grace_s))

    def _note(self, path: bytes, walker: Walker, took_s: float) -> None:
        before = self._folders[path]
        now = self._folders[path] = _Folder(
            walker.trouble,
            walker.entries,
            walker.looked_at,
            walker.found,
            walker.unread,
            walker.first_error,
            took_s,
        )
        name = shown(path)
        if now.trouble != before.trouble:
            if now.trouble is not None:
                level = logging.WARNING if self._leases.named else logging.INFO
                log.log(level, "instance disks in %s: %s. What they stood on stays leased", name, now.trouble)
            else:
                files = counted(now.looked_at, "file")
                log.info("instance disks in %s: %s, %d on this mount", name, files, now.found)
        if now.unread and not before.unread:
            log.warning(
                "instance disks in %s: %s cannot be read (%s). What they stand on is not known",
                name, counted(now.unread, "file or folder", "files or folders"), now.first_error,
            )  # fmt: skip

    # ── what a look comes to ──

    async def _conclude(self, walks: Sequence[Walk]) -> None:
        known = {image: by.disks for image, by in self._leases.named.items()}
        all_seen = all(walk.whole and not walk.unread for walk in walks)
        disks = await trio.to_thread.run_sync(_standing, known, walks)
        for at, (image, found) in enumerate(disks.items()):
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            before = self._leases.named.get(image)
            if before is None and len(self._leases.named) >= IMAGES_MAX:
                continue
            by = self._named_by(image, before, found, all_seen=all_seen)
            if by is None:
                log.info("no instance disk names it any more: that lease is over", image=image)
            self._leases.name(image, by)
            if by is not None and not by.are_gone:
                for kind in by.kinds:
                    self.want(image, kind)

    def _named_by(self, image: str, before: NamedBy | None, found: _Found, *, all_seen: bool) -> NamedBy | None:
        """What names the image, now that these disks do; None when the last one is gone for long enough."""
        if before is None:
            return NamedBy(found.disks, found.paths, self._clock(), self._grace_s)
        # Of so many, not all are remembered over a restart: the others may be where nothing could be seen.
        forgotten = before.count > len(before.disks)
        if found.disks or (forgotten and not all_seen):
            self._absent_s.pop(image, None)
            count = found.paths if all_seen else max(found.paths, before.count)
            return NamedBy(found.disks or before.disks, count, before.since_s, self._grace_s)
        now_s = trio.current_time()
        left_s = min(before.left_s, self._grace_s)
        if before.are_gone:
            left_s -= now_s - self._absent_s.get(image, now_s)
        self._absent_s[image] = now_s
        if left_s <= 0:
            del self._absent_s[image]
            return None
        return NamedBy(before.disks, before.count, before.since_s, left_s, are_gone=True)

    # ── what is named and was never read here ──

    async def _take_up_wanted(self) -> None:
        while True:
            await self._wanting.wait()
            self._wanting = trio.Event()
            while self._wanted:
                base = next(iter(self._wanted))
                del self._wanted[base]
                try:
                    assert self._take_up is not None, "else nothing is wanted"
                    await self._take_up(*base)
                    self._not_taken.pop(base, None)
                except OriginUnavailable as error:
                    log.debug("%s", error, image=base.image)
                    self._wanted.clear()  # The next look wants them again.
                except CachefsError as error:
                    self._note_not_taken(base, error)
                except Exception:
                    log.exception("unexpected failure of taking it up", image=base.image)
                    self._wanted.clear()

    def _note_not_taken(self, base: Base, error: CachefsError) -> None:
        """Said once, and tried again an hour later: each look would do both."""
        is_new = base not in self._not_taken
        if is_new and len(self._not_taken) >= IMAGES_MAX:
            return
        self._not_taken[base] = trio.current_time()
        if is_new:
            level = logging.DEBUG if isinstance(error, OriginError) else logging.WARNING
            log.log(
                level,
                "it is touched or named by an instance disk, and not to be had: %s",
                error,
                image=base.image,
            )


class _Found(NamedTuple):
    """The disks of one image, and how many these are: one that names two files of it is there twice."""

    disks: tuple[DiskEntry, ...]
    paths: int


def _standing(known: Mapping[str, Sequence[DiskEntry]], walks: Sequence[Walk]) -> dict[str, _Found]:
    """In a thread."""
    return {
        image: _Found(tuple(disks), len({disk.path for disk in disks}))
        for image, disks in standing(known, walks).items()
    }
