"""Glance: images' bytes by ranges or as one stream, and what there is. The only importer of glanceclient, and
with `auth` beside it of keystoneauth1. Rule: an answer that is not exactly what was asked for is an error,
never data.

Bytes go over keystoneauth's session, because glanceclient cannot send a Range (it percent-encodes the `=`).
Both block, so each call runs in a thread of a bounded pool; a thread hands on what it received in one hop to
the loop per piece. Several endpoints are tried in turn: the first that answers serves, and is kept to.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import glanceclient.exc
import requests
import trio
import urllib3
from glanceclient.v2.client import Client
from keystoneauth1 import exceptions as ksa

from cachefs.errors import (
    ImageForbidden,
    ImageGone,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginUnauthorized,
    OriginUnavailable,
    RangeRefused,
)
from cachefs.plan.extents import Extent
from cachefs.sources import Sink, Timing
from cachefs.sources.auth import AuthOptions
from cachefs.sources.body import Body

log = logging.getLogger(__name__)

T = TypeVar("T")

# Handing on costs the loop some 50 us and every other thread Python's lock, so it is done when somebody waits, or
# when nothing more comes for a moment, and otherwise as seldom as this: who comes next finds most of it there.
HAND_ON_S, MOMENT_S = 0.005, 0.001
# Glance's own bound on a page of a listing.
LISTING_PAGE = 1000
RETRY_AFTER_MAX_S = 30.0
METADATA_CALLS_MAX = 4

_TAGS = re.compile(r"<[^>]*>|\s+")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")


class Glance:
    """A Source and a Registry. All its methods are called on the loop."""

    def __init__(self, auth: AuthOptions) -> None:
        self._auth = auth
        self._session = auth.session()
        self._endpoints: tuple[str | None, ...] = auth.endpoints or (None,)
        self._current = 0
        self._data_threads = trio.CapacityLimiter(auth.connections)
        self._metadata_threads = trio.CapacityLimiter(METADATA_CALLS_MAX)

    # ── bytes ──

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        """See `Source.fetch`."""
        return await self._in_thread(self._receive, image, size, extent, True, sink)

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        """See `Source.stream`."""
        return await self._in_thread(self._receive, image, size, Extent(0, size), False, sink)

    async def _in_thread(self, receive: Callable[..., Timing], *args: Any) -> Timing:
        # A cancelled flight leaves its thread behind, which ends at its next hop or at the read time-out.
        return await trio.to_thread.run_sync(receive, *args, limiter=self._data_threads, abandon_on_cancel=True)

    def _receive(self, image: str, size: int, extent: Extent, ranged: bool, sink: Sink) -> Timing:
        began_s = time.monotonic()
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = f"bytes={extent.start}-{extent.end - 1}"
        with self._answer(image, f"/v2/images/{image}/file", headers) as answer:
            self._check(image, size, extent, ranged, answer)
            first_s = self._pass_on(image, extent.length, Body(answer.raw), sink)
        return Timing(first_s - began_s, time.monotonic() - first_s)

    @staticmethod
    def _check(image: str, size: int, extent: Extent, ranged: bool, answer: requests.Response) -> None:
        """Raises unless the answer is `extent` of an image of `size` bytes."""
        if ranged and answer.status_code == 200:
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
        length = answer.headers.get("Content-Length")
        if length is not None and length != str(extent.length):
            raise OriginLied(image, f"Content-Length {length}, {extent.length} bytes are due")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OriginLied(image, f"the body is encoded: {answer.headers['Content-Encoding']}")

    @staticmethod
    def _pass_on(image: str, length: int, body: Body, sink: Sink) -> float:
        """Gives the body's `length` bytes to `sink`; returns when the first of them came (monotonic)."""

        def hand_on(n: int) -> memoryview | None:
            sink.arrived(n)
            return sink.room_now()

        room: memoryview = trio.from_thread.run(sink.room)
        first_s = handed_s = 0.0
        at = ready = 0
        while at < length:
            n = body.read_into(room[ready : ready + length - at])
            now_s = time.monotonic()
            first_s = first_s or now_s
            if not n:
                raise OriginUnavailable(image, f"the body ended {length - at} bytes early")
            ready += n
            at += n
            due = now_s >= handed_s + HAND_ON_S or sink.awaited(ready)
            if due or at == length or ready == len(room) or not body.has_more_within(MOMENT_S):
                more = trio.from_thread.run_sync(hand_on, ready)
                ready, handed_s = 0, time.monotonic()
                if at < length:
                    room = more if more is not None else trio.from_thread.run(sink.room)
        if not body.is_at_end():
            raise OriginLied(image, "the body is longer than what was asked for")
        return first_s

    # ── requests ──

    @contextmanager
    def _answer(self, image: str, path: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        """A streamed answer with a good status, from the first endpoint that serves. Runs in a thread."""
        answer = self._from_endpoints(lambda endpoint: self._get(image, endpoint, path, headers))
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
            raise OriginUnavailable(image, f"its bytes are not found, and it is there: {refusal.detail}")
        raise refusal

    @functools.lru_cache(maxsize=1)  # noqa: B019  # One Glance per daemon.
    def _catalog_has_version(self) -> bool:
        found = self._session.get_endpoint(**self._auth.endpoint_filter)
        if not found:  # Not an answer to remember: it may be entered tomorrow.
            raise ksa.EndpointNotFound("the catalog has no such endpoint")
        return found.rstrip("/").endswith("/v2")

    def _from_endpoints(self, ask: Callable[[str | None], T]) -> T:
        """Asks the endpoint that served last, and the others in turn while they are unwell."""
        first = self._current
        for turn in range(len(self._endpoints)):
            number = (first + turn) % len(self._endpoints)
            try:
                result = ask(self._endpoints[number])
            except OriginUnavailable as error:
                if turn + 1 == len(self._endpoints):
                    raise
                log.warning("endpoint %s: %s; trying the next", self._endpoints[number], error)
                continue
            if number != first:
                log.warning("endpoint %s serves now", self._endpoints[number])
                self._current = number
            return result
        raise AssertionError("unreachable: there is at least one endpoint")

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

        return await self._metadata("(all)", ask)

    async def image(self, image: str) -> dict[str, Any]:
        """See `Registry.image`."""
        return await self._metadata(image, lambda client: _shown(client, image))

    async def _metadata(self, image: str, ask: Callable[[Client], T]) -> T:
        return await trio.to_thread.run_sync(
            self._from_endpoints,
            lambda endpoint: self._ask_one(image, endpoint, ask),
            limiter=self._metadata_threads,
            abandon_on_cancel=True,
        )

    def _ask_one(self, image: str, endpoint: str | None, ask: Callable[[Client], T]) -> T:
        with _faults(image):
            try:
                return ask(self._client(endpoint))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # glanceclient takes for Glance's whatever comes with a good status.
                raise OriginUnavailable(image, f"no Glance answers there: {error!r}") from error

    def _client(self, endpoint: str | None) -> Client:
        if endpoint is not None:
            return Client(session=self._session, endpoint_override=endpoint)
        where = dict(self._auth.endpoint_filter)
        return Client(session=self._session, **where)


def _shown(client: Client, image: str) -> dict[str, Any]:
    """One image. A 404 counts when the same endpoint gives a listing: a proxy's, or that of a wrong path, says
    nothing of the image."""
    try:
        found = dict(client.images.get(image))
    except glanceclient.exc.HTTPNotFound:
        try:
            next(iter(client.images.list(limit=1)), None)
        except glanceclient.exc.HTTPNotFound as error:
            raise OriginUnavailable(image, f"no Glance answers there: {error}") from error
        raise
    if found.get("id") != image:
        raise OriginUnavailable(image, f"the answer is about {found.get('id')!r}")
    return found


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
        raise (OriginUnauthorized if refused else OriginUnavailable)(image, f"identity: {error}") from error
    except (ksa.ClientException, glanceclient.exc.ClientException, glanceclient.exc.BaseException) as error:
        raise OriginUnavailable(image, f"{type(error).__name__}: {error}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise OriginUnavailable(image, f"{type(error).__name__}: {error}") from error


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
            return OriginUnauthorized(image, detail)
        case 403:
            return ImageForbidden(image, detail)
        case 404 | 410:
            return ImageGone(image, detail)
        case 429 | 503:
            return OriginBusy(image, detail, retry_after_s)
        case _ if status >= 500:
            return OriginUnavailable(image, detail)
        case _:
            return OriginLied(image, detail)


def _retry_after_s(header: str | None) -> float:
    return min(float(header), RETRY_AFTER_MAX_S) if header and header.strip().isdigit() else 0.0
