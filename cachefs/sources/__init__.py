"""Where bytes come from. Rule: a source moves bytes; it never decides which, and never keeps any.

`Source` is what the fetcher asks, `Registry` what the catalog asks; `glance` is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cachefs.plan.extents import Extent


class Sink(Protocol):
    """Takes what a source receives, in order. A source alternates: `room`, write into it, `arrived`."""

    async def room(self) -> memoryview:
        """A writable place for the next bytes, at least one; waits while too much is in memory."""
        ...

    def room_now(self) -> memoryview | None:
        """The same without waiting; None where `room` would have to wait, or nothing more is due."""
        ...

    def awaited(self, n: int) -> bool:
        """Whether somebody waits for one of the next `n` bytes. May be asked from any thread."""
        ...

    def arrived(self, n: int) -> None:
        """The first `n` bytes of the last `room` are the next `n` bytes of the body."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """How one request went, in seconds: until its first byte of body, and from there to its last."""

    first_byte_s: float
    body_s: float


class Source(Protocol):
    """Gives an image's bytes."""

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        """Asks for `extent` of an image of `size` bytes by one ranged request. Returns when its last byte has
        arrived. Raises an OriginError: RangeRefused where this image's store gives no ranges."""
        ...

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        """Asks for the whole image by one request without a range; as `fetch` otherwise."""
        ...


class Registry(Protocol):
    """Knows which images there are."""

    async def images(self) -> list[dict[str, Any]]:
        """Every image that this account may see, with Glance's own field names. Raises OriginError."""
        ...

    async def image(self, image: str) -> dict[str, Any]:
        """One image. Raises ImageGone only when Glance itself says that there is none."""
        ...
