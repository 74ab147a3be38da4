"""Comparing all of an image with Glance's hash, once it is here whole. Rule: it reads at leisure, what it reads is
kept for nobody, and an image that is not what Glance promises is never read again.

`os_hash_value` is preferred, `checksum` (MD5) is what old images have. The bytes come from the store: each chunk
was compared with its own digest, so what differs here came so from the origin. The image is condemned then: reads
fail, everything of it is dropped, and the log says so. Bytes that went and came again while the rest was read were
not compared: then it is done once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from cachefs import logs
from cachefs.catalog import Catalog, Image
from cachefs.errors import CachefsError
from cachefs.huge import place
from cachefs.leisure import Leisure
from cachefs.store.content import Store
from cachefs.store.digests import Pass
from cachefs.store.format import ViewKind, ViewNo
from cachefs.store.view import StoredView

if TYPE_CHECKING:
    from hashlib import _Hash

log = logs.get(__name__)

# Read and hashed in one go: some milliseconds of a thread.
PIECE_BYTES = 4 << 20
# What became whole is told at once. What could not be read then, or got its hash later, is looked for so often.
LOOK_S = 300.0
LOOKED_AT_ONCE = 256
EVICT_SPANS = 64


class Verifier:
    """`run` is the task. What it condemns goes whatever leases it. `on_verified` is told each image that is found
    to be what Glance promises."""

    def __init__(self, catalog: Catalog, store: Store, leisure: Leisure) -> None:
        self._catalog, self._store, self._leisure = catalog, store, leisure
        self._queue: dict[StoredView, None] = {}
        self._lost: set[ViewNo] = set()
        self._wake = trio.Event()
        self._buffer: memoryview | None = None
        self.on_verified: Callable[[str], None] = lambda image: None
        self.verified = self.condemned = 0

    # ── for everybody, on the loop ──

    def settled(self, view: StoredView) -> None:
        """The view has become whole."""
        if view.record.kind is ViewKind.ORIGINAL:
            self._queue[view] = None
            self._wake.set()

    def lost(self, view: StoredView) -> None:
        """Something of the view is not here any more."""
        self._lost.add(view.number)

    def status(self) -> dict[str, Any]:
        """For `status`: counts since the start."""
        return {"waiting": len(self._queue), "verified": self.verified, "condemned": self.condemned}

    # ── the task ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        while True:
            await self._look()
            until_s = trio.current_time() + LOOK_S
            while trio.current_time() < until_s:
                await self._verify_queued()
                with trio.move_on_at(until_s):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def _look(self) -> None:
        for count, view in enumerate(self._store.views(), 1):
            if count % LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            image = self._catalog.known(view.record.image)
            if image is None or image.verified or image.condemned is not None or promise_of(image) is None:
                continue
            if view.complete and view.size:
                self.settled(view)

    async def _verify_queued(self) -> None:
        while self._queue:
            view = next(iter(self._queue))
            del self._queue[view]
            try:
                await self._verify(view)
            except CachefsError as error:  # It is not whole any more, or cannot be read now.
                log.debug("not verified now: %s", error, image=view.record.image)
                self._buffer = None  # A late thread may still write to it.
            except Exception:  # A bug here must not take the mount down.
                log.exception("unexpected failure of verification", image=view.record.image)
                self._buffer = None

    async def _verify(self, view: StoredView) -> None:
        image = self._catalog.known(view.record.image)
        promise = promise_of(image) if image is not None else None
        if image is None or promise is None or image.verified or not self._is_current(view, image):
            return
        algorithm, promised = promise
        self._lost.clear()
        passed = self._store.digests.begin(view)
        found = await self._hash(view, algorithm, passed)
        now = self._catalog.known(image.id)
        if now is None or now.number != image.number or not self._is_current(view, now):
            return  # Its id means another image now.
        if found is None or view.number in self._lost:
            if view.complete:
                self.settled(view)  # What went has come again.
            return
        if found == promised:
            self.verified += 1
            self._catalog.learn_verified(image.id, None)
            log.info("verified: all %d bytes have Glance's %s", view.size, algorithm, image=image.id)
            self.on_verified(image.id)
            await passed.trust()
            return
        await self._condemn(image, view, f"its {algorithm} is {found}, and Glance says {promised}")

    def _is_current(self, view: StoredView, image: Image) -> bool:
        return self._store.known_view(image.id, ViewKind.ORIGINAL) is view

    async def _hash(self, view: StoredView, algorithm: str, passed: Pass) -> str | None:
        """Of all of the view; None when something of it went. `passed` is told the digests of the same bytes."""
        if self._buffer is None:
            self._buffer = memoryview(place(PIECE_BYTES))
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        worked_s = 0.0
        for at in range(0, view.size, PIECE_BYTES):
            await self._leisure.pause(worked_s)
            if not view.complete or view.number in self._lost:
                return None
            began_s = trio.current_time()
            piece = self._buffer[: min(PIECE_BYTES, view.size - at)]
            hasher, digests = await view.look_at(at, piece, partial(_hashed, hasher, passed))
            passed.note(at, digests)
            worked_s = trio.current_time() - began_s
        return hasher.hexdigest()

    async def _condemn(self, image: Image, view: StoredView, why: str) -> None:
        self.condemned += 1
        log.error("CONDEMNED: %s. Nothing of it is served from now on", why, image=image.id)
        views = [other for other in self._store.views() if other.record.image == image.id]
        for other in views:
            other.condemn(why)
        # In this order: where only the first is durable it is fetched anew, and condemned then.
        self._store.end_views(image.id)
        self._catalog.learn_verified(image.id, why)
        numbers = {other.number for other in views}
        await self._store.flush()  # What has landed by now is found then.
        here = await trio.to_thread.run_sync(
            lambda: [span for span in self._store.resident() if span[0] in numbers]
        )
        for first in range(0, len(here), EVICT_SPANS):
            await self._store.evict(here[first : first + EVICT_SPANS])


def _hashed(hasher: _Hash, passed: Pass, data: memoryview) -> tuple[_Hash, bytes]:
    """In a thread. A new one: what was read may turn out to have been replaced meanwhile."""
    longer = hasher.copy()
    longer.update(data)
    return longer, passed.digests(data)


def promise_of(image: Image) -> tuple[str, str] | None:
    """Algorithm and hash that Glance promises, in lower case; None where it promises none that can be checked."""
    if image.os_hash_value and image.os_hash_algo in hashlib.algorithms_available:
        return str(image.os_hash_algo), image.os_hash_value.lower()
    if image.checksum:
        return "md5", image.checksum.lower()
    return None
