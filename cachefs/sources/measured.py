"""A layer over the origin that counts what is asked of it and how long that takes. Rule: changes neither what goes
through it nor its errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol

import trio

from cachefs.errors import word_of
from cachefs.histogram import Histogram
from cachefs.plan.extents import Extent
from cachefs.sources import Registry, Sink, Source, Timing


class Asked(StrEnum):
    """What was asked for. The value is the word in the metrics."""

    RANGE = "range"
    STREAM = "stream"
    IMAGE = "image"
    IMAGES = "images"


class Origin(Source, Registry, Protocol):
    """What gives images' bytes, and knows which there are."""


OK, ABANDONED = "ok", "abandoned"


class Measured:
    """A Source and a Registry, as `origin` is. `requests` counts what ended, by what was asked for and how it
    went; `bytes` those of bodies by what was asked for, whatever became of the request. Seconds include what a
    body waited for memory here."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self.requests: Counter[tuple[Asked, str]] = Counter()
        self.bytes: Counter[Asked] = Counter()
        self.under_way: Counter[Asked] = Counter()
        self.first_byte = {asked: Histogram() for asked in (Asked.RANGE, Asked.STREAM)}
        self.seconds = {asked: Histogram() for asked in Asked}  # Of those that went well.

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        """See `Source.fetch`."""
        with self._measured(Asked.RANGE):
            timing = await self._origin.fetch(image, size, extent, _CountedSink(self, Asked.RANGE, sink))
        return self._learn(Asked.RANGE, timing)

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        """See `Source.stream`."""
        with self._measured(Asked.STREAM):
            timing = await self._origin.stream(image, size, _CountedSink(self, Asked.STREAM, sink))
        return self._learn(Asked.STREAM, timing)

    async def images(self) -> list[dict[str, Any]]:
        """See `Registry.images`."""
        with self._measured(Asked.IMAGES):
            return await self._origin.images()

    async def image(self, image: str) -> dict[str, Any]:
        """See `Registry.image`."""
        with self._measured(Asked.IMAGE):
            return await self._origin.image(image)

    def _learn(self, asked: Asked, timing: Timing) -> Timing:
        self.first_byte[asked].observe(timing.first_byte_s)
        return timing

    @contextmanager
    def _measured(self, asked: Asked) -> Iterator[None]:
        began_s = trio.current_time()
        self.under_way[asked] += 1
        outcome = ABANDONED
        try:
            yield
            outcome = OK
            self.seconds[asked].observe(trio.current_time() - began_s)
        except Exception as error:
            outcome = word_of(error)
            raise
        finally:
            self.under_way[asked] -= 1
            self.requests[asked, outcome] += 1


class _CountedSink:
    """A sink in front of another one, once for each request."""

    __slots__ = ("_asked", "_measured", "_sink", "awaited", "room", "room_now")

    def __init__(self, measured: Measured, asked: Asked, sink: Sink) -> None:
        self._measured, self._asked, self._sink = measured, asked, sink
        self.room, self.room_now, self.awaited = sink.room, sink.room_now, sink.awaited

    def arrived(self, n: int) -> None:
        self._measured.bytes[self._asked] += n
        self._sink.arrived(n)
