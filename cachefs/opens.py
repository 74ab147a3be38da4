"""How often each image was opened on this node, of late. Rule: an open costs the one who opens nothing but a
count; it is written down later, with the store's ordinary commits.

A count halves with every `HALF_LIFE_S`, so it tells of some weeks and needs no list of times. Booting one guest
opens its image several times: what comes within `APART_S` of the last one that was counted is the same use.
"""

from __future__ import annotations

import heapq
import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from cachefs import logs
from cachefs.errors import RecordCorrupt
from cachefs.store import format as f
from cachefs.store.format import OpensRecord, PrecacheKind, Table

log = logs.get(__name__)

HALF_LIFE_S = 7 * 86400.0
APART_S = 60.0
# Less than that says nothing any more: it is forgotten. One open is there for seven weeks.
COUNT_MIN = 2.0**-7
IMAGES_MAX = 10_000


class OpensStore(Protocol):
    """What is asked of the store."""

    def put(self, table: Table, key: bytes, record: bytes | None) -> None: ...

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, bytes]]: ...


@dataclass
class _Count:
    count: float
    at_s: float


class Opens:
    """See the module. Everything is called on the loop; `clock` gives the seconds since 1970."""

    def __init__(self, store: OpensStore, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._counts: dict[str, _Count] = {}
        self._changed: set[str] = set()

    def note(self, image: str) -> None:
        """Somebody opened it just now."""
        now_s = self._clock()
        known = self._counts.get(image)
        if known is None:
            if len(self._counts) >= IMAGES_MAX:
                self._forget_least()
            self._counts[image] = _Count(1.0, now_s)
        elif 0 <= now_s - known.at_s < APART_S:
            return
        else:
            self._counts[image] = _Count(self.of(image) + 1.0, now_s)
        self._changed.add(image)

    def of(self, image: str) -> float:
        """How many, as much as each still counts; 0 for none."""
        known = self._counts.get(image)
        if known is None:
            return 0.0
        return known.count * math.exp2(-max(self._clock() - known.at_s, 0.0) / HALF_LIFE_S)

    def _forget_least(self) -> None:
        """Some at once: looking for them takes some milliseconds."""
        for image in heapq.nsmallest(IMAGES_MAX // 10, self._counts, key=self.of):
            self._forget(image)

    def _forget(self, image: str) -> None:
        del self._counts[image]
        self._changed.discard(image)
        self._store.put(Table.PRECACHE, f.opens_key(image), None)

    # ── over restarts ──

    def save(self) -> None:
        """Hands what changed to the store's next commit, and forgets what counts for nothing any more."""
        for image in [image for image in self._counts if self.of(image) < COUNT_MIN]:
            self._forget(image)
        for image in self._changed:
            key = f.opens_key(image)
            record = OpensRecord(self._counts[image].count, self._counts[image].at_s)
            self._store.put(Table.PRECACHE, key, record.encode(key))
        self._changed.clear()

    async def load(self) -> None:
        """Takes up what was saved; what was learnt since the start stands."""
        now_s = self._clock()
        prefix = bytes((PrecacheKind.OPENS,))
        for key, record in await trio.to_thread.run_sync(self._store.items, Table.PRECACHE, prefix):
            try:
                _, image, _ = f.split_precache_key(key)
                count, at_s = OpensRecord.decode(key, record)
            except (RecordCorrupt, ValueError, struct.error) as error:
                log.warning("opens of an image are forgotten: %s", error)
                self._store.put(Table.PRECACHE, key, None)
                continue
            # A clock that was ahead, or nonsense: it would be the most used for ever.
            if count > 0 and image not in self._counts:
                self._counts[image] = _Count(min(count, 1e9), min(at_s, now_s))
