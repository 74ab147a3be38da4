"""Which image somebody means who names it to a command: by its id, the beginning of one, or its name. Rule: it
never guesses; what may be two images is an error that names them.

Files of the mount have one name each. This is for people at a keyboard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol
from uuid import UUID

from cachefs.control import Handler
from cachefs.errors import AmbiguousImage, CachefsError, ControlError, NoEntry

DIGITS_MIN = 4
TEXTS_MAX = 1000
OFFERED_MAX = 1000
# Nothing in it means anything to a shell but the space, which readline quotes; a colon would end a word.
_PLAIN = re.compile(r"\w[\w .+,@%-]*")


class NamedImage(Protocol):
    """What is asked of an image."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str | None: ...


def meant(text: str, images: Iterable[NamedImage]) -> str:
    """The id of the image. An id is taken as it is, whether one is known or not. Raises AmbiguousImage, and
    NoEntry where nothing is called so."""
    try:
        return str(UUID(text))
    except ValueError:
        pass
    images = list(images)
    if not images:
        raise NoEntry(f"{text!r}: no image is known here yet, so only a whole id says which one is meant")
    digits = text.replace("-", "").lower()
    is_beginning = re.fullmatch(rf"[0-9a-f]{{{DIGITS_MIN},32}}", digits) is not None
    found = [
        image
        for image in images
        if image.name == text or (is_beginning and image.id.replace("-", "").startswith(digits))
    ]
    if not found:
        raise NoEntry(
            f"{text!r} is no image id, nor the first {DIGITS_MIN} or more digits of one, nor an image's name "
            "(cachefs images)"
        )
    if len(found) > 1:
        raise AmbiguousImage(text, tuple((image.id, image.name) for image in found))
    return found[0].id


def offered(begun: str, images: Iterable[NamedImage]) -> list[str]:
    """What a shell may complete `begun` to: names that one image has, and ids: of an image without such a name at
    once, of all others when digits were begun. Names are other people's, and go into a command line: only plain
    ones are offered."""
    images = list(images)
    times = Counter(image.name for image in images)
    words = set()
    for image in images:
        has_name = times[image.name] == 1 and _PLAIN.fullmatch(image.name or "") is not None
        words |= {image.name} if has_name and image.name is not None else set()
        words |= {image.id} if begun or not has_name else set()
    return sorted(word for word in words if word.startswith(begun))[:OFFERED_MAX]


class Naming:
    """`known` gives all images that are known now; `ask_glance` returns when the catalog has learnt what there is,
    or when that takes too long."""

    def __init__(
        self, known: Callable[[], Iterable[NamedImage]], ask_glance: Callable[[], Awaitable[object]]
    ) -> None:
        self._known, self._ask_glance = known, ask_glance

    def handlers(self) -> dict[str, Handler]:
        return {"which": self._which, "offer": self._offer}

    async def _offer(self, request: Mapping[str, Any]) -> list[str]:
        """For a shell: Glance is not asked, as somebody waits with a finger on a key."""
        return offered(str(request.get("begun", "")), self._known())

    async def _which(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each of the `texts` the `id`, or the `error`."""
        texts = request.get("texts")
        if not isinstance(texts, list) or not 0 < len(texts) <= TEXTS_MAX:
            raise ControlError("which", f"names from 1 to {TEXTS_MAX} images")
        return [await self._row(str(text)) for text in texts]

    async def _row(self, text: str) -> dict[str, Any]:
        try:
            return {"text": text, "id": await self.id_of(text), "error": None}
        except CachefsError as error:
            return {"text": text, "id": None, "error": str(error)}

    async def id_of(self, text: str) -> str:
        """See `meant`; Glance is asked where what is known has nothing of that name."""
        try:
            return meant(text, self._known())
        except NoEntry:
            await self._ask_glance()
        return meant(text, self._known())
