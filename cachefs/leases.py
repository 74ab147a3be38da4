"""Why something may not be evicted now. Rule: a lease says no more than that; nothing is dropped here.

A `Lease` is a value with a reason and an end. Open handles lease one view for as long as they are open; a pin
leases every view of its image, outlives the daemon, and is bounded: all pinned images together may claim a share
of the store by their whole sizes, so that pins cannot leave the rest of the node without a cache. A touch and an
instance disk that names a file of the image lease the view that the file is read from; both outlive the daemon.
Another reason is one more member of `Reason`, and one more line in `Leases.of`.

Who closes the last handle may have made an instance disk in the meantime, which nobody has seen yet. So what was
closed stays leased until instance disks were looked at once more (`begin_look`, `end_look`, which `Instances`
calls).

Everything but `load` and `settle` is on the loop and without an await, so what `is_leased` says holds until the
caller's next one. It asks dicts in memory, however many disks there are.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.errors import PinRefused, RecordCorrupt
from cachefs.guest_disks import PLAIN
from cachefs.store import format as f
from cachefs.store.format import (
    DiskEntry,
    DisksRecord,
    LeaseReason,
    LeaseRecord,
    Table,
    ViewKind,
    ViewNo,
    ViewRecord,
)
from cachefs.touches import File, Touches
from cachefs.words import counted

log = logs.get(__name__)

# How long leases have left is saved so often: a crash makes them last so much longer.
SAVE_S = 600.0
_PIECE = 100  # Records between two checkpoints.
# Of the disks that name one image, so many are remembered by their paths over a restart, and shown.
DISKS_KEPT, DISKS_SHOWN = 8, 3
SETTLE_MAX_S = 5.0  # Who waits for room has no more time.


class Reason(StrEnum):
    """Why. The value is what people read."""

    OPEN = "open"
    PIN = "pinned"
    TOUCH = "leased by a touch"
    DISK = "named by an instance disk"
    CLOSED = "closed since the last look at instance disks"
    POLICY = "pinned by a policy"


_MENDS = {
    Reason.PIN: "cachefs unpin ends that",
    Reason.TOUCH: "it ends by itself, or with cachefs evict --touched",
    Reason.POLICY: "[precache] in the configuration",
}


@dataclass(frozen=True, slots=True)
class Lease:
    """A reason not to evict. Times are seconds since 1970; `until_s` None for no end."""

    reason: Reason
    since_s: float
    until_s: float | None = None
    detail: str = ""

    @property
    def with_mend(self) -> str:
        """The same as `str`, and by which command it ends, where there is one."""
        mend = _MENDS.get(self.reason)
        return f"{self} ({mend})" if mend else str(self)

    def holds(self, now_s: float) -> bool:
        return self.until_s is None or now_s < self.until_s

    def __str__(self) -> str:
        verb = "was" if self.reason is Reason.CLOSED else "is"
        return f"it {verb} {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class NamedBy:
    """The instance disks that name files of an image, `count` in all, since `since_s` (seconds since 1970). Where
    `are_gone`, they were the last ones, and the lease ends in `left_s` seconds."""

    disks: tuple[DiskEntry, ...]
    count: int
    since_s: float
    left_s: float
    are_gone: bool = False

    @property
    def kinds(self) -> frozenset[ViewKind]:
        """The folders of the files that they name."""
        return frozenset(disk.kind for disk in self.disks)

    def __str__(self) -> str:
        some = self.disks[: 2 * DISKS_SHOWN]  # One that names two files of the image is there twice.
        paths = list(dict.fromkeys(disk.path.decode(errors="backslashreplace") for disk in some))[:DISKS_SHOWN]
        more = self.count - len(paths)
        words = ", ".join(paths) + (f" and {more} more" if more > 0 else "")
        return f"{words}: gone, for {_duration(self.left_s)} more" if self.are_gone else words

    def encode(self, key: bytes) -> bytes:
        kept = self.disks[:DISKS_KEPT]
        return DisksRecord(self.since_s, self.left_s, self.count, kept).encode(key)


class LeasedView(Protocol):
    """What is looked at of a view."""

    @property
    def number(self) -> ViewNo: ...

    @property
    def record(self) -> ViewRecord: ...


class LeaseStore(Protocol):
    """What is asked of the store."""

    @property
    def images(self) -> Mapping[str, Mapping[str, Any]]: ...

    def views(self) -> Sequence[LeasedView]: ...

    def put(self, table: Table, key: bytes, record: bytes | None) -> None: ...

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, bytes]]: ...


class Leases:
    """`pinned_max` gives what pins may claim at this moment, in bytes; `clock` the seconds since 1970; `now_s`
    those of a clock that only goes on. `touch_grace_s`: how long a touch is a lease."""

    def __init__(
        self,
        store: LeaseStore,
        pinned_max: Callable[[], int],
        clock: Callable[[], float] = time.time,
        *,
        touch_grace_s: float = 86400.0,
        now_s: Callable[[], float] = trio.current_time,
    ) -> None:
        self._store, self._pinned_max, self._clock = store, pinned_max, clock
        self.touches = Touches(store, touch_grace_s, now_s, clock)
        self._handles: Counter[ViewNo] = Counter()
        self._opened_s: dict[ViewNo, float] = {}
        self._pins: dict[str, Lease] = {}
        # What a leased view is being made of: spared as well, but for whoever asks for it to be dropped.
        self.needed: set[ViewNo] = set()
        self.by_policy: dict[str, Lease] = {}  # Images that a policy of pre-caching pins: `Precache` keeps them.
        self._named: dict[str, NamedBy] = {}
        self._kinds: dict[str, frozenset[ViewKind]] = {}  # What `is_leased` asks of `_named`.
        self._looks = 0
        self._closed: dict[ViewNo, int] = {}  # And how many looks had begun then.
        self.ready = trio.Event()  # What instance disks name is known: before that nothing is evicted.
        self.ready.set()
        self.keeps_closed = False  # Somebody looks at instance disks.
        self.on_closed: Callable[[], None] = lambda: None
        self.look: Callable[[], Awaitable[None]] = _no_look

    async def load(self) -> None:
        """Takes up what outlived the last daemon. To be awaited before anything is evicted."""
        for key, record in await trio.to_thread.run_sync(self._store.items, Table.LEASES):
            try:
                image, reason = f.split_lease_key(key)
                if reason is LeaseReason.PIN:
                    self._take_up(image, key, record)
                elif reason is LeaseReason.TOUCH:
                    self.touches.take_up(key, record)
                else:
                    self._take_up_named(image, key, record)
            except (ValueError, IndexError, struct.error):
                continue  # A reason of a later cachefs: left alone.
        for image in self.touches.images():
            if image not in self._store.images and not self.touches.leasing(image):
                self.touches.forget(image)  # It went while nobody looked.
        if self.pinned_bytes > self._pinned_max():
            log.warning(
                "pinned images claim %d bytes, more than the %d they may: all stay pinned, no more can be",
                self.pinned_bytes, self._pinned_max(),
            )  # fmt: skip

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. What was not saved then is for `save`."""
        task_status.started()
        while True:
            await trio.sleep(SAVE_S)
            try:
                for at, _ in enumerate(self.touches.save()):
                    if at % _PIECE == 0:
                        await trio.lowlevel.checkpoint()
            except Exception:  # A lease that lasts too long is no reason to take the mount down.
                log.exception("unexpected failure of saving what leases have left")

    def save(self) -> None:
        """Hands what leases have left to the store's last commit."""
        for _ in self.touches.save():
            pass

    def _take_up(self, image: str, key: bytes, record: bytes) -> None:
        try:
            since_s, until_s = LeaseRecord.decode(key, record)
        except (RecordCorrupt, struct.error) as error:
            # One pin too many is seen and can be undone; one too few loses what somebody relies on.
            log.error("taken for pinned: %s", error, image=image)
            self._keep_pin(image, Lease(Reason.PIN, self._clock()))
            return
        self._pins[image] = Lease(Reason.PIN, since_s, until_s or None)

    def _take_up_named(self, image: str, key: bytes, record: bytes) -> None:
        try:
            since_s, left_s, count, disks = DisksRecord.decode(key, record)
        except (RecordCorrupt, struct.error) as error:
            log.error("taken for named by an instance disk: %s", error, image=image)
            both = (DiskEntry(b"?", kind, 0) for kind in (ViewKind.ORIGINAL, ViewKind.RAW))
            since_s, left_s, count, disks = self._clock(), inf, 1, tuple(both)
        self._keep_named(image, NamedBy(disks, count, since_s, left_s))

    # ── what there is ──

    def of(self, view: LeasedView) -> list[Lease]:
        """Every lease that holds now."""
        of_image = self._of_image(view.record.image)
        return self._of_handles(view.number) + [
            lease for lease, kinds in of_image if self._covers(kinds, view.record)
        ]

    def _of_handles(self, view: ViewNo) -> list[Lease]:
        handles = self._handles[view]
        if handles:
            return [Lease(Reason.OPEN, self._opened_s[view], detail=counted(handles, "handle"))]
        if view in self._closed:
            return [Lease(Reason.CLOSED, self._clock(), detail="the next may find one that needs it")]
        return []

    def of_image(self, image: str) -> list[Lease]:
        """Every lease that holds now, of any of its views."""
        views = [view.number for view in self._store.views() if view.record.image == image]
        of_handles = [lease for view in views for lease in self._of_handles(view)]
        return of_handles + [lease for lease, _ in self._of_image(image)]

    def leased_images(self) -> set[str]:
        """Those that anything leases."""
        images = {view.record.image for view in self._store.views() if self.is_leased(view)}
        images.update(self.pinned, self.by_policy, self._named)
        images.update(filter(self.touches.leasing, self.touches.images()))
        return images

    def _of_image(self, image: str) -> list[tuple[Lease, frozenset[ViewKind] | None]]:
        """Those that are no handle's, with the folders of the files that they are about; None for every view."""
        found: list[tuple[Lease, frozenset[ViewKind] | None]] = []
        pin = self.pin_of(image)
        if pin is not None:
            found.append((pin, None))
        if image in self.by_policy:
            found.append((self.by_policy[image], None))
        now_s = self._clock()
        touched = self.touches.leasing(image)
        if touched:
            left_s = max(touched.values())
            began_s = now_s + left_s - self.touches.grace_s
            kinds = frozenset(file.kind for file in touched)
            found.append((Lease(Reason.TOUCH, began_s, now_s + left_s, f"for {_duration(left_s)} more"), kinds))
        named = self._named.get(image)
        if named is not None:
            until_s = now_s + named.left_s if named.are_gone else None
            found.append((Lease(Reason.DISK, named.since_s, until_s, str(named)), named.kinds))
        return found

    def is_leased(self, view: LeasedView) -> bool:
        if view.number in self._handles or view.number in self._closed or view.number in self.needed:
            return True
        record = view.record
        if record.image in self.by_policy or self.pin_of(record.image) is not None:
            return True
        kinds = self._kinds.get(record.image)
        if kinds is not None and self._covers(kinds, record):
            return True
        touched = self.touches.leasing(record.image)
        return bool(touched) and self._covers(frozenset(file.kind for file in touched), record)

    def _covers(self, kinds: frozenset[ViewKind] | None, record: ViewRecord) -> bool:
        """Whether the files in these folders are read from this view. Of an image that ended nobody opens a file
        any more."""
        if kinds is None:
            return True
        match record.kind:
            case ViewKind.ENDED:
                return False
            case ViewKind.ORIGINAL:
                return ViewKind.ORIGINAL in kinds or self._is_plain(record.image)
        return kinds != {ViewKind.ORIGINAL}

    def _is_plain(self, image: str) -> bool:
        """Whether the image is its own disk, as far as is known."""
        disk_format = self._store.images.get(image, {}).get("disk_format")
        return disk_format is None or disk_format in PLAIN

    def keeps(self, image: str) -> bool:
        """Whether it is to be kept, and can be opened, though Glance has it no more."""
        pinned = image in self.by_policy or self.pin_of(image) is not None
        return pinned or image in self._named or bool(self.touches.leasing(image))

    def leased_views(self, views: Iterable[LeasedView]) -> set[ViewNo]:
        return {view.number for view in views if self.is_leased(view)}

    def counts(self) -> dict[str, int]:
        """How many leases there are, by their reasons: handles, and images."""
        touched = sum(1 for image in self.touches.images() if self.touches.leasing(image))
        return {
            Reason.OPEN.value: self.handles,
            Reason.PIN.value: len(self.pinned),
            Reason.TOUCH.value: touched,
            Reason.DISK.value: len(self._named),
        }

    # ── open handles ──

    def opened(self, view: ViewNo) -> None:
        """One more handle."""
        if view not in self._handles:
            self._opened_s[view] = self._clock()
        self._handles[view] += 1

    def released(self, view: ViewNo) -> None:
        """One handle less."""
        assert self._handles[view] > 0, "a handle is released once"
        self._handles[view] -= 1
        if not self._handles[view]:
            del self._handles[view], self._opened_s[view]
            if self.keeps_closed:
                self._closed[view] = self._looks
                self.on_closed()

    def opened_within(self, view: ViewNo, seconds: float) -> bool:
        """Whether the first of its handles was opened so shortly ago."""
        return self._clock() < self._opened_s.get(view, -float("inf")) + seconds

    @property
    def handles(self) -> int:
        return self._handles.total()

    # ── touches and instance disks ──

    def touch(self, image: str, file: File, atime_ns: int, mtime_ns: int) -> None:
        """Somebody set these times of a file, in nanoseconds since 1970."""
        self.touches.touch(image, file, atime_ns, mtime_ns)

    def end_touches(self, image: str) -> None:
        """Ends the leases by touch of an image that nothing else leases. The times that were set stay."""
        if {lease.reason for lease in self.of_image(image)} == {Reason.TOUCH}:
            self.touches.end(image)

    @property
    def named(self) -> Mapping[str, NamedBy]:
        """What instance disks name, by image."""
        return self._named

    def is_named(self, image: str, kind: ViewKind) -> bool:
        """Whether the image's file in this folder is leased by disks that are there."""
        kinds = self._kinds.get(image)
        return kinds is not None and kind in kinds and not self._named[image].are_gone

    def name(self, image: str, by: NamedBy | None) -> None:
        """What names the image from now on, durable with the store's next commit; None: nothing any more."""
        if by is None:
            if self._named.pop(image, None) is not None:
                del self._kinds[image]
                self._store.put(Table.LEASES, f.lease_key(image, LeaseReason.DISK), None)
            return
        before = self._named.get(image)
        self._keep_named(image, by)
        key = f.lease_key(image, LeaseReason.DISK)
        record = by.encode(key)
        if before is None or before.encode(key) != record:
            self._store.put(Table.LEASES, key, record)

    def _keep_named(self, image: str, by: NamedBy) -> None:
        self._named[image] = by
        self._kinds[image] = by.kinds

    def begin_look(self) -> int:
        """Instance disks are about to be looked at. Returns what `end_look` takes."""
        self._looks += 1
        return self._looks

    def end_look(self, look: int) -> None:
        """They were: what was closed before that look began needs no other lease than what was found."""
        for view in [view for view, closed in self._closed.items() if closed < look]:
            del self._closed[view]

    @property
    def just_closed(self) -> frozenset[ViewNo]:
        """What is leased only until instance disks were looked at once more."""
        return frozenset(self._closed)

    async def settle(self, closed: frozenset[ViewNo]) -> bool:
        """Nothing may go beside what was `closed` a moment ago. Has instance disks looked at now, unless they were
        meanwhile; whether some of that may go now."""
        if closed and closed <= self._closed.keys():
            with trio.move_on_after(SETTLE_MAX_S):
                await self.look()
        return not closed <= self._closed.keys()

    def forget(self, image: str) -> None:
        """The image is gone. A disk may name it all the same."""
        self.touches.forget(image)

    # ── pins ──

    def pin(self, image: str, size: int, until_s: float | None = None) -> Lease:
        """Pins `image`, whose original has `size` bytes, durable with the store's next commit; one that is pinned
        already only gets the new end. Raises PinRefused."""
        known = self.pin_of(image)
        if known is None:
            self._end_pin(image)
            claimed, most = self.pinned_bytes, self._pinned_max()
            if claimed + size > most:
                raise PinRefused(image, size, claimed, most)
        pin = Lease(Reason.PIN, self._clock() if known is None else known.since_s, until_s)
        self._keep_pin(image, pin)
        return pin

    def unpin(self, image: str) -> bool:
        """Whether it was pinned."""
        was = self.pin_of(image) is not None
        self._end_pin(image)
        return was

    def pin_of(self, image: str) -> Lease | None:
        """The pin, if it holds now."""
        pin = self._pins.get(image)
        return pin if pin is not None and pin.holds(self._clock()) else None

    @property
    def pinned(self) -> list[str]:
        """The images that are pinned now."""
        return [image for image in self._pins if self.pin_of(image) is not None]

    @property
    def pinned_bytes(self) -> int:
        """The whole sizes of the images that are pinned now."""
        sizes = dict.fromkeys(self.pinned, 0)
        for image in sizes:
            size = self._store.images.get(image, {}).get("size")
            sizes[image] = size if isinstance(size, int) else 0
        unknown = {image for image, size in sizes.items() if not size}
        # Of an image that Glance has no more, the view still knows it. Seldom: there may be many views.
        for view in self._store.views() if unknown else ():
            if view.record.image in unknown and view.record.kind is not f.ViewKind.RESIZED:
                sizes[view.record.image] = max(sizes[view.record.image], view.record.size)
        return sum(sizes.values())

    def _keep_pin(self, image: str, pin: Lease) -> None:
        self._pins[image] = pin
        key = f.lease_key(image, LeaseReason.PIN)
        self._store.put(Table.LEASES, key, LeaseRecord(pin.since_s, pin.until_s or 0.0).encode(key))

    def _end_pin(self, image: str) -> None:
        if self._pins.pop(image, None) is not None:
            self._store.put(Table.LEASES, f.lease_key(image, LeaseReason.PIN), None)


async def _no_look() -> None:
    """Where nobody looks at instance disks."""


def _duration(seconds: float) -> str:
    """For people."""
    if seconds < 5400:
        return f"{max(seconds, 0.0) / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
