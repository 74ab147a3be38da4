"""What was touched: the times that somebody gave a file, and for how long that is a lease. Rule: a lease lasts for
so many seconds of a running daemon, by the clock that only goes on; no date that anybody sets begins, keeps or
ends one.

Nova touches what its instances stand on whenever it looks after its cache, and before it makes a disk. Times
belong to one file, as everywhere. They are remembered as long as the image, bounded in number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cachefs import logs
from cachefs.errors import RecordCorrupt
from cachefs.store import format as f
from cachefs.store.format import Table, TouchRecord, ViewKind

log = logs.get(__name__)

TOUCHED_MAX = 100_000
_NS_MIN, _NS_MAX = -(1 << 63), (1 << 63) - 1


class File(NamedTuple):
    """A file of an image, by its folder: ORIGINAL, RAW, or RESIZED with a `size` in bytes."""

    kind: ViewKind
    size: int = 0


@dataclass
class Touch:
    """Times in nanoseconds since 1970; it is a lease until `ends_s`, by the clock that only goes on."""

    atime_ns: int
    mtime_ns: int
    ends_s: float


class TouchStore(Protocol):
    """What is asked of the store."""

    def put(self, table: Table, key: bytes, record: bytes | None) -> None: ...


class Touches:
    """`grace_s`: how long a touch is a lease. `now_s`: a clock that only goes on; `clock`: the seconds since
    1970."""

    def __init__(
        self, store: TouchStore, grace_s: float, now_s: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._store, self.grace_s, self._now_s, self._clock = store, grace_s, now_s, clock
        self._images: dict[str, dict[File, Touch]] = {}
        self._count = 0

    def touch(self, image: str, file: File, atime_ns: int, mtime_ns: int) -> Touch:
        """Somebody set these times now. Durable with the store's next commit."""
        files = self._images.pop(image, {})
        self._images[image] = files  # The one touched last is the last to be forgotten.
        self._count += file not in files
        atime_ns, mtime_ns = (min(max(ns, _NS_MIN), _NS_MAX) for ns in (atime_ns, mtime_ns))
        touch = files[file] = Touch(atime_ns, mtime_ns, self._now_s() + self.grace_s)
        self._save(image, file, touch)
        while self._count > TOUCHED_MAX and len(self._images) > 1:
            self.forget(next(iter(self._images)))
        return touch

    def of(self, image: str, file: File) -> Touch | None:
        """The last touch of this file, if anybody remembers one."""
        files = self._images.get(image)
        return None if files is None else files.get(file)

    def leasing(self, image: str) -> dict[File, float]:
        """The files of the image whose touch is a lease now, and for how many more seconds."""
        files = self._images.get(image)
        if files is None:
            return {}
        now_s = self._now_s()
        return {file: touch.ends_s - now_s for file, touch in files.items() if touch.ends_s > now_s}

    def end(self, image: str) -> None:
        """What was touched of it is no lease any more."""
        for file, touch in self._images.get(image, {}).items():
            if touch.ends_s > -float("inf"):
                touch.ends_s = -float("inf")
                self._save(image, file, touch)

    def images(self) -> list[str]:
        """Those that were touched, whether that is a lease or not."""
        return list(self._images)

    def forget(self, image: str) -> None:
        """The image is gone."""
        for file in self._images.pop(image, {}):
            self._count -= 1
            self._store.put(Table.LEASES, f.touch_key(image, *file), None)

    # ── over restarts ──

    def save(self) -> Iterator[None]:
        """Hands to the store how long each lease has left, a record for each step: seldom, and at the end."""
        for image in self.images():
            for file, touch in list(self._images.get(image, {}).items()):
                if touch.ends_s > -float("inf"):
                    if touch.ends_s <= self._now_s():
                        touch.ends_s = -float("inf")  # The last time that there is something to save.
                    self._save(image, file, touch)
                    yield

    def _save(self, image: str, file: File, touch: Touch) -> None:
        key = f.touch_key(image, *file)
        left_s = max(touch.ends_s - self._now_s(), 0.0)
        self._store.put(Table.LEASES, key, TouchRecord(touch.atime_ns, touch.mtime_ns, left_s).encode(key))

    def take_up(self, key: bytes, record: bytes) -> None:
        """One that outlived the last daemon. Raises ValueError or struct.error for a key that is none."""
        image, kind, size = f.split_touch_key(key)
        try:
            atime_ns, mtime_ns, left_s = TouchRecord.decode(key, record)
        except (RecordCorrupt, struct.error) as error:
            log.error("taken for touched now: %s", error, image=image)
            atime_ns = mtime_ns = int(self._clock() * 1e9)
            left_s = self.grace_s
        left_s = min(max(left_s, 0.0), self.grace_s)
        ends_s = self._now_s() + left_s if left_s else -float("inf")
        self._images.setdefault(image, {})[File(kind, size)] = Touch(atime_ns, mtime_ns, ends_s)
        self._count += 1
