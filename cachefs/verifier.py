"""Comparing all of an image with Glance's hash, once it is here whole. Rule: it reads at leisure, what it reads is
kept for nobody, and an image that is not what Glance promises is never read again.

`os_hash_value` is preferred, `checksum` (MD5) is what old images have. The bytes come from the store: each chunk
was compared with its own digest, so what differs here came so from the origin. The image is condemned then: reads
fail, everything of it is dropped, and the log says so.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from typing import Any

import trio

from cachefs.blocks import Blocks
from cachefs.catalog import Catalog, Image
from cachefs.errors import CachefsError
from cachefs.store.content import Store, StoredView
from cachefs.store.format import ViewKind

log = logging.getLogger(__name__)

# Read and hashed in one go: some milliseconds of a thread.
PIECE_BYTES = 4 << 20
LOOK_S = 30.0
EVICT_SPANS = 64
# While guests wait, it is looked so often whether they still do; but not for longer than this at a time.
COURTESY_S, COURTESY_MAX_S = 0.05, 5.0


class Verifier:
    """`run` is the task. What it condemns goes whatever leases it."""

    def __init__(self, catalog: Catalog, store: Store, blocks: Blocks) -> None:
        self._catalog, self._store, self._blocks = catalog, store, blocks
        self._queue: deque[StoredView] = deque()
        self._wake = trio.Event()
        self.verified = self.condemned = 0

    def settled(self, view: StoredView) -> None:
        """The view has become whole."""
        if view not in self._queue:
            self._queue.append(view)
            self._wake.set()

    def status(self) -> dict[str, Any]:
        """For `status`: counts since the start."""
        return {"waiting": len(self._queue), "verified": self.verified, "condemned": self.condemned}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Also looks for images that became whole by being read."""
        task_status.started()
        while True:
            self._look()
            while self._queue:
                view = self._queue[0]
                try:
                    await self._verify(view)
                except CachefsError as error:  # It is not whole any more, or cannot be read now.
                    log.debug("[image %s] not verified now: %s", view.record.image, error)
                except Exception:  # A bug here must not take the mount down.
                    log.exception("[image %s] unexpected failure of verification", view.record.image)
                if self._queue and self._queue[0] is view:
                    self._queue.popleft()
            with trio.move_on_after(LOOK_S):
                await self._wake.wait()
            self._wake = trio.Event()

    def _look(self) -> None:
        for view in self._store.views():
            image = self._catalog.known(view.record.image)
            whole = view.record.kind is ViewKind.ORIGINAL and view.complete and view.size
            if image is None or not whole or image.verified or image.condemned is not None:
                continue
            if promise_of(image) is not None:
                self.settled(view)

    async def _verify(self, view: StoredView) -> None:
        image = self._catalog.known(view.record.image)
        promise = promise_of(image) if image is not None else None
        if image is None or promise is None or image.verified or view.record.kind is not ViewKind.ORIGINAL:
            return
        algorithm, promised = promise
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        for at in range(0, view.size, PIECE_BYTES):
            await self._courtesy()
            if not view.complete:
                return
            length = min(PIECE_BYTES, view.size - at)
            data = await view.read(at, length)
            await trio.to_thread.run_sync(hasher.update, data)
        now = self._catalog.known(image.id)
        if (
            now is None
            or now.number != image.number
            or self._store.known_view(image.id, ViewKind.ORIGINAL) is not view
        ):
            return  # Its id means another image now.
        found = hasher.hexdigest()
        if found == promised:
            self.verified += 1
            self._catalog.learn_verified(image.id, None)
            log.info("[image %s] verified: all %d bytes have Glance's %s", image.id, view.size, algorithm)
            return
        await self._condemn(image, view, f"its {algorithm} is {found}, and Glance says {promised}")

    async def _condemn(self, image: Image, view: StoredView, why: str) -> None:
        self.condemned += 1
        log.error("[image %s] CONDEMNED: %s. Nothing of it is served from now on", image.id, why)
        views = [other for other in self._store.views() if other.record.image == image.id]
        for other in views:
            other.condemn(why)
        self._catalog.learn_verified(image.id, why)
        self._store.end_views(image.id)
        numbers = {other.number for other in views}
        here = await trio.to_thread.run_sync(
            lambda: [span for span in self._store.resident() if span[0] in numbers]
        )
        for first in range(0, len(here), EVICT_SPANS):
            await self._store.evict(here[first : first + EVICT_SPANS])

    async def _courtesy(self) -> None:
        until_s = trio.current_time() + COURTESY_MAX_S
        while self._blocks.waiting and trio.current_time() < until_s:  # noqa: ASYNC110  # As in `Hydrator`.
            await trio.sleep(COURTESY_S)


def promise_of(image: Image) -> tuple[str, str] | None:
    """Algorithm and hash that Glance promises, in lower case; None where it promises none that can be checked."""
    if image.os_hash_value and image.os_hash_algo in hashlib.algorithms_available:
        return str(image.os_hash_algo), image.os_hash_value.lower()
    if image.checksum:
        return "md5", image.checksum.lower()
    return None
