"""What eviction leaves over: segments in which little or nothing lives. Rule: of what is alive it changes the
place, never the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from cachefs import logs
from cachefs.leisure import Guests
from cachefs.plan import compaction
from cachefs.store.content import Store
from cachefs.store.format import ChunkId, SegmentNo
from cachefs.words import counted

log = logs.get(__name__)

LOOK_S = 60.0
# A pass looks at every chunk's record.
COMPACT_EVERY_S = 3600.0
# Chunks that move in one go (about 4 MiB), and how fast they do.
BATCH = 64
BYTES_PER_S = 64 << 20


class Compactor:
    """`run` is its task. While the disk is not well, or one of `guests` waits, nothing is moved."""

    def __init__(self, store: Store, disk_unwell: Callable[[], bool], guests: Guests | None = None) -> None:
        self._store, self._disk_unwell, self._guests = store, disk_unwell, guests
        self.moved_bytes = self.removed_segments = 0  # Since the start, for `status`.

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        compacted_s = trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            try:
                self.removed_segments += await self._store.remove_lifeless()
                if trio.current_time() >= compacted_s + COMPACT_EVERY_S:
                    compacted_s = trio.current_time()
                    await self.compact()
            except Exception:  # It costs some descriptors until the next look, not the mount.
                log.exception("unexpected failure of compaction")

    async def compact(self) -> int:
        """One pass: moves what lives in segments that are worth it, and removes them. Returns how many went."""
        sealed, live = await trio.to_thread.run_sync(self._store.sealed_segments)
        sources = frozenset(compaction.worth_moving(sealed, live))
        if not sources:
            return 0
        chunks = await trio.to_thread.run_sync(self._store.chunks_in, sources)
        moved = await self._move(chunks, sources)
        removed = await self._store.remove_lifeless()
        self.removed_segments += removed
        segments = counted(len(sources), "segment")
        log.info("compacted %s: %d MiB moved, %d removed", segments, moved >> 20, removed)
        return removed

    async def _move(self, chunks: list[ChunkId], sources: frozenset[SegmentNo]) -> int:
        moved = 0
        for first in range(0, len(chunks), BATCH):
            await self._until_calm()
            began_s = trio.current_time()
            done = await self._store.move(chunks[first : first + BATCH], sources)
            moved += done
            self.moved_bytes += done
            await trio.sleep_until(began_s + done / BYTES_PER_S)
        return moved

    async def _until_calm(self) -> None:
        while True:
            if self._disk_unwell():
                await trio.sleep(1)
            elif self._guests is not None and self._guests.waiting:
                await self._guests.until_calm(LOOK_S)
            else:
                return
