"""What a name in `nova/` is: an image, under the name by which Nova looks for its base, or a scratch file. Rule: a
scratch file stands before the image of its name, because Nova wrote its bytes and has looked at them; no byte of
either is touched here.

The file of an image is the one that `raw/` (or `images/`) has, under another name, and can always be looked up. It
is listed when it was used and something of it is here: open, touched, or named by an instance's disk. Nova looks
at all that is listed, and removes what no instance uses; what was only fetched ahead is none of its business. That
it removes an image is a hint: what nobody needs is dropped, and the name not listed until it is used again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from typing import TypeVar

import trio

from cachefs import logs
from cachefs.catalog import Catalog, Image
from cachefs.errors import ImageForbidden, Leased, NoEntry, OriginUnavailable, ReadOnly, ScratchFailed
from cachefs.guest_disks import GuestDisks
from cachefs.namespace import Node, ScratchNode, Slot, base_name
from cachefs.scratch import Owner, Scratch
from cachefs.store.content import Store
from cachefs.store.format import ViewKind

log = logs.get(__name__)

Listed = TypeVar("Listed")

# The kernel looks up one name of a folder at a time: who is waited for holds up all others.
INSPECTION_WAIT_S = 20.0
# It asks again for a name that there is none of, after so long: an image may be made at any moment.
NEGATIVE_TTL_S = 1.0


class NovaFolder:
    """`kind`: the folder whose file an image's name means, RAW or ORIGINAL. All on the loop."""

    def __init__(
        self,
        scratch: Scratch,
        kind: ViewKind,
        catalog: Catalog,
        disks: GuestDisks,
        store: Store,
        owner: Owner,
    ) -> None:
        self.scratch, self.kind, self.owner = scratch, kind, owner
        self._catalog, self._disks, self._store = catalog, disks, store
        self.open_images: Callable[[], Collection[str]] = lambda: ()
        self.used_images: Callable[[], Collection[str]] = (
            lambda: ()
        )  # Those that were touched, and what disks name.
        self.evict: Callable[[str], object] = lambda image: None  # Raises Leased.
        self._removed: set[str] = set()

    # ── names ──

    async def lookup(self, name: bytes) -> Node | ScratchNode:
        """Raises NoEntry, and what `GuestDisks.inspect` raises."""
        number = self.scratch.number_of(name)
        if number is not None:
            return ScratchNode(number)
        image = await self._catalog.lookup_base(name)
        try:
            with trio.fail_after(INSPECTION_WAIT_S):
                disk = await self._disks.inspect(image)
            is_refused = disk.refused is not None
        except trio.TooSlowError:
            raise OriginUnavailable(image.id, f"not inspected within {INSPECTION_WAIT_S} s") from None
        except ImageForbidden:
            is_refused = True
        number = self.scratch.number_of(name)
        if number is not None:  # Meanwhile somebody made one.
            return ScratchNode(number)
        # What is refused is there and cannot be opened. Else Nova would take it for missing, and fetch it.
        is_raw = self.kind is ViewKind.RAW or is_refused
        return Node(Slot.RAW if is_raw else Slot.ORIGINAL, image.number)

    def entries(self) -> list[tuple[bytes, Node | ScratchNode]]:
        """What is listed. Glance is not asked."""
        files: list[tuple[bytes, Node | ScratchNode]] = [
            (name, ScratchNode(number)) for name, number in self.scratch.names()
        ]
        used = {view.record.image for view in self._store.views() if view.cached}.intersection(self.used_images())
        known = (self._catalog.known(image) for image in used.union(self.open_images()) - self._removed)
        images = sorted((image for image in known if image is not None), key=lambda image: image.number)
        return files + [
            (base_name(image.id), Node(self.slot_of(image), image.number))
            for image in images
            if self.scratch.number_of(base_name(image.id)) is None
        ]

    def still(self, name: bytes, listed: Listed) -> Listed | ScratchNode | None:
        """What a name means that was `listed` a while ago; None where it is gone."""
        number = self.scratch.number_of(name)
        if number is not None:
            return ScratchNode(number)
        return None if isinstance(listed, ScratchNode) else listed

    def slot_of(self, image: Image) -> Slot:
        """Which file of it its name means."""
        is_refused = image.disk is not None and image.disk.refused is not None
        return Slot.RAW if self.kind is ViewKind.RAW or is_refused else Slot.ORIGINAL

    def used(self, image: str) -> None:
        """Somebody opened or touched it: it is listed again."""
        self._removed.discard(image)

    @property
    def removed(self) -> int:
        """How many images were removed and not used since."""
        return len(self._removed)

    # ── changes ──

    async def unlink(self, name: bytes) -> None:
        """Of a scratch file, which is gone then; of an image, which is not. Raises NoEntry, ScratchFailed."""
        if self.scratch.number_of(name) is not None:
            await self.scratch.unlink(name)
            return
        image = self._catalog.id_of_base(name)
        if image is None:
            raise NoEntry(name)
        self._removed.add(image)
        try:
            self.evict(image)
        except Leased as error:
            log.info("removed from nova/, and kept: %s", error.why, image=image)
        else:
            log.info("removed from nova/: what is cached of it is dropped, unless a disk names it", image=image)

    async def rename(self, old: bytes, new: bytes, *, may_replace: bool) -> None:
        """Of a scratch file; over an image's name it stands before the image. Raises NoEntry, ReadOnly for an
        image, ScratchFailed."""
        if self.scratch.number_of(old) is None:
            if self._catalog.id_of_base(old) is None:
                raise NoEntry(old)
            raise ReadOnly("the name of an image in nova/")
        if not may_replace and self._catalog.id_of_base(new) is not None:
            raise ScratchFailed(new, OSError(errno.EEXIST, os.strerror(errno.EEXIST)))
        await self.scratch.rename(old, new, may_replace=may_replace)
