"""What the daemon is told to do with images: `pin`, `unpin`, `evict`. Rule: each image gets an answer of its own,
so that one which is refused does not hold up the others.

A request names `images`; an answer is a list with one dict for each, in their order: its `id`, what came of it
(sizes in bytes), and `error`, None where it was done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol
from uuid import UUID

import trio

from cachefs.control import Handler
from cachefs.errors import CachefsError, ControlError, NoEntry
from cachefs.evictor import Asked, Evictor
from cachefs.leases import SETTLE_MAX_S, Leases

IMAGES_MAX = 1000
# Shorter than whoever asks waits for an answer. Dropping goes on.
EVICT_WAIT_S = 20.0


class SizedImage(Protocol):
    """What is asked of an image."""

    @property
    def size(self) -> int: ...


class SizedView(Protocol):
    """What is asked of a view."""

    @property
    def size(self) -> int: ...

    @property
    def cached(self) -> int: ...


class Commands:
    """`lookup` gives the image, or raises NoEntry or OriginError; `prefetch` begins to fetch all of it,
    `prefetched` tells how far that is and raises PrefetchEnded when it goes no further; `flush` returns when what
    was put into the store is durable."""

    def __init__(
        self,
        leases: Leases,
        evictor: Evictor,
        lookup: Callable[[str], Awaitable[SizedImage]],
        flush: Callable[[], Awaitable[None]],
        prefetch: Callable[[str], Awaitable[SizedView]],
        prefetched: Callable[[str], SizedView],
    ) -> None:
        self._leases, self._evictor, self._lookup, self._flush = leases, evictor, lookup, flush
        self._prefetch, self._prefetched = prefetch, prefetched

    def handlers(self) -> dict[str, Handler]:
        return {"pin": self.pin, "unpin": self.unpin, "evict": self.evict, "prefetch": self.prefetch}

    async def prefetch(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`cached` and `size`. With `begun`, it only tells how far it is, or why it ended."""
        return await self._each(request, self._tell_prefetch if request.get("begun") else self._begin_prefetch)

    async def _begin_prefetch(self, image: str) -> dict[str, Any]:
        view = await self._prefetch(image)
        return {"cached": view.cached, "size": view.size}

    async def _tell_prefetch(self, image: str) -> dict[str, Any]:
        view = self._prefetched(image)
        return {"cached": view.cached, "size": view.size}

    async def pin(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`pinned`, and `size`. What is answered outlives a crash."""
        return await self._each(request, self._pin)

    async def unpin(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`was_pinned`. Also of an image that Glance has no more."""
        return await self._each(request, self._unpin)

    async def evict(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`spans` and `bytes` that went, how much was `cached`, and whether that is all (`done`) or the rest goes
        on in the background. With `touched`, leases by touch end first, where nothing else leases the image."""
        answers: list[dict[str, Any]] = []
        begun: dict[int, Asked] = {}
        images = _images(request)
        with trio.move_on_after(SETTLE_MAX_S):
            await self._leases.look()  # A disk may have been made since.
        for at, image in enumerate(images):
            answers.append({"id": image, "error": None, "spans": 0, "bytes": 0, "cached": 0, "done": False})
            try:
                if request.get("touched"):
                    self._leases.end_touches(_image(image))
                begun[at] = self._evictor.begin_evicting(_image(image))
            except CachefsError as error:
                answers[at]["error"] = str(error)
        with trio.move_on_after(EVICT_WAIT_S):
            for asked in begun.values():
                await asked.done.wait()
        for at, asked in begun.items():
            failed = asked.error is not None
            answers[at]["error"] = str(asked.error) if failed else None
            answers[at].update(spans=asked.spans, bytes=asked.bytes, cached=asked.cached)
            answers[at]["done"] = asked.done.is_set() and not failed
        return answers

    async def _each(
        self, request: Mapping[str, Any], do: Callable[[str], Awaitable[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        answers = []
        for image in _images(request):
            try:
                answers.append({"id": image, "error": None, **await do(_image(image))})
            except CachefsError as error:
                answers.append({"id": image, "error": str(error)})
        await self._flush()
        return answers

    async def _pin(self, image: str) -> dict[str, Any]:
        size = (await self._lookup(image)).size
        self._leases.pin(image, size)
        return {"pinned": True, "size": size}

    async def _unpin(self, image: str) -> dict[str, Any]:
        return {"was_pinned": self._leases.unpin(image)}


def _images(request: Mapping[str, Any]) -> list[str]:
    images = request.get("images")
    if not isinstance(images, list) or not 0 < len(images) <= IMAGES_MAX:
        raise ControlError(str(request.get("command")), f"names from 1 to {IMAGES_MAX} images")
    return list(dict.fromkeys(map(str, images)))


def _image(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise NoEntry(f"{text!r} is no image id") from None
