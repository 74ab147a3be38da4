"""What the daemon says of itself: the values behind `status`, `images` and `image`. Rule: reads only; every
value is a number, a text, a list or a dict, so that it is JSON as it stands. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import trio

from cachefs import __version__
from cachefs.blocks import Blocks
from cachefs.catalog import Catalog, Image
from cachefs.contact import Contact
from cachefs.control import Handler
from cachefs.errors import NoEntry
from cachefs.evictor import Evictor
from cachefs.fetcher import Fetcher
from cachefs.flights import Priority
from cachefs.fuse import Filesystem, Mount
from cachefs.histogram import Counted
from cachefs.hydrator import Hydrator
from cachefs.image_state import state_of
from cachefs.instances import Instances
from cachefs.leases import Leases
from cachefs.namespace import link_name
from cachefs.nova_folder import NovaFolder
from cachefs.places import Places
from cachefs.precache import Precache
from cachefs.ranks import Ranks
from cachefs.scrubber import Scrubber
from cachefs.sources.endpoints import Endpoints
from cachefs.sources.measured import Measured
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.store.health import State
from cachefs.traces import Traces
from cachefs.verifier import Verifier
from cachefs.words import counted

# Of each kind of what moves: as much as a screen can have.
ROWS_MAX = 100


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
    origin: Measured
    endpoints: Endpoints
    mount: Mount
    ranks: Ranks
    precache: Precache
    instances: Instances
    traces: Traces
    contact: Contact
    nova: NovaFolder | None
    places: Places


class Status:
    """Answers the reading commands."""

    def __init__(self, mountpoint: str, parts: Parts) -> None:
        self._mountpoint = mountpoint
        self._store, self._fetcher, self._blocks = parts.store, parts.fetcher, parts.blocks
        self._catalog, self._filesystem, self._leases = parts.catalog, parts.filesystem, parts.leases
        self._evictor, self._scrubber = parts.evictor, parts.scrubber
        self._instances = parts.instances
        self._hydrator, self._verifier = parts.hydrator, parts.verifier
        self._origin, self._mount, self._endpoints = parts.origin, parts.mount, parts.endpoints
        self._ranks, self._precache, self._traces = parts.ranks, parts.precache, parts.traces
        self._contact, self._nova, self._places = parts.contact, parts.nova, parts.places
        self._began_s = time.monotonic()

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self.status, "images": self.images, "image": self.image, "flights": self.flights,
            "glance": self.glance,
        }  # fmt: skip

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        store = await trio.to_thread.run_sync(self._store.totals)
        return self.now() | {"store": store, "nova": await self._nova_now()}

    async def _nova_now(self) -> dict[str, Any] | None:
        """Of the scratch files in `nova/`; None where there is no such folder."""
        if self._nova is None:
            return None
        totals = await self._nova.scratch.totals()
        return {**totals._asdict(), "removed_images": self._nova.removed}

    def now(self) -> dict[str, Any]:
        """All of `status` but `store`, which the disk is asked for. On the loop, and no work for it."""
        link, counts = self._fetcher.link, self._fetcher.counts
        flights = Counter(flight.priority for flight in self._fetcher.flights() if not flight.over)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": int(time.monotonic() - self._began_s),
            "mountpoint": self._mountpoint,
            "ready": self.ready(),
            "evictor": self._evictor.status(),
            "scrub": self._scrubber.status(),
            "hydration": self._hydrator.status(),
            "verification": self._verifier.status() | self._store.digests.status(),
            "precache": self._precache.status(),
            "traces": self._traces.status(),
            "images": {
                "known": len(self._catalog),
                "open": len(self._filesystem.open_count),
                "glance_reached": self._contact.is_reached,
                "glance_trouble": self._contact.trouble,
                "glance_reason": self._contact.reason(),
                "listed": self._contact.listed,
            },
            "disk": self._store.health.status(),
            "leases": self._leases.counts(),
            "instances": self._instances.status(),
            "reads": self._reads(),
            "writer": self._writer(),
            "origin": {
                **self._endpoints.status(),
                "may_ask": self._endpoints.may_ask,
                "requests": self._requests(),
                "bytes": dict(self._origin.bytes),
                "under_way": dict(self._origin.under_way),
            },
            "fetcher": {
                **asdict(counts),
                "flights": sum(flights.values()),
                "flights_by_priority": {one.name.lower(): flights[one] for one in Priority},
                "queued": self._fetcher.queued,
                "connections": self._fetcher.connections,
                "bytes_in_memory": self._fetcher.memory_used,
                "request_cost_ms": round(link.cost_s * 1000, 1),
                "request_cost": link.cost_s,
                "link_bytes_per_second": int(link.rate),
                "random_window": link.random_window,
            },
        }

    def ready(self) -> dict[str, Any]:
        """Whether instances can be given disks of this mount, and what is not as it should be. `state` is `ready`,
        `degraded` (it serves, with `reasons`) or `unready`: not mounted, or nothing is known of any image."""
        health, is_mounted = self._store.health, self._mount.is_ready
        is_ready = is_mounted and not self._contact.is_useless
        reasons = [] if is_mounted else ["it is not mounted"]
        if (reason := self._contact.reason()) is not None:
            reasons.append(reason)
        if health.state is not State.HEALTHY:
            reasons.append(f"the store's disk is {health.state.name.lower()}: {health.why}")
        if self._store.writer.trouble is not None:
            reasons.append(f"what is fetched is not kept: {self._store.writer.trouble}")
        if at_risk := len(self._hydrator.at_risk):
            images = counted(at_risk, "image that is in use", "images that are in use")
            reasons.append(f"{images} cannot be held whole")
        state = "unready" if not is_ready else "degraded" if reasons else "ready"
        return {"is_ready": is_ready, "state": state, "reasons": reasons}

    def _reads(self) -> dict[str, Any]:
        blocks, filesystem = self._blocks, self._filesystem
        ways = {"memory": blocks.from_memory, "disk": blocks.from_disk, "miss": blocks.missed}
        oldest_s = min((reading.since_s for reading in blocks.reading), default=None)
        return {
            "hits": filesystem.hits,
            "misses": blocks.misses,
            "waiting": blocks.waiting,
            "waiting_longest": 0.0 if oldest_s is None else round(trio.current_time() - oldest_s, 3),
            "by_outcome": {"hit": filesystem.hits} | {name: way.seconds.count for name, way in ways.items()},
            "bytes": {name: way.bytes for name, way in ways.items()},
            "failed": dict(filesystem.failed_reads),
            "sampled_bytes": filesystem.timed_hits.bytes,
        }

    def _writer(self) -> dict[str, Any]:
        writer = self._store.writer
        return {
            "bytes_landed": writer.lander.bytes_landed,
            "bytes_shared": writer.lander.bytes_shared,
            "bytes_zero": writer.lander.bytes_zero,
            "bytes_not_kept": writer.not_kept_bytes,
            "rotten_chunks_found": writer.lander.rotten_found,
            "read_errors": self._store.read_errors,
            "commits": writer.commits,
            "trouble": writer.trouble,
        }

    def _requests(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (asked, outcome), count in self._origin.requests.items():
            found.setdefault(asked, {})[outcome] = count
        return found

    def times(self) -> dict[str, dict[tuple[str, ...], Counted]]:
        """How long things took, as histograms by name and labels."""
        blocks, origin = self._blocks, self._origin
        return {
            "read_hit_seconds": {(): self._filesystem.timed_hits.seconds.now()},
            "read_wait_seconds": {
                ("disk",): blocks.from_disk.seconds.now(), ("miss",): blocks.missed.seconds.now(),
            },
            "origin_request_seconds": {(asked,): times.now() for asked, times in origin.seconds.items()},
            "origin_first_byte_seconds": {(asked,): times.now() for asked, times in origin.first_byte.items()},
        }  # fmt: skip

    async def images(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """With `same_name`: the others that have the image's name."""
        images = [*await self._catalog.listing(), *self._catalog.gone()]
        namesakes = self._catalog.namesakes()
        return [self._row(image) | {"same_name": _others(image, namesakes)} for image in images]

    async def glance(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether what `images` says is what Glance says."""
        return self._contact.status()

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
            "tags": list(found.tags),
            "properties": dict(found.properties),
            "priority_because": self._ranks.ranking(found).why,
            "held_because": self._precache.why(image),
            "opens": round(self._precache.opens.of(image), 2),
            "path": f"{self._mountpoint}/images/{image}",
            "paths": asdict(self._places.of(found)),
            "disk_cached": disk.cached if (disk := self._store.known_view(image, ViewKind.RAW)) else None,
            "by_name": self._link(found),
            "same_name": _others(found, self._catalog.namesakes()),
            "origin": stored.record.origin.name.lower() if stored is not None else "unknown",
            "handles": self._filesystem.open_count[image],
            "leases": [str(lease) for lease in self._leases.of_image(image)],
        }

    async def flights(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What moves: `flights` (bytes of the image's file or disk), and the `images` that matter now: those that
        guests wait for, that are fetched, at risk, or open; `waiting`: which images reads wait for, the longest
        wait first. At most so many of each as a screen can have."""
        waiting = Counter(reading.view.record.image for reading in self._blocks.reading)
        since_s: dict[str, float] = {}
        for reading in self._blocks.reading:
            image = reading.view.record.image
            since_s[image] = min(reading.since_s, since_s.get(image, reading.since_s))
        flying = [flight for flight in self._fetcher.flights() if not flight.over]
        flights = [
            {
                "image": flight.view.record.image,
                "priority": flight.priority.name.lower(),
                "start": flight.extent.start,
                "arrived": flight.at - flight.extent.start,
                "length": flight.extent.length,
                "started": flight.started,
                "readers": len(flight.waiting),
            }
            for flight in sorted(flying, key=lambda one: one.priority)[:ROWS_MAX]
        ]
        fetched, at_risk = (flight.view.record.image for flight in flying), self._hydrator.at_risk
        matter = [*waiting, *fetched, *at_risk, *list(self._filesystem.open_count)[:ROWS_MAX]]
        known = [self._catalog.known(image) for image in list(dict.fromkeys(matter))[:ROWS_MAX]]
        return {
            "flights": flights,
            "waiting": [self._wait(image, waiting[image], at_s) for image, at_s in _first(since_s)],
            "images": [
                {
                    **self._row(image),
                    "handles": self._filesystem.open_count[image.id],
                    "waiting": waiting[image.id],
                    "at_risk": at_risk.get(image.id),
                }
                for image in known
                if image is not None
            ],
        }

    def _wait(self, image: str, reads: int, since_s: float) -> dict[str, Any]:
        known = self._catalog.known(image)
        longest_s = round(trio.current_time() - since_s, 3)
        return {
            "image": image,
            "name": known.name if known is not None else None,
            "reads": reads,
            "longest": longest_s,
        }

    def _link(self, image: Image) -> str | None:
        name = link_name(image.name)
        has_it = name is not None and self._catalog.links.get(name) == image.number
        return f"{self._mountpoint}/by-name/{image.name}" if has_it else None

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
            "priority": self._ranks.of(image.id).name.lower(),
            "held": self._precache.is_held(image.id),
        }


def _first(since_s: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(since_s.items(), key=lambda one: one[1])[:ROWS_MAX]


def _others(image: Image, namesakes: Mapping[str, list[str]]) -> list[str]:
    ids = namesakes.get(image.name or "", [])
    return [id_ for id_ in ids if id_ != image.id] if image.id in ids else []
