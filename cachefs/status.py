"""What the daemon says of itself: the values behind `status`, `images` and `image`. Rule: reads only; every
value is a number, a text, a list or a dict, so that it is JSON as it stands. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import trio

from cachefs import __version__
from cachefs.blocks import Blocks
from cachefs.catalog import Catalog, Image
from cachefs.control import Handler
from cachefs.errors import NoEntry
from cachefs.evictor import Evictor
from cachefs.fetcher import Fetcher
from cachefs.fuse import Filesystem, state_of
from cachefs.hydrator import Hydrator
from cachefs.leases import Leases
from cachefs.scrubber import Scrubber
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.verifier import Verifier


@dataclass(frozen=True)
class Parts:
    """What is asked."""

    store: Store
    fetcher: Fetcher
    blocks: Blocks
    catalog: Catalog
    filesystem: Filesystem
    leases: Leases
    evictor: Evictor
    scrubber: Scrubber
    hydrator: Hydrator
    verifier: Verifier


class Status:
    """Answers the reading commands."""

    def __init__(self, mountpoint: str, parts: Parts) -> None:
        self._mountpoint = mountpoint
        self._store, self._fetcher, self._blocks = parts.store, parts.fetcher, parts.blocks
        self._catalog, self._filesystem, self._leases = parts.catalog, parts.filesystem, parts.leases
        self._evictor, self._scrubber = parts.evictor, parts.scrubber
        self._hydrator, self._verifier = parts.hydrator, parts.verifier
        self._began_s = time.monotonic()

    def handlers(self) -> dict[str, Handler]:
        return {"status": self.status, "images": self.images, "image": self.image}

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        link, counts = self._fetcher.link, self._fetcher.counts
        store = await trio.to_thread.run_sync(self._store.totals)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": int(time.monotonic() - self._began_s),
            "mountpoint": self._mountpoint,
            "store": store,
            "evictor": self._evictor.status(),
            "scrub": self._scrubber.status(),
            "hydration": self._hydrator.status(),
            "verification": self._verifier.status(),
            "images": {
                "known": len(self._catalog),
                "open": len(self._filesystem.open_count),
                "glance_trouble": self._catalog.last_error,
            },
            "reads": {
                "hits": self._filesystem.hits,
                "misses": self._blocks.misses,
                "waiting": self._blocks.waiting,
            },
            "fetcher": {
                **asdict(counts),
                "flights": sum(1 for flight in self._fetcher.flights() if not flight.over),
                "bytes_in_memory": self._fetcher.memory_used,
                "request_cost_ms": round(link.cost_s * 1000, 1),
                "link_bytes_per_second": int(link.rate),
                "random_window": link.random_window,
            },
        }

    async def images(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [self._row(image) for image in await self._catalog.listing()]

    async def image(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            image = str(UUID(str(request.get("image"))))
        except ValueError:
            raise NoEntry(f"{request.get('image')} is no image id") from None
        found = await self._catalog.lookup(image)
        stored = self._store.known_view(image, ViewKind.ORIGINAL)
        return {
            **self._row(found),
            **asdict(found),
            "path": f"{self._mountpoint}/images/{image}",
            "origin": stored.record.origin.name.lower() if stored is not None else "unknown",
            "handles": self._filesystem.open_count[image],
            "leases": [str(lease) for lease in self._leases.of(stored)] if stored is not None else [],
        }

    def _row(self, image: Image) -> dict[str, Any]:
        stored = self._store.known_view(image.id, ViewKind.ORIGINAL)
        return {
            "id": image.id,
            "name": image.name,
            "status": image.status,
            "disk_format": image.disk_format,
            "size": image.size,
            "cached": stored.cached if stored is not None else 0,
            "state": state_of(stored, image),
            "in_use": bool(self._filesystem.open_count[image.id]),
            "pinned": self._leases.pin_of(image.id) is not None,
        }
