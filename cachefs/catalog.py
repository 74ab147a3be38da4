"""Which images there are, as far as this node knows. Rule: only an authoritative 404, or the status `deleted`,
ends an image; whatever else Glance says or fails to say, known images stay known.

An image that ended is let go of when nothing here leases it any more. Until then it is GONE: what an instance
stands on is still found by its id and opened (where only open handles lease it, by nobody else).

What is known is remembered in the store, so a node starts, lists and opens without Glance. Glance is asked
rarely: one listing per `listing_ttl_s` however often folders are listed, one question per unknown image and
`negative_ttl_s`, and one per `listing_ttl_s` for an image that is opened. Concurrent askers share one answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.errors import (
    LISTING,
    ImageForbidden,
    ImageGone,
    NoEntry,
    NotPermitted,
    OriginError,
    OriginUnavailable,
)
from cachefs.namespace import base_name, image_id, is_base_name, unique_links
from cachefs.plan import metadata
from cachefs.sources import Registry
from cachefs.store.content import Store

log = logs.get(__name__)

# How long somebody waits for Glance to say what is not needed: a listing, or whether a known image is still
# active. After that, what is known is the answer, and the question goes on in the background.
LISTING_WAIT_S = 5.0
OPEN_WAIT_S = 2.0
UNKNOWN_WAIT_S = 20.0
FRESH_WAIT_S = 300.0
# Glance did not answer: known images are not asked for again for so long.
UNWELL_S = 10.0
NEGATIVES_MAX = 10_000
# Of a listing, between two checkpoints: some 1 ms.
_TAKEN_AT_ONCE = 20

SIZE_MAX = (1 << 63) - 1  # What stat(2) can say.
SHOWN = ("active", "deactivated")
# The status of an image that Glance has no more, and that is still leased here.
GONE = "gone"
# So often it is looked whether it still is.
LOOK_S = 60.0
# What is leased and was not listed is asked for by itself: of each listing so many, each so often.
CONFIRMED_MAX, CONFIRM_EVERY_S = 50, 600.0
# For names of Nova's that are unknown there is a listing no sooner than so many seconds after the last one, or so
# many times as long as that took.
BASES_EVERY_S, BASES_SHARE = 1.0, 3.0


@dataclass(frozen=True, slots=True)
class Disk:
    """What was found of the disk inside an image: its `size` in bytes and `format`, or why it is `refused`.
    `seen`: its own first bytes were looked at too."""

    size: int | None = None
    format: str | None = None
    refused: str | None = None
    seen: bool = False
    verified: bool = False  # All of it was made of the file, or compared with it, and the file has Glance's hash.


@dataclass(frozen=True, slots=True)
class Image:
    """What is known of an image. `size` in bytes; `updated_s` and `created_s` in seconds since the epoch. `number`
    is this store's own, given once. Of tags and properties, what `plan.metadata` keeps."""

    id: str
    number: int
    size: int
    status: str
    name: str | None = None
    disk_format: str | None = None
    container_format: str | None = None
    updated_s: int = 0
    owner: str | None = None
    visibility: str | None = None
    checksum: str | None = None
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    disk: Disk | None = None  # None: nobody has looked yet.
    verified: bool = False  # All of it was compared with Glance's hash.
    condemned: str | None = None  # It was, and is not that.
    origin_changed: str | None = None  # It was that once, and Glance gave something else later.
    created_s: int = 0
    hidden: bool = False
    tags: tuple[str, ...] = ()
    properties: tuple[tuple[str, str], ...] = ()

    def may_be(self, other: Image) -> bool:
        """Whether `other` can be the same image, whose bytes never change. A hash may come late, not change."""
        return self.size == other.size and all(
            None in (mine, theirs) or mine == theirs
            for mine, theirs in ((self.checksum, other.checksum), (self.os_hash_value, other.os_hash_value))
        )

    def surely_is(self, other: Image) -> bool:
        """Whether a hash says that they are the same: an id may be given anew to other bytes of the same size."""
        said = any(
            mine is not None and mine == theirs
            for mine, theirs in ((self.checksum, other.checksum), (self.os_hash_value, other.os_hash_value))
        )
        return said and self.may_be(other)

    def with_what_is_known(self, known: Image) -> Image:
        """This, and what was known of its bytes: an answer that names no hash takes none back, and the disk inside
        was inspected for what the image was said to be then."""
        return replace(
            self,
            disk=known.disk if self.disk_format == known.disk_format else None,
            verified=known.verified,
            condemned=known.condemned,
            origin_changed=known.origin_changed,
            checksum=self.checksum or known.checksum,
            os_hash_algo=self.os_hash_algo or known.os_hash_algo,
            os_hash_value=self.os_hash_value or known.os_hash_value,
        )

    @classmethod
    def from_fields(cls, image: str, stored: dict[str, Any]) -> Image:
        known = {f.name for f in fields(cls)}
        disk = None
        if isinstance(stored.get("disk"), dict):
            of_disk = {f.name for f in fields(Disk)}
            disk = Disk(**{k: v for k, v in stored["disk"].items() if k in of_disk})
        made: dict[str, Any] = {**{k: v for k, v in stored.items() if k in known}, "id": image, "disk": disk}
        # Bounded again: what a later cachefs kept may be more.
        made["tags"], made["properties"] = metadata.tags_of(stored), metadata.properties_of(_of(stored))
        return cls(**made)

    def to_fields(self) -> dict[str, Any]:
        """What the store keeps, as JSON has it: without what says nothing, which many images have."""
        stored = asdict(self) | {"tags": list(self.tags), "properties": dict(self.properties)}
        del stored["id"]
        return {k: v for k, v in stored.items() if k not in _LATER or v}


# Fields that came after the others, or that few images have: left out where they say nothing.
_LATER = ("created_s", "hidden", "tags", "properties", "origin_changed")


def _of(stored: dict[str, Any]) -> dict[str, Any]:
    properties = stored.get("properties")
    return properties if isinstance(properties, dict) else {}


def from_glance(answer: dict[str, Any], number: int) -> Image | None:
    """An image from Glance's own fields; None while it has no bytes that could be read, or cannot be a file."""
    size = answer.get("size")
    id_ = image_id(str(answer.get("id")).encode(errors="replace"))
    if id_ is None or answer.get("status") not in SHOWN or not isinstance(size, int) or not 0 <= size <= SIZE_MAX:
        return None
    texts: dict[str, Any] = {
        key: answer[key] if isinstance(answer.get(key), str) else None
        for key in (
            "name", "disk_format", "container_format", "owner", "visibility", "checksum", "os_hash_algo",
            "os_hash_value",
        )
    }  # fmt: skip
    return Image(
        id=id_,
        number=number,
        size=size,
        status=str(answer["status"]),
        updated_s=metadata.epoch_s(answer.get("updated_at")),
        created_s=metadata.epoch_s(answer.get("created_at")),
        hidden=answer.get("os_hidden") is True,
        tags=metadata.tags_of(answer),
        properties=metadata.properties_of(answer),
        **texts,
    )


class Claims(Protocol):
    """Who needs an image here, by its id."""

    def leased(self, image: str) -> bool:
        """Whether anything does, if only an open handle."""
        ...

    def keeps(self, image: str) -> bool:
        """Whether something does that outlives handles: it may be opened though Glance has it no more."""
        ...

    def started(self, image: str) -> bool:
        """Whether an instance's disk names it and all of it is here: it may be opened though it is deactivated."""
        ...


class NoClaims:
    """Nobody needs any."""

    def leased(self, image: str) -> bool:
        return False

    keeps = started = leased


class Catalog:
    """See the module. `run` is its task; everything else is called on the loop."""

    def __init__(
        self, registry: Registry, store: Store, listing_ttl_s: float = 60.0, negative_ttl_s: float = 10.0
    ) -> None:
        self._registry, self._store = registry, store
        self._listing_ttl_s, self._negative_ttl_s = listing_ttl_s, negative_ttl_s
        self._images: dict[str, Image] = {}
        self._by_number: dict[int, Image] = {}
        self._bases: dict[bytes, str] = {}
        self._links: dict[bytes, int] | None = None
        self._checked_s: dict[str, float] = {}
        self._unknown_until_s: dict[str, float] = {}
        self._listed_s = self._unwell_until_s = -float("inf")
        self._listing_took_s = 0.0
        self._listed: set[str] | None = None
        self._asking: dict[str, _Question] = {}
        self._newer: set[str] = set()  # Answered for themselves while a listing was under way.
        self._nursery: trio.Nursery | None = None
        self._confirmed_s: dict[str, float] = {}
        self.claims: Claims = NoClaims()
        self.on_gone: Callable[[Image], None] = lambda image: None  # Glance has it no more. It may be leased.
        self.on_let_go: Callable[[Image], None] = lambda image: None  # Nobody can open it any more.
        self.on_condemned: Callable[[Image], None] = lambda image: None
        self.last_error: str | None = None
        self.listings = self.questions = 0
        for image, stored in store.images.items():
            self._know(Image.from_fields(image, stored))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                self._let_go_of_unleased()
                await trio.sleep(LOOK_S)

    # ── what is known, without asking ──

    def by_number(self, number: int) -> Image | None:
        return self._by_number.get(number)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def is_well(self) -> bool:
        """Whether Glance answered when it was last asked."""
        return self.last_error is None

    @property
    def links(self) -> dict[bytes, int]:
        """`by-name`: name to image number."""
        if self._links is None:
            self._links = unique_links((image.name, image.number) for image in self.shown())
        return self._links

    @property
    def listing_age_s(self) -> float | None:
        """How long ago Glance last said all that there is; None where it has not since the start."""
        return None if self._listed is None else trio.current_time() - self._listed_s

    def namesakes(self) -> dict[str, list[str]]:
        """The names that several shown images have, which is why `by-name` has none of them; with their ids."""
        found: dict[str, list[str]] = {}
        for image in self.shown():
            if image.name:
                found.setdefault(image.name, []).append(image.id)
        return {name: ids for name, ids in found.items() if len(ids) > 1}

    def shown(self) -> list[Image]:
        """What a listing shows, in the order of the numbers: what Glance last listed, or all that is known
        while it has not answered yet."""
        listed = self._listed
        found = (image for image in self._images.values() if image.status != GONE)
        return sorted(
            (image for image in found if listed is None or image.id in listed), key=lambda image: image.number
        )

    def gone(self) -> list[Image]:
        """What Glance has no more and is leased here, in the order of the numbers."""
        found = (image for image in self._images.values() if image.status == GONE)
        return sorted(found, key=lambda image: image.number)

    def known(self, image: str) -> Image | None:
        """The image, if it is known."""
        return self._images.get(image)

    def learn_disk(self, image: str, disk: Disk) -> None:
        """Remembers what was found of the disk inside an image."""
        known = self._images.get(image)
        if known is not None:
            self._keep(replace(known, disk=disk))

    def learn_verified(self, image: str, condemned: str | None) -> None:
        """Remembers that all of an image was compared with its hash; `condemned`: what was wrong, if it was."""
        known = self._images.get(image)
        if known is not None:
            self._keep(replace(known, verified=condemned is None, condemned=condemned, origin_changed=None))
            if condemned is not None:
                self.on_condemned(known)

    def learn_changed(self, image: str, offset: int) -> None:
        """Remembers that other bytes came than were verified; nobody got them. What is here is still right."""
        known = self._images.get(image)
        if known is not None and known.origin_changed is None:
            said = f"what Glance gives for offset {offset} is not what was verified"
            self._keep(replace(known, origin_changed=said))

    def learn_loss(self, image: str) -> None:
        """Something of the image is not here any more: what comes in its place was not compared."""
        known = self._images.get(image)
        if known is not None and known.verified:
            self._keep(replace(known, verified=False))

    def id_of_base(self, name: bytes) -> str | None:
        """The image whose file Nova calls so, if it is known. From any thread."""
        return self._bases.get(name)

    # ── asking ──

    async def lookup(self, image: str) -> Image:
        """The image, asked for only when it is not known. Raises NoEntry, or OriginError when Glance cannot
        say whether there is one."""
        found = self._there(image)
        if found is not None:
            return found
        if trio.current_time() < self._unknown_until_s.get(image, 0.0):
            raise NoEntry(image)
        await self._ask(image, lambda: self._ask_one(image), UNKNOWN_WAIT_S)
        found = self._there(image)
        if found is None:
            raise NoEntry(image)
        return found

    def _there(self, image: str) -> Image | None:
        """The image, if it is known, and not only to those who have it open."""
        found = self._images.get(image)
        if found is None or found.status != GONE or self.claims.keeps(image):
            return found
        if not self.claims.leased(image):
            self._let_go(found)
        return None

    async def lookup_base(self, name: bytes) -> Image:
        """The image whose file Nova calls so. Glance cannot be asked for a SHA-1: an unknown one has all images
        listed, once in `negative_ttl_s`, and however many names are asked for, so seldom that listings take no
        more than a quarter of the time. Raises NoEntry, also when Glance does not say: who asks is to go on."""
        if name not in self._bases and is_base_name(name):
            await self._look_for_base(name.decode())
        image = self._bases.get(name)
        found = self._there(image) if image is not None else None
        if found is None:
            raise NoEntry(name)
        return found

    async def _look_for_base(self, name: str) -> None:
        now = trio.current_time()
        due_s = self._listed_s + max(BASES_EVERY_S, BASES_SHARE * self._listing_took_s)
        if now < max(self._unknown_until_s.get(name, 0.0), self._unwell_until_s):
            return
        if now >= due_s or "" in self._asking:
            try:
                await self._ask("", self._ask_all, LISTING_WAIT_S)
            except OriginError as error:
                log.debug("taken for unknown: %s", error)
            self._remember_unknown(name)

    async def openable(self, image: str) -> Image:
        """The image, if it may be opened now: looked at anew when that was long ago and Glance is well. Raises
        NoEntry when it is gone, unless a lease keeps it; NotPermitted when it is deactivated, unless an instance
        stands on it."""
        now = trio.current_time()
        stale = now >= self._checked_s.get(image, -float("inf")) + self._listing_ttl_s
        if image in self._images and stale and now >= self._unwell_until_s:
            try:
                await self._ask(image, lambda: self._ask_one(image), OPEN_WAIT_S)
            except OriginError as error:
                log.debug("taken as known: %s", error, image=image)
        found = await self.lookup(image)
        if not self.may_be_opened(found):
            raise NotPermitted(image, f"is {found.status}")
        return found

    def may_be_opened(self, image: Image) -> bool:
        """By its status, as it was said last."""
        return image.status in ("active", GONE) or self.claims.started(image.id)

    async def listing(self) -> list[Image]:
        """All images to show, from Glance when the last listing is older than the TTL and it answers soon."""
        now = trio.current_time()
        if now >= self._listed_s + self._listing_ttl_s and now >= self._unwell_until_s:
            try:
                await self._ask("", self._ask_all, LISTING_WAIT_S)
            except OriginError as error:
                log.debug("listed as known: %s", error)
        return self.shown()

    async def fresh_listing(self) -> list[Image]:
        """The same for who would rather know nothing than something old. Raises OriginError when Glance does not
        answer in `FRESH_WAIT_S`."""
        if trio.current_time() >= self._listed_s + self._listing_ttl_s:
            await self._ask("", self._ask_all, FRESH_WAIT_S)
        return self.shown()

    async def ask_anew(self) -> None:
        """Has Glance say what there is, however lately it did. Raises OriginError."""
        await self._ask("", self._ask_all, FRESH_WAIT_S)

    def origin_is_well(self) -> None:
        """Somebody answers again: known images may be asked for at once."""
        self._unwell_until_s = -float("inf")

    async def _ask(self, key: str, ask: Callable[[], Awaitable[None]], wait_s: float) -> None:
        """Waits for the answer to a question that is put once however many wait for it."""
        assert self._nursery is not None, "the catalog is not running"
        question = self._asking.get(key)
        if question is None:
            question = self._asking[key] = _Question()
            self._nursery.start_soon(self._put, key, question, ask)
        with trio.move_on_after(wait_s):
            await question.answered.wait()
            if question.error is not None:
                raise question.error.again()
            return
        self._unwell_until_s = trio.current_time() + UNWELL_S
        raise OriginUnavailable(key or LISTING, f"no answer within {wait_s} s")

    async def _put(self, key: str, question: _Question, ask: Callable[[], Awaitable[None]]) -> None:
        try:
            await ask()
            self.last_error = None
        except OriginError as error:
            question.error = error
            if isinstance(error, ImageForbidden) and key:
                return  # That is about one image; Glance is well.
            self._unwell_until_s = trio.current_time() + UNWELL_S
            if self.last_error is None:
                log.warning("Glance cannot say what there is; known images stay: %s", error)
            self.last_error = str(error)
        except Exception:  # A bug in one question is no reason to take the mount down.
            log.exception("unexpected failure of a question to Glance")
            question.error = OriginUnavailable(key or LISTING, "unexpected failure of the question")
        finally:
            del self._asking[key]
            question.answered.set()

    async def _ask_one(self, image: str) -> None:
        self.questions += 1
        try:
            answer = await self._registry.image(image)
        except ImageGone:
            self._gone(image)
        else:
            self._unwell_until_s = -float("inf")
            self._take(answer)
        if "" in self._asking:
            self._newer.add(image)

    async def _ask_all(self) -> None:
        self.listings += 1
        self._newer.clear()
        began_s = trio.current_time()
        answers = await self._registry.images()
        self._unwell_until_s = -float("inf")
        answered_s = trio.current_time()
        self._listing_took_s = answered_s - began_s
        listed = set()
        for at, answer in enumerate(answers):
            if at % _TAKEN_AT_ONCE == _TAKEN_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
            if str(answer.get("id")) not in self._newer:
                image = self._take(answer)
                if image is not None:
                    listed.add(image.id)
        listed |= self._newer & set(self._images)
        # What is known and was not listed may have gone, or be hidden from this account, or the listing lacks
        # something. Each is asked for by itself: what is leased soon, the rest when it is opened.
        unlisted = set(self._images) - listed
        for image_id_ in unlisted:
            self._checked_s.pop(image_id_, None)
        self._listed, self._listed_s = listed, answered_s
        self._links = None
        if unlisted and self._nursery is not None:
            self._nursery.start_soon(self._confirm, unlisted)

    async def _confirm(self, unlisted: set[str]) -> None:
        """Asks for some of those that a listing lacks and that are leased: that one of these ended is to be known
        before it is opened again. Others are not looked for: they may come back, and are cached."""
        before_s, known = trio.current_time() - CONFIRM_EVERY_S, self._confirmed_s
        self._confirmed_s = {image: known[image] for image in unlisted & known.keys()}
        due: list[tuple[float, str]] = []
        for at, image in enumerate(unlisted):
            if at % _TAKEN_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            last_s = self._confirmed_s.get(image, -float("inf"))
            if last_s <= before_s and self.claims.leased(image):
                due.append((last_s, image))
        await self._ask_each([image for _, image in sorted(due)[:CONFIRMED_MAX]])

    async def _ask_each(self, images: list[str]) -> None:
        for image in images:
            try:
                await self._ask(image, partial(self._ask_one, image), UNKNOWN_WAIT_S)
            except ImageForbidden:
                pass  # It is there.
            except OriginError:
                return  # Another time.
            self._confirmed_s[image] = trio.current_time()

    # ── learning ──

    def _take(self, answer: dict[str, Any]) -> Image | None:
        id_ = str(answer.get("id"))
        known = self._images.get(id_)
        if str(answer.get("status")) in ("deleted", "pending_delete"):
            self._gone(id_)
            return None
        number = known.number if known is not None else 0
        image = from_glance(answer, number)
        if image is None:
            self._remember_unknown(id_)
            return None
        if known is not None and known.status == GONE and not known.surely_is(image):
            if self.claims.keeps(id_):
                log.error("is said to be there again, and no hash says that it is the same", image=id_)
                return known
            self._let_go(known)  # Who has it open reads on, and its id means another one from now on.
            known, image = None, replace(image, number=0)
            number = 0
        if known is not None:
            if not known.may_be(image):
                log.error("is said to have other bytes than it had: not believed", image=id_)
                return known
            if known.status == GONE:
                log.info("Glance has it again", image=id_)
            image = image.with_what_is_known(known)
        if number == 0:
            image = replace(image, number=self._store.new_image_number())
        if image == known:
            image = known  # The same object: what others found out of it stands.
            self._know(known)
        else:
            self._keep(image)
        self._checked_s[id_] = trio.current_time()
        self._unknown_until_s.pop(id_, None)
        return image

    def _keep(self, image: Image) -> None:
        self._know(image)
        self._store.put_image(image.id, image.to_fields())

    def _know(self, image: Image) -> None:
        if self._images.get(image.id) != image:
            self._links = None
        if image.id not in self._images:
            self._bases[base_name(image.id)] = image.id
        self._images[image.id] = self._by_number[image.number] = image
        if self._listed is not None:
            self._listed.add(image.id)

    def ended(self, image: str) -> None:
        """Glance said that there is no such image, to somebody who asked for its bytes."""
        self._gone(image)
        if "" in self._asking:
            self._newer.add(image)

    def _gone(self, image: str) -> None:
        self._remember_unknown(image)
        known = self._images.get(image)
        if known is None:
            return
        leased = self.claims.leased(image)
        if known.status != GONE:
            log.info("Glance has it no more%s", ": kept while it is leased" if leased else "", image=image)
        ended = replace(known, status=GONE)
        if leased:
            self._keep(ended)
            self._links = None
            self._checked_s[image] = trio.current_time()
        else:
            self._let_go(ended)
        if known.status != GONE:
            self.on_gone(ended)

    def _let_go_of_unleased(self) -> None:
        for image in self.gone():
            if not self.claims.leased(image.id):
                self._let_go(image)

    def _let_go(self, image: Image) -> None:
        del self._images[image.id], self._by_number[image.number], self._bases[base_name(image.id)]
        self._links = None
        self._store.drop_image(image.id)
        self._store.end_views(image.id)
        self.on_let_go(image)

    def _remember_unknown(self, image: str) -> None:
        if len(self._unknown_until_s) >= NEGATIVES_MAX:
            self._unknown_until_s.clear()
        self._unknown_until_s[image] = trio.current_time() + self._negative_ttl_s


class _Question:
    """One question to Glance, and everybody who waits for its answer."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.error: OriginError | None = None
