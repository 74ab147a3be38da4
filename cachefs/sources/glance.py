"""Glance: images' bytes by ranges or as one stream, and what there is. The only importer of glanceclient, and
with `auth` beside it of keystoneauth1. Rule: an answer that is not exactly what was asked for is an error,
never data.

Bytes go over keystoneauth's session, because glanceclient cannot send a Range (it percent-encodes the `=`).
Both block, so each call runs in a thread of a bounded pool; a thread hands on what it received in one hop to
the loop per piece. Which endpoint is asked, and whether any, is for `endpoints`.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import glanceclient.exc
import requests
import trio
import urllib3
from glanceclient.v2.client import Client
from glanceclient.v2.images import Controller
from keystoneauth1 import exceptions as ksa
from keystoneauth1.session import Session

from cachefs.errors import (
    LISTING,
    BytesMissing,
    IdentityUnavailable,
    ImageForbidden,
    ImageGone,
    NotReached,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginThrottled,
    OriginUnauthorized,
    OriginUnavailable,
    RangeRefused,
    TokenRefused,
)
from cachefs.plan.extents import BLOCK, Extent
from cachefs.sources import Sink, Timing
from cachefs.sources.auth import AuthOptions
from cachefs.sources.body import Body
from cachefs.sources.endpoints import Endpoints, Progress
from cachefs.sources.reasons import in_words
from cachefs.sources.request_ids import identified

T = TypeVar("T")

# Handing on costs the loop some 50 us and every other thread Python's lock, so it is done when somebody waits, or
# when nothing more comes for a moment, and otherwise as seldom as this: who comes next finds most of it there.
HAND_ON_S, MOMENT_S = 0.005, 0.001
# Glance's own bound on a page of a listing.
LISTING_PAGE = 1000
RETRY_AFTER_MAX_S = 30.0
METADATA_CALLS_MAX = 4
# What Glance says that an image's bytes are; a page of a proxy says something else.
BYTES_TYPE = "application/octet-stream"

_TAGS = re.compile(r"<[^>]*>|\s+")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")


class Glance:
    """A Source and a Registry. All its methods are called on the loop. `endpoints` has a task to be run.

    `on_gone` is told of each image that Glance says there is none of, while its bytes are asked for."""

    def __init__(
        self,
        auth: AuthOptions,
        *,
        session: Session | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._auth = auth
        self._session = auth.session() if session is None else session
        urls: tuple[str | None, ...] = auth.endpoints or (None,)
        self.endpoints = Endpoints(urls, auth.connections, self._probe, self._renew, clock=clock)
        self.on_gone: Callable[[str], None] = lambda image: None
        self._clock = clock
        self._renewing = threading.Lock()
        self._data_threads = trio.CapacityLimiter(auth.connections)
        self._metadata_threads = trio.CapacityLimiter(METADATA_CALLS_MAX)
        # Others' questions may wait for an endpoint that does not answer; a probe must not wait for them.
        self._probe_threads = trio.CapacityLimiter(len(urls) + 1)

    # ── bytes ──

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        """See `Source.fetch`."""
        return await self._bytes(image, size, extent, True, sink)

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        """See `Source.stream`."""
        return await self._bytes(image, size, Extent(0, size), False, sink)

    async def _bytes(self, image: str, size: int, extent: Extent, ranged: bool, sink: Sink) -> Timing:
        progress = Progress()
        counted = _Counted(sink, extent.length, progress)

        async def ask(endpoint: str | None) -> Timing:
            # A cancelled flight leaves its thread behind, which ends at its next hop or at the read time-out.
            return await trio.to_thread.run_sync(
                identified,
                partial(self._receive, image, size, extent, ranged, counted, endpoint),
                limiter=self._data_threads,
                abandon_on_cancel=True,
            )

        try:
            return await self.endpoints.ask(image, ask, progress)
        except ImageGone:
            self.on_gone(image)
            raise

    def _receive(
        self, image: str, size: int, extent: Extent, ranged: bool, sink: Sink, endpoint: str | None
    ) -> Timing:
        began_s = self._clock()
        headers = {"Accept": BYTES_TYPE, "Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = f"bytes={extent.start}-{extent.end - 1}"
        with self._answer(image, endpoint, f"/v2/images/{image}/file", headers) as answer:
            self._check(image, size, extent, ranged, answer)
            first_s = self._pass_on(image, extent.length, Body(answer.raw), sink)
        return Timing(first_s - began_s, self._clock() - first_s)

    @staticmethod
    def _check(image: str, size: int, extent: Extent, ranged: bool, answer: requests.Response) -> None:
        """Raises unless the answer is `extent` of an image of `size` bytes."""
        length = answer.headers.get("Content-Length")
        kind = answer.headers.get("Content-Type", "" if length is None else BYTES_TYPE)
        if kind.partition(";")[0].strip().lower() != BYTES_TYPE and answer.status_code in (200, 206):
            raise OriginUnavailable(image, f"no Glance answers there: {kind or 'something'} came for bytes")
        if ranged and answer.status_code == 200 and length in (None, str(size)):
            raise RangeRefused(image, "the whole image came in answer to a range")
        if answer.status_code != (206 if ranged else 200):
            raise OriginLied(image, f"status {answer.status_code} in answer to a read")
        if ranged:
            found = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
            if not found or tuple(map(int, found.groups())) != (extent.start, extent.end - 1, size):
                raise OriginLied(
                    image,
                    f"asked for bytes {extent.start}-{extent.end - 1}/{size}, "
                    f"got Content-Range {answer.headers.get('Content-Range')!r}",
                )
        if length is not None and length != str(extent.length):
            raise OriginLied(image, f"Content-Length {length}, {extent.length} bytes are due")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OriginLied(image, f"the body is encoded: {answer.headers['Content-Encoding']}")

    def _pass_on(self, image: str, length: int, body: Body, sink: Sink) -> float:
        """Gives the `length` bytes of the body to `sink`; returns when the first came, by the clock. A body that
        brings less than a block in the time in which it may bring nothing would keep readers waiting for ever."""

        def hand_on(n: int) -> memoryview | None:
            sink.arrived(n)
            return sink.room_now()

        room: memoryview = trio.from_thread.run(sink.room)
        first_s = handed_s = waited_s = 0.0
        at = ready = came = 0
        while at < length:
            asked_s = self._clock()
            n = body.read_into(room[ready : ready + length - at])
            now_s = self._clock()
            first_s = first_s or now_s
            if not n:
                raise OriginUnavailable(image, f"the body ended {length - at} bytes early")
            ready += n
            at += n
            came, waited_s = came + n, waited_s + now_s - asked_s
            if came >= BLOCK:
                came, waited_s = 0, 0.0
            elif waited_s > self._auth.read_timeout and at < length:
                raise OriginUnavailable(image, f"only {came} bytes came in {waited_s:.0f} s")
            due = now_s >= handed_s + HAND_ON_S or sink.awaited(ready)
            if due or at == length or ready == len(room) or not body.has_more_within(MOMENT_S):
                more = trio.from_thread.run_sync(hand_on, ready)
                ready, handed_s = 0, self._clock()
                if at < length:
                    room = more if more is not None else trio.from_thread.run(sink.room)
        if not body.is_at_end():
            raise OriginLied(image, "the body is longer than what was asked for")
        return first_s

    # ── requests ──

    @contextmanager
    def _answer(
        self, image: str, endpoint: str | None, path: str, headers: dict[str, str]
    ) -> Iterator[requests.Response]:
        """A streamed answer with a good status. Runs in a thread."""
        answer = self._with_token(image, endpoint, partial(self._get, image, endpoint, path, headers))
        try:
            with _faults(image):
                yield answer
        except BaseException:
            answer.close()  # Mid-body: this connection cannot be used again.
            raise
        answer.raw.release_conn()

    def _get(self, image: str, endpoint: str | None, path: str, headers: dict[str, str]) -> requests.Response:
        where: dict[str, Any] = (
            {"endpoint_override": endpoint} if endpoint else {"endpoint_filter": self._auth.endpoint_filter}
        )
        with _faults(image):
            if not endpoint:
                path = path.removeprefix("/v2") if self._catalog_has_version() else path
            answer = self._session.get(
                path, headers=headers, stream=True, raise_exc=False, redirect=False, connect_retries=0, **where
            )
            if answer.status_code < 300:
                return answer
            try:
                refusal = _refusal(image, answer)
            finally:
                answer.close()
        if isinstance(refusal, ImageGone):
            self._ask_one(image, endpoint, lambda client: _shown(client, image))
            raise BytesMissing(image, f"its bytes are not found, and it is there: {refusal.detail}")
        raise refusal

    def _with_token(self, image: str, endpoint: str | None, ask: Callable[[], T]) -> T:
        """What `ask` gives, once more with a new token where Glance refuses the one there is. Keystone is asked
        apart from Glance, so that it is clear whose a failure is."""
        used = self._token(image, endpoint)
        try:
            return ask()
        except TokenRefused:
            with self._renewing:  # One of all who were refused renews it for them.
                if self._token(image, endpoint) == used and not self._session.invalidate():
                    raise
                self._token(image, endpoint)
        return ask()

    def _token(self, image: str, endpoint: str | None) -> str | None:
        """The token, from Keystone if need be, and with it the endpoint that its catalog names."""
        with _identity_faults(image):
            token = self._session.get_token()
            if endpoint is None:
                self._catalog_has_version()
            return token

    @functools.lru_cache(maxsize=1)  # noqa: B019  # One Glance per daemon.
    def _catalog_has_version(self) -> bool:
        found = self._session.get_endpoint(**self._auth.endpoint_filter)
        if not found:  # Not an answer to remember: it may be entered tomorrow.
            raise ksa.EndpointNotFound("the catalog has no such endpoint")
        return found.rstrip("/").endswith("/v2")

    # ── metadata ──

    async def images(self) -> list[dict[str, Any]]:
        """See `Registry.images`. Two passes: a listing without `os_hidden` leaves hidden images out."""

        def ask(client: Client) -> list[dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            for hidden in ("false", "true"):
                filters = {"visibility": "all", "os_hidden": hidden}
                for image in client.images.list(page_size=LISTING_PAGE, filters=filters):
                    found[image["id"]] = dict(image)
            return list(found.values())

        return await self._metadata(LISTING, ask)

    async def image(self, image: str) -> dict[str, Any]:
        """See `Registry.image`."""
        return await self._metadata(image, lambda client: _shown(client, image))

    async def _metadata(self, image: str, ask: Callable[[Client], T]) -> T:
        async def ask_at(endpoint: str | None) -> T:
            return await self._call(self._metadata_threads, partial(self._ask_one, image, endpoint, ask))

        return await self.endpoints.ask(image, ask_at)

    async def greet(self) -> None:
        """Returns when Glance has answered something small. Raises OriginError."""
        await self.endpoints.ask(LISTING, self._probe)

    async def _probe(self, endpoint: str | None) -> None:
        """The least that only a Glance answers, with its database and a good token."""
        ask = partial(self._ask_one, LISTING, endpoint, _first_listed)
        await self._call(self._probe_threads, ask)

    async def _renew(self) -> None:
        def renew() -> None:
            with _identity_faults(LISTING):
                self._session.get_token()

        await self._call(self._probe_threads, renew)

    @staticmethod
    async def _call(threads: trio.CapacityLimiter, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(identified, work, limiter=threads, abandon_on_cancel=True)

    def _ask_one(self, image: str, endpoint: str | None, ask: Callable[[Client], T]) -> T:
        return self._with_token(image, endpoint, partial(self._ask_client, image, endpoint, ask))

    def _ask_client(self, image: str, endpoint: str | None, ask: Callable[[Client], T]) -> T:
        with _faults(image):
            try:
                return ask(self._client(endpoint))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # glanceclient takes for Glance's whatever comes with a good status.
                raise OriginUnavailable(image, f"no Glance answers there: {error!r}") from error

    def _client(self, endpoint: str | None) -> Client:
        where = dict(self._auth.endpoint_filter) if endpoint is None else {"endpoint_override": endpoint}
        client = Client(session=self._session, **where)
        client.images = Controller(client.http_client, _AnySchema())
        return client


class _AnySchema:
    """What an image may have, for glanceclient: anything. It would ask Glance for that before each question, and
    keep all other threads of the process waiting for the answer."""

    def get(self, name: str) -> _AnySchema:
        return self

    def raw(self) -> dict[str, Any]:
        return {"name": "image", "properties": {}, "additionalProperties": True}


class _Counted:
    """A sink, and how far it is: a block, or all of it, is enough to call a request a success."""

    def __init__(self, sink: Sink, length: int, progress: Progress) -> None:
        self._sink, self._progress = sink, progress
        self._missing = min(length, BLOCK)
        self.room, self.room_now, self.awaited = sink.room, sink.room_now, sink.awaited

    def arrived(self, n: int) -> None:
        self._progress.begun = True
        self._sink.arrived(n)
        if self._missing > 0:
            self._missing -= n
            if self._missing <= 0:
                self._progress.answered()


def _first_listed(client: Client) -> None:
    next(iter(client.images.list(limit=1, page_size=1)), None)


def _shown(client: Client, image: str) -> dict[str, Any]:
    """One image. A 404 counts when the same endpoint gives a listing: a proxy's, or that of a wrong path, says
    nothing of the image."""
    try:
        found = dict(client.images.get(image))
    except glanceclient.exc.HTTPNotFound:
        try:
            _first_listed(client)
        except glanceclient.exc.HTTPNotFound as error:
            raise OriginUnavailable(image, f"no Glance answers there: {error}") from error
        raise
    if found.get("id") != image:
        raise OriginUnavailable(image, f"the answer is about {found.get('id')!r}")
    return found


@contextmanager
def _identity_faults(image: str) -> Iterator[None]:
    """The same where only Keystone is asked. What it answers says nothing of the image."""
    try:
        with _faults(image):
            yield
    except OriginUnauthorized as error:
        raise OriginUnauthorized(image, error.detail) from error
    except OriginError as error:
        raise IdentityUnavailable(image, error.detail) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # keystoneauth takes for Keystone's whatever comes with a good status.
        raise IdentityUnavailable(image, f"no Keystone answers there: {error!r}") from error


@contextmanager
def _faults(image: str) -> Iterator[None]:
    """The one place where failures of the libraries below become ours."""
    try:
        yield
    except OriginError:
        raise
    except glanceclient.exc.HTTPException as error:
        if not isinstance(error.code, int):  # It knows no name for 429 or 504.
            raise OriginUnavailable(image, str(error)) from error
        raise _from_status(image, error.code, str(error)) from error
    except (
        ksa.http.Unauthorized,
        ksa.AuthorizationFailure,
        ksa.MissingAuthPlugin,
    ) as error:
        raise OriginUnauthorized(image, str(error)) from error
    except ksa.http.HttpError as error:
        # From Keystone, so it says nothing of the image; a deleted application credential is a 404 there.
        refused = error.http_status < 500 and error.http_status != 429
        raise (OriginUnauthorized if refused else IdentityUnavailable)(image, f"identity: {error}") from error
    except (ksa.ClientException, glanceclient.exc.ClientException, glanceclient.exc.BaseException) as error:
        raise _unavailable(image, error) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _unavailable(image, error) from error


def _unavailable(image: str, error: Exception) -> OriginUnavailable:
    kind = NotReached if _is_without_connection(error) else OriginUnavailable
    return kind(image, in_words(error))


def _is_without_connection(error: BaseException | None) -> bool:
    """Whether no connection came about, by what the libraries have wrapped into each other."""
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, requests.exceptions.ConnectTimeout | requests.exceptions.SSLError):
            return True
        reason = getattr(error.args[0], "reason", None) if error.args else None
        if isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _refusal(image: str, answer: requests.Response) -> OriginError:
    """What a status from 300 on means for a read of `image`."""
    text = answer.raw.read(512, decode_content=True).decode(errors="replace")
    detail = f"{answer.status_code} {_TAGS.sub(' ', text).strip()[:200]}"
    if answer.status_code == 400 and "Range" in (answer.request.headers or {}):
        return RangeRefused(image, detail)
    return _from_status(image, answer.status_code, detail, _retry_after_s(answer.headers.get("Retry-After")))


def _from_status(image: str, status: int, detail: str, retry_after_s: float = 0.0) -> OriginError:
    match status:
        case 401:
            return TokenRefused(image, detail)
        case 403:
            return ImageForbidden(image, detail)
        case 404 | 410:
            return ImageGone(image, detail)
        case 429:
            return OriginThrottled(image, detail, retry_after_s)
        case 503:
            return OriginBusy(image, detail, retry_after_s)
        case _ if status >= 500:
            return OriginUnavailable(image, detail)
        case _:
            return OriginLied(image, detail)


def _retry_after_s(header: str | None) -> float:
    return min(float(header), RETRY_AFTER_MAX_S) if header and header.strip().isdigit() else 0.0
