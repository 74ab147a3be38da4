"""What can fail: one class per failure, with its errno and its operands.

Nothing here formats for a particular border: `fuse` turns errors into errnos, `cli` into one line and an
exit status, `control` into an answer. A failure that several readers wait for is raised anew for each of
them (`again`), because a traceback belongs to one raise.

    CachefsError
    ├── ConfigError            an option is unknown, out of range or contradicts another
    ├── MountError             the mountpoint or /dev/fuse cannot be used
    ├── ListenError            the address of the metrics cannot be listened at
    ├── Refused                the daemon said no to a command
    ├── NamespaceError         a name or an operation the tree does not have
    ├── ScratchFailed          a scratch file in nova/ could not be read or written
    ├── StoreError             the local store cannot be used, or a part of it is not what it should be
    ├── FormatError            an image is refused for what its bytes say
    ├── TraceRefused           a file of boot traces is not what it should be
    └── OriginError            Glance (or Keystone before it) did not give what was asked for
"""

from __future__ import annotations

import errno
import re
from typing import ClassVar, Self

from cachefs.words import printable, size

# Of what a name may mean, so many are named.
CANDIDATES_SHOWN = 5


class CachefsError(Exception):
    """Base of all failures. `errno` is what a reader of the mount gets."""

    errno: ClassVar[int] = errno.EIO
    image: str | None = None  # The one that it is about.

    def again(self) -> Self:
        """The same failure as a new exception, for one more waiter."""
        return type(self)(*self.args)


def word_of(error: BaseException) -> str:
    """A failure as one word, to count it by: `OriginUnavailable` is `origin_unavailable`; what is none of ours
    `unexpected`."""
    if not isinstance(error, CachefsError):
        return "unexpected"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def words_of_origin() -> list[str]:
    """All words that a failure of the origin can have."""
    kinds: list[type[OriginError]] = [OriginError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return sorted({re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in kinds[1:]})


class ConfigError(CachefsError):
    """An option that stops the start. `option` is `section/name`, or a file's path."""

    errno = errno.EINVAL

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(option, reason)
        self.option, self.reason = option, reason

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}"


class MountError(CachefsError):
    """The mountpoint, or FUSE itself, cannot be used."""

    def __init__(self, mountpoint: str, reason: str) -> None:
        super().__init__(mountpoint, reason)
        self.mountpoint, self.reason = mountpoint, reason

    def __str__(self) -> str:
        return f"{self.mountpoint}: {self.reason}"


class ListenError(CachefsError):
    """The address of the metrics cannot be listened at."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"metrics/listen: {self.address}: {self.reason}"


class ControlError(CachefsError):
    """A control request was refused, or no daemon answers at `where`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Refused(CachefsError):
    """What the daemon answered in place of a result: in its own words, for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


# ── The tree ──────────────────────────────────────────────────────────────────────────────────────────


class NamespaceError(CachefsError):
    """An operation that the tree does not have, on `what`."""

    def __init__(self, what: object) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return str(self.what)


class NoEntry(NamespaceError):
    """No such name, or an image that is not active (yet)."""

    errno = errno.ENOENT

    def __str__(self) -> str:
        if isinstance(self.what, str) and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", self.what):
            return (
                f"there is no image {self.what} that is active and that the daemon's account may see "
                f"(openstack image show {self.what}; cachefs images)"
            )
        return str(self.what)


class AmbiguousImage(NamespaceError):
    """`what` may be any of several images, `candidates` as (id, name)."""

    errno = errno.EINVAL

    def __init__(self, what: str, candidates: tuple[tuple[str, str | None], ...]) -> None:
        super().__init__(what)
        self.args = what, candidates
        self.candidates = candidates

    def __str__(self) -> str:
        some = [f"{id_} ({name})" if name else id_ for id_, name in self.candidates[:CANDIDATES_SHOWN]]
        more = len(self.candidates) - len(some)
        words = ", ".join(some) + (f" and {more} more" if more > 0 else "")
        return f"{self.what} may be any of {len(self.candidates)} images: {words}; name one by its id"


class ReadOnly(NamespaceError):
    """Any change outside `nova/`, and in it of an image: the one that somebody opened for writing is `image`."""

    errno = errno.EROFS

    def __init__(self, what: object, image: str | None = None) -> None:
        super().__init__(what)
        self.args = what, image
        self.image = image

    def __str__(self) -> str:
        return f"cannot be changed: {self.what}"


class NotPermitted(NamespaceError):
    """The image is known and may not be opened (deactivated, or this node's account may not read it)."""

    errno = errno.EACCES

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"image {image} {reason}")
        self.args = image, reason
        self.image = image


class ScratchFailed(CachefsError):
    """What the store's filesystem said of a scratch file, `what`. Its errno is `code`."""

    def __init__(self, what: object, error: OSError) -> None:
        super().__init__(what, error)
        self.what, self.code = what, error.errno or errno.EIO
        self.strerror = error.strerror or str(error)

    def __str__(self) -> str:
        what = self.what.decode(errors="backslashreplace") if isinstance(self.what, bytes) else self.what
        return f"scratch file {what}: {self.strerror}"


# ── The store ─────────────────────────────────────────────────────────────────────────────────────────


class StoreError(CachefsError):
    """Base of what the local store can fail with."""


class StoreUnusable(StoreError):
    """The store at `path` cannot be opened at all; `reason` says what to do."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"store {self.path}: {self.reason}"


class StoreLocked(StoreUnusable):
    """Another process has the store open."""


class StoreFormat(StoreUnusable):
    """The store was written by another format of cachefs, or is none."""


class StoreUnreadable(StoreUnusable):
    """The index of the store is lost, or is no index any more: to be set aside."""


class StoreFull(StoreError):
    """There is no room for `wanted` bytes: served, not kept."""

    errno = errno.ENOSPC

    def __init__(self, wanted: int) -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def __str__(self) -> str:
        return f"no room for {self.wanted} bytes"


class PrefetchEnded(StoreError):
    """An image that was asked for is not whole, and not fetched any more; `reason` says why, for people."""

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(image, reason)
        self.image, self.reason = image, reason

    def __str__(self) -> str:
        return f"image {self.image} is not fetched whole: {self.reason}"


class Leased(StoreError):
    """What was to be evicted is not to be; `reasons` says why, for people, and what ends that."""

    errno = errno.EBUSY

    def __init__(self, image: str, reasons: tuple[str, ...]) -> None:
        super().__init__(image, reasons)
        self.image, self.reasons = image, reasons

    @property
    def why(self) -> str:
        return ", ".join(self.reasons)

    def __str__(self) -> str:
        return f"image {self.image} is not evicted: {self.why}"


class PinRefused(StoreError):
    """With this image, the whole sizes of all that is pinned would pass the share of the store that pins may
    claim. Sizes in bytes."""

    errno = errno.ENOSPC

    def __init__(self, image: str, size: int, pinned: int, pinned_max: int) -> None:
        super().__init__(image, size, pinned, pinned_max)
        self.image, self.size, self.pinned, self.pinned_max = image, size, pinned, pinned_max

    def __str__(self) -> str:
        left = size(max(self.pinned_max - self.pinned, 0))
        return (
            f"image {self.image} is not pinned: it has {size(self.size)}, and pins have {left} left of "
            f"{size(self.pinned_max)} ([store] pin_share)"
        )


class RecordCorrupt(StoreError):
    """A record of the index does not carry its own seal, or cannot be decoded."""

    def __init__(self, table: str, key: bytes) -> None:
        super().__init__(table, key)
        self.table, self.key = table, key

    def __str__(self) -> str:
        return f"record {self.key.hex()} of {self.table} is corrupt"


class IndexCorrupt(StoreError):
    """A page of the index's file is not what LMDB could follow without harm. `page`: its number."""

    def __init__(self, page: int, reason: str) -> None:
        super().__init__(page, reason)
        self.page, self.reason = page, reason

    def __str__(self) -> str:
        return f"page {self.page}: {self.reason}"


class Absent(StoreError):
    """A range that was to be read is not wholly in the store. Never reaches a reader of the mount."""

    def __init__(self, view_no: int, offset: int) -> None:
        super().__init__(view_no, offset)
        self.view_no, self.offset = view_no, offset

    def __str__(self) -> str:
        return f"view {self.view_no} is absent at byte {self.offset}"


# ── The formats ───────────────────────────────────────────────────────────────────────────────────────


class FormatError(CachefsError):
    """What an image's bytes say cannot be true, or is not to be followed. `reason` is for people, after "the
    image is refused: ", and holds nothing of the image but numbers."""

    errno = errno.EPERM

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"refused: {self.reason}"


class TraceRefused(CachefsError):
    """A boot trace from elsewhere that nobody could have recorded, or a file that holds none. `reason` is for
    people, in our own words."""

    errno = errno.EINVAL

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"refused: {self.reason}"


# ── The origin ────────────────────────────────────────────────────────────────────────────────────────


# In place of an image, where a question is about all of them.
LISTING = "(all)"


class OriginError(CachefsError):
    """Base of what the origin can fail with. `retries_max`: how many more tries may help within one read, None
    for as many as the configuration says; the first comes no sooner than `pause_s`."""

    retries_max: ClassVar[int | None] = 0
    pause_s: ClassVar[float] = 0.0
    image: str
    requests: str = ""  # The ids of the request that failed, ours and the origin's, as the logs there have them.

    def __init__(self, image: str, detail: str = "") -> None:
        detail = printable(" ".join(detail.split()))  # Words of a server's, which may be anybody's.
        super().__init__(image, detail)
        self.image, self.detail = image, detail

    def again(self) -> Self:
        """See `CachefsError.again`."""
        more = super().again()
        more.requests = self.requests
        return more

    def __str__(self) -> str:
        about = "" if self.image == LISTING else f"image {self.image}"
        said = ": ".join(filter(None, (type(self).__name__, about, self.detail)))
        return said + (f" ({self.requests})" if self.requests else "")


class ImageGone(OriginError):
    """An authoritative 404: the only answer that means that an image has ended."""

    errno = errno.ENOENT


class ImageForbidden(OriginError):
    """403: deactivated, or not for this account."""

    errno = errno.EACCES


class OriginUnauthorized(OriginError):
    """The credentials were refused, also after the token was renewed. One more try a second later can help:
    Keystone counts whole seconds, so a token that is issued in the second of a revocation is born invalid."""

    retries_max = 1
    pause_s = 1.0


class TokenRefused(OriginUnauthorized):
    """Keystone gave a token, and Glance does not take it."""


class OriginUnavailable(OriginError):
    """No connection, a time-out, a 5xx, or a body cut short: the origin is unwell, the image is not."""

    retries_max: ClassVar[int | None] = None


class OriginBusy(OriginUnavailable):
    """429 or 503. `retry_after` is in seconds; 0 when the origin named none."""

    def __init__(self, image: str, detail: str = "", retry_after: float = 0.0) -> None:
        super().__init__(image, detail)
        self.args = (image, detail, retry_after)
        self.retry_after = retry_after


class OriginThrottled(OriginBusy):
    """429: it is well, and asks for fewer requests."""


class NotReached(OriginUnavailable):
    """There was no connection, so nothing that was asked for can be to blame."""


class OriginAway(OriginUnavailable):
    """Nobody was asked: all endpoints failed before, or the identity service, and are left alone for now."""


class IdentityUnavailable(OriginUnavailable):
    """Keystone gave no token, and not because it refused one: that says nothing of Glance."""


class BytesMissing(OriginUnavailable):
    """Glance has the image, and does not find its bytes."""


class OriginLied(OriginError):
    """An answer that contradicts the request or the metadata (Content-Range, length, size): never data."""

    retries_max: ClassVar[int | None] = None


class OriginChanged(OriginError):
    """The block at `offset` came otherwise than it was when all of the image had Glance's hash: never data."""

    def __init__(self, image: str, offset: int) -> None:
        super().__init__(image, f"what comes for offset {offset} is not what was verified")
        self.args = (image, offset)
        self.offset = offset


class RangeRefused(OriginError):
    """400 "Getting images randomly…": this image comes as one stream from its first byte, or not at all."""


class ImageRefused(OriginError):
    """The disk inside is not served: `detail` says why, in our own words. Opening it gives EPERM, reading EIO."""

    errno = errno.EPERM

    def __str__(self) -> str:
        return f"image {self.image} is refused: {self.detail}"


class ImageCondemned(OriginError):
    """The image's bytes are not those that Glance promises: `detail` says what differs. None of it is served."""

    def __str__(self) -> str:
        return f"image {self.image} is condemned: {self.detail}"


class ReadDeadline(OriginError):
    """A reader waited for `read_deadline` and its bytes did not come."""
