"""Why something may not be evicted now. Rule: a lease says no more than that; nothing is dropped here.

A `Lease` is a value with a reason and an end. Open handles lease one view for as long as they are open; a pin
leases every view of its image, outlives the daemon, and is bounded: all pinned images together may claim a share
of the store by their whole sizes, so that pins cannot leave the rest of the node without a cache. Another reason
is one more member of `Reason`, and one more line in `Leases.of`.

Everything is on the loop and without an await, so what `is_leased` says holds until the caller's next one.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import trio

from cachefs.errors import PinRefused, RecordCorrupt
from cachefs.store import format as f
from cachefs.store.format import LeaseReason, LeaseRecord, Table, ViewNo, ViewRecord

log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Why. The value is what people read."""

    OPEN = "open"
    PIN = "pinned"


@dataclass(frozen=True, slots=True)
class Lease:
    """A reason not to evict. Times are seconds since 1970; `until_s` None for no end."""

    reason: Reason
    since_s: float
    until_s: float | None = None
    detail: str = ""

    def holds(self, now_s: float) -> bool:
        return self.until_s is None or now_s < self.until_s

    def __str__(self) -> str:
        return f"it is {self.reason}" + (f" ({self.detail})" if self.detail else "")


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
    """`pinned_max` gives what pins may claim at this moment, in bytes; `clock` the seconds since 1970."""

    def __init__(
        self, store: LeaseStore, pinned_max: Callable[[], int], clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._pinned_max, self._clock = store, pinned_max, clock
        self._handles: Counter[ViewNo] = Counter()
        self._opened_s: dict[ViewNo, float] = {}
        self._pins: dict[str, Lease] = {}

    async def load(self) -> None:
        """Takes up what outlived the last daemon. To be awaited before anything is evicted."""
        for key, record in await trio.to_thread.run_sync(self._store.items, Table.LEASES):
            try:
                image, _ = f.split_lease_key(key)  # There is one reason that is kept, a pin.
            except (ValueError, IndexError):
                continue  # A reason of a later cachefs: left alone.
            self._take_up(image, key, record)
        if self.pinned_bytes > self._pinned_max():
            log.warning(
                "pinned images claim %d bytes, more than the %d they may: all stay pinned, no more can be",
                self.pinned_bytes, self._pinned_max(),
            )  # fmt: skip

    def _take_up(self, image: str, key: bytes, record: bytes) -> None:
        try:
            since_s, until_s = LeaseRecord.decode(key, record)
        except (RecordCorrupt, struct.error) as error:
            # One pin too many is seen and can be undone; one too few loses what somebody relies on.
            log.error("[image %s] taken for pinned: %s", image, error)
            self._keep_pin(image, Lease(Reason.PIN, self._clock()))
            return
        self._pins[image] = Lease(Reason.PIN, since_s, until_s or None)

    # ── what there is ──

    def of(self, view: LeasedView) -> list[Lease]:
        """Every lease that holds now."""
        found = []
        handles = self._handles[view.number]
        if handles:
            count = "1 handle" if handles == 1 else f"{handles} handles"
            found.append(Lease(Reason.OPEN, self._opened_s[view.number], detail=count))
        pin = self.pin_of(view.record.image)
        if pin is not None:
            found.append(pin)
        return found

    def is_leased(self, view: LeasedView) -> bool:
        return view.number in self._handles or self.pin_of(view.record.image) is not None

    def leased_views(self, views: Iterable[LeasedView]) -> set[ViewNo]:
        return {view.number for view in views if self.is_leased(view)}

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

    def opened_within(self, view: ViewNo, seconds: float) -> bool:
        """Whether the first of its handles was opened so shortly ago."""
        return self._clock() < self._opened_s.get(view, -float("inf")) + seconds

    @property
    def handles(self) -> int:
        return self._handles.total()

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
        for view in self._store.views():  # Of an image that Glance has no more, the view still knows it.
            if view.record.image in sizes and view.record.kind is not f.ViewKind.RESIZED:
                sizes[view.record.image] = max(sizes[view.record.image], view.record.size)
        return sum(sizes.values())

    def _keep_pin(self, image: str, pin: Lease) -> None:
        self._pins[image] = pin
        key = f.lease_key(image, LeaseReason.PIN)
        self._store.put(Table.LEASES, key, LeaseRecord(pin.since_s, pin.until_s or 0.0).encode(key))

    def _end_pin(self, image: str) -> None:
        if self._pins.pop(image, None) is not None:
            self._store.put(Table.LEASES, f.lease_key(image, LeaseReason.PIN), None)
