"""A Glance and a Keystone on loopback that misbehave on request. Rule: nothing here knows what cachefs is.

It speaks the part of the Images API v2 that a client of images needs, with the range semantics of Glance's
`get_range_from_request` and data serializer, and a Keystone v3 that issues `token-1`, `token-2`, ...

    with ScriptedOrigin([OriginImage(ID, "debian", 1 << 40, pattern(1 << 40))]) as origin:
        origin.fault(Cut(after=4096), None, Status(503))  # for the first three data requests
        ...
        origin.wait_for(lambda: origin.data_requests == 3)

A request meets its fault when its headers were read: the next one in the queue of its kind, or, where that
queue is empty, what `script` says. Whatever was asked is in `requests`, in the order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from http.client import responses
from http.server import BaseHTTPRequestHandler
from itertools import islice
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

# What is at (offset, length), or less where the content ends.
Content = Callable[[int, int], bytes]

LOOPBACK = "127.0.0.1"
PAGE_IMAGES_DEFAULT = 25  # Glance's limit_param_default
PAGE_IMAGES_MAX = 1000  # Glance's api_limit_max
PIECE_SIZE_BYTES = 256 << 10  # What one send takes, so that counts move while a long body goes out.
SEGMENT_SIZE_BYTES = 64 << 10
WORD_SIZE_BYTES = 8
HOLD_POLL_S = 0.02  # How soon a held request notices that the server stops.


# Contents


def pattern(size: int, seed: int = 0) -> Content:
    """Bytes that tell where they are from: the big-endian word at offset `o` is `o ^ pattern_mask(seed)`.

    No page is zero, no two pages are equal, nor are pages of two seeds.
    """
    mask = pattern_mask(seed)
    words = SEGMENT_SIZE_BYTES // WORD_SIZE_BYTES
    first = int.from_bytes(struct.pack(f">{words}Q", *((n * WORD_SIZE_BYTES) ^ mask for n in range(words))))
    ones = int.from_bytes((1).to_bytes(WORD_SIZE_BYTES) * words)

    def read(offset: int, length: int) -> bytes:
        end = min(offset + length, size)
        start = offset - offset % SEGMENT_SIZE_BYTES
        # A segment's base has no bit in common with an offset within it: one exclusive or for all its words.
        segments = [
            (first ^ (ones * base)).to_bytes(SEGMENT_SIZE_BYTES) for base in range(start, end, SEGMENT_SIZE_BYTES)
        ]
        return b"".join(segments)[offset - start : end - start] if end > offset else b""

    return read


def pattern_mask(seed: int) -> int:
    return int.from_bytes(hashlib.sha256(b"pattern %d" % seed).digest()[:WORD_SIZE_BYTES])


def literal(data: bytes) -> Content:
    return lambda offset, length: data[offset : offset + length]


@dataclass(frozen=True)
class OriginImage:
    """What Glance knows of an image. `properties` are added last, and may contradict anything before."""

    id: str
    name: str | None
    size: int | None
    content: Content
    status: str = "active"
    disk_format: str | None = "raw"
    container_format: str | None = "bare"
    visibility: str = "public"
    os_hidden: bool = False
    owner: str | None = "0d4b1ad5f2d54a6cbd5d3c34b3f0d7b2"
    virtual_size: int | None = None
    checksum: str | None = None
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    created_at: str = "2026-01-01T00:00:00Z"
    updated_at: str = "2026-01-01T00:00:00Z"
    tags: tuple[str, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)
    ranges: bool = True  # Whether the store reads from anywhere: filesystem and cinder do, the others do not.
    locations: bool = True  # Without, there is no data: 204.

    @classmethod
    def of(cls, image_id: str, name: str | None, data: bytes, **known: Any) -> OriginImage:
        """An image of these very bytes, with its hashes."""
        return cls(image_id, name, len(data), literal(data), **known).hashed()

    def hashed(self, algorithm: str = "sha512") -> OriginImage:
        """The same image, with its hashes; reads all of its content."""
        assert self.size is not None
        strong, md5 = hashlib.new(algorithm), hashlib.md5(usedforsecurity=False)
        for offset in range(0, self.size, PIECE_SIZE_BYTES):
            data = self.content(offset, min(PIECE_SIZE_BYTES, self.size - offset))
            strong.update(data)
            md5.update(data)
        return replace(self, checksum=md5.hexdigest(), os_hash_algo=algorithm, os_hash_value=strong.hexdigest())

    def shown(self) -> dict[str, Any]:
        """As `GET /v2/images/{id}` has it."""
        same = (
            "id name size status disk_format container_format visibility os_hidden owner virtual_size"
            " checksum os_hash_algo os_hash_value created_at updated_at"
        )
        links = {"self": f"/v2/images/{self.id}", "file": f"/v2/images/{self.id}/file"}
        return {
            **{name: getattr(self, name) for name in same.split()},
            "tags": list(self.tags),
            "min_ram": 0,
            "min_disk": 0,
            "protected": False,
            **links,
            "schema": "/v2/schemas/image",
            **self.properties,
        }


# Faults


@dataclass(frozen=True)
class Cut:
    """The connection ends after so many bytes of the body. A reset may overtake bytes sent before it."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class HangUp:
    """The connection ends before any answer."""

    reset: bool = False


@dataclass(frozen=True)
class Trickle:
    """`size` bytes of the body every `every_s` seconds, the first at once."""

    size: int
    every_s: float


@dataclass(frozen=True)
class Stall:
    """Headers and `after` bytes of the body, and the rest when released."""

    after: int = 0
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class SlowHeaders:
    """No answer until released, then the right one."""

    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Status:
    """Another answer altogether: `Status(429, {"Retry-After": "7"})`."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True)
class IgnoreRange:
    """200 and all of the image."""


@dataclass(frozen=True)
class RefuseRange:
    """400, as for an image in a store that cannot read from anywhere."""


@dataclass(frozen=True)
class WrongContentRange:
    """The bytes asked for, said to be those `shift` further on."""

    shift: int = 4096


@dataclass(frozen=True)
class WrongTotal:
    """Another size of the image in Content-Range than in its metadata; None is `*`."""

    total: int | None


@dataclass(frozen=True)
class ShortLength:
    """Body and Content-Length are `by` bytes shorter than Content-Range says."""

    by: int = 1


@dataclass(frozen=True)
class LongBody:
    """`extra` zeros after the bytes asked for; undeclared, they lie on the connection behind the answer."""

    extra: int = 1
    declared: bool = True


Fault = (
    Cut
    | HangUp
    | Trickle
    | Stall
    | SlowHeaders
    | Status
    | IgnoreRange
    | RefuseRange
    | WrongContentRange
    | WrongTotal
    | ShortLength
    | LongBody
)


# What was asked


class Kind(Enum):
    DATA = "GET /v2/images/{id}/file"
    IMAGE = "GET /v2/images/{id}"
    LIST = "GET /v2/images"
    TOKEN = "POST /v3/auth/tokens"
    DISCOVERY = "versions and schemas"
    OTHER = "anything else"


@dataclass
class Request:
    """One request; the fields below `at_s` are filled in, and move, while it is answered."""

    kind: Kind
    method: str
    path: str
    query: Mapping[str, str]
    image: str | None
    headers: Mapping[str, str]  # Names in lower case.
    body: bytes
    at_s: float  # time.monotonic()
    number: int = -1  # Its place in the order of arrival.
    # What its range comes to, half-open and clamped; None without a range, and with one that is refused.
    extent: tuple[int, int] | None = None
    fault: Fault | None = None
    status: int | None = None  # None until an answer has begun.
    bytes_sent: int = 0  # Of the body, as taken by the kernel.
    held: bool = False
    done: bool = False

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


Script = Callable[[Request], Fault | None]


class ScriptedOrigin:
    """The server. Its port is its own from construction to `close`, also while it is stopped.

    `images` maps ids to images, in the order of listing; `add` and `remove` change it while it serves. With
    `auth`, the image API wants a token that is in `tokens`. `admin` tells whether deactivated images are
    served, which Glance does for admins.
    """

    def __init__(
        self,
        images: Iterable[OriginImage] = (),
        *,
        auth: bool = False,
        admin: bool = False,
        script: Script | None = None,
        token_life_s: float = 3600,
    ) -> None:
        self.images: dict[str, OriginImage] = {image.id: image for image in images}
        self.auth, self.admin, self.script, self.token_life_s = auth, admin, script, token_life_s
        self.tokens: set[str] = set()
        self.tokens_issued = 0
        self.requests: list[Request] = []
        self.failures: list[BaseException] = []  # Of this server's own code, or of a content or a script.
        self.in_flight_peak = 0
        self._data_requests = self._bytes_sent = self._in_flight = 0
        self.changed = threading.Condition()
        self._queues: dict[Kind, deque[Fault | None]] = {kind: deque() for kind in Kind}
        self._stopping = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        # Bound and never listening: it refuses, and keeps the port while there is no server.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((LOOPBACK, 0))
        self.port: int = self._reserved.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def auth_url(self) -> str:
        return f"{self.url}/v3"

    # Its life

    def start(self) -> None:
        assert self._server is None, "already started"
        self._stopping.clear()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(HOLD_POLL_S,), name=f"origin-{self.port}"
        )
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and end those there are, whatever they are at; `start` begins anew."""
        if self._server is None or self._thread is None:
            return
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()  # joins the threads of its connections
        self._server = self._thread = None

    def close(self) -> None:
        """Stop for good, and raise what went wrong in here meanwhile."""
        self.stop()
        self._reserved.close()
        if self.failures:
            raise self.failures[0]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For tests: what to do

    def fault(self, *faults: Fault | None, kind: Kind = Kind.DATA) -> None:
        """The next requests of this kind meet these, one each; None is a right answer."""
        with self.changed:
            self._queues[kind].extend(faults)

    def add(self, *images: OriginImage) -> None:
        """Add them, or put them in place of those with the same ids."""
        with self.changed:
            self.images |= {image.id: image for image in images}

    def change(self, image_id: str, **known: Any) -> None:
        """`change(ID, status="deactivated")`"""
        with self.changed:
            self.images[image_id] = replace(self.images[image_id], **known)

    def remove(self, image_id: str) -> None:
        with self.changed:
            del self.images[image_id]

    def expire_tokens(self) -> None:
        """Whoever comes with a token issued so far gets 401."""
        with self.changed:
            self.tokens.clear()

    def clear(self) -> None:
        """Forget what was asked, and the faults that nothing has met yet."""
        with self.changed:
            self.requests.clear()
            self._data_requests = self._bytes_sent = 0
            self.in_flight_peak = self._in_flight
            for queue in self._queues.values():
                queue.clear()

    # For tests: what was done

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 10) -> None:
        """Until it is true. It is tried under the lock, whenever a request comes, moves or ends."""
        with self.changed:
            if not self.changed.wait_for(predicate, timeout_s):
                raise TimeoutError(f"not within {timeout_s} s; requests: {self.requests}")

    # These take the lock, and so are exact: who has got a byte finds it counted, and who has got an answer's
    # last one finds the request done.

    def of_kind(self, kind: Kind, image: str | None = None) -> list[Request]:
        with self.changed:
            return [r for r in self.requests if r.kind is kind and image in (None, r.image)]

    @property
    def data(self) -> list[Request]:
        return self.of_kind(Kind.DATA)

    @property
    def data_requests(self) -> int:
        with self.changed:
            return self._data_requests

    @property
    def bytes_sent(self) -> int:
        """Of the images' data, with 200 or 206."""
        with self.changed:
            return self._bytes_sent

    @property
    def in_flight(self) -> int:
        """Data requests that have come and not ended."""
        with self.changed:
            return self._in_flight

    @property
    def held(self) -> int:
        """Requests of any kind that wait for the release of their fault."""
        with self.changed:
            return sum(request.held for request in self.requests)

    # For the connections' threads

    @contextmanager
    def arrival(self, handler: _Handler) -> Iterator[Request]:
        request = _read(handler)
        with self.changed:
            request.number = len(self.requests)
            request.extent = self._extent(request)
            self.requests.append(request)
            queue = self._queues[request.kind]
            queued, request.fault = bool(queue), queue.popleft() if queue else None
            if request.kind is Kind.DATA:
                self._data_requests += 1
                self._in_flight += 1
                self.in_flight_peak = max(self.in_flight_peak, self._in_flight)
            self.changed.notify_all()
        try:
            if not queued and self.script is not None:
                request.fault = self.script(request)  # Without the lock: it may wait.
            yield request
        finally:
            self.finish(request)

    def send(self, request: Request, connection: socket.socket, data: memoryview, last: bool) -> int:
        """What the kernel takes now. Under the lock, so that no client has bytes that are not counted."""
        with self.changed:
            try:
                taken = connection.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return 0
            request.bytes_sent += taken
            if request.kind is Kind.DATA and request.status in (200, 206):
                self._bytes_sent += taken
            if last and taken == len(data):
                self.finish(request)
            self.changed.notify_all()
            return taken

    def move(self, request: Request, **fields: Any) -> None:
        with self.changed:
            for name, value in fields.items():
                setattr(request, name, value)
            self.changed.notify_all()

    def finish(self, request: Request) -> None:
        with self.changed:
            if not request.done:
                self._in_flight -= request.kind is Kind.DATA
                self.move(request, held=False, done=True)

    def hold(self, request: Request, release: threading.Event) -> None:
        self.move(request, held=True)
        while not release.wait(HOLD_POLL_S):
            if self._stopping.is_set():
                raise _Stopped
        self.move(request, held=False)

    def pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Stopped

    def reply(self, request: Request) -> _Reply:
        """The answer with the fault's lies, if any, in it."""
        with self.changed:
            if isinstance(request.fault, Status):
                return _status(request.fault)
            if request.kind is Kind.TOKEN:
                return self._token()
            if request.kind is Kind.DISCOVERY and "schemas" not in request.path:
                return _versions(request.path, self.url)
            if self.auth and request.headers.get("x-auth-token") not in self.tokens:
                challenge = {"WWW-Authenticate": f'Keystone uri="{self.url}"'}
                return _refusal(401, "This server could not verify that you are authorized.", challenge)
            return self._images_api(request)

    def _extent(self, request: Request) -> tuple[int, int] | None:
        image = self.images.get(request.image or "")
        if request.kind is not Kind.DATA or image is None or image.size is None:
            return None
        asked = _asked(request.headers, image.size)
        return asked if isinstance(asked, tuple) else None

    def _images_api(self, request: Request) -> _Reply:
        if request.kind is Kind.DISCOVERY:
            return _json(200, SCHEMA)
        if request.kind is Kind.LIST:
            return _list(list(self.images.values()), request.query)
        if request.kind is Kind.OTHER:
            return _refusal(405 if request.method != "GET" else 404, "There is nothing like this here.")
        image = self.images.get(request.image or "")
        if image is None:
            return _refusal(404, f"Failed to find image {request.image}")
        if request.kind is Kind.IMAGE:
            return _json(200, image.shown())
        if image.status == "deactivated" and not self.admin:
            return _refusal(403, "The requested image has been deactivated.")
        return _data(image, request)

    def _token(self) -> _Reply:
        self.tokens_issued += 1
        token = f"token-{self.tokens_issued}"
        self.tokens.add(token)
        return _json(201, _token_body(self.url, self.token_life_s), {"X-Subject-Token": token})


# Answers


class _Stopped(Exception):
    """The server stops, so this answer ends here."""


@dataclass(frozen=True)
class _Reply:
    """`length` bytes of `content` from `offset` on, with zeros where it has fewer."""

    status: int
    headers: Mapping[str, str]
    content: Content
    offset: int
    length: int
    undeclared: int = 0  # Of `length`, what Content-Length leaves out.


@dataclass(frozen=True)
class _Refused:
    status: int
    reason: str


def _read(handler: _Handler) -> Request:
    url = urlsplit(handler.path)
    kind, image = _route(handler.command, url.path)
    headers = {name.lower(): value for name, value in handler.headers.items()}
    return Request(
        kind=kind,
        method=handler.command,
        path=url.path,
        query=dict(parse_qsl(url.query)),
        image=image,
        headers=headers,
        body=handler.rfile.read(int(headers.get("content-length", 0))),
        at_s=time.monotonic(),
    )


def _route(method: str, path: str) -> tuple[Kind, str | None]:
    if method == "POST" and path == "/v3/auth/tokens":
        return Kind.TOKEN, None
    if method != "GET":
        return Kind.OTHER, None
    if path in ("/", "/versions", "/v3", "/v3/", "/v2/schemas/image"):
        return Kind.DISCOVERY, None
    if path == "/v2/images":
        return Kind.LIST, None
    if found := re.fullmatch(r"/v2/images/([^/]+)(/file)?", path):
        return (Kind.DATA if found[2] else Kind.IMAGE), found[1]
    return Kind.OTHER, None


def _asked(headers: Mapping[str, str], size: int) -> tuple[int, int] | _Refused | None:
    """The extent that the headers ask for, as Glance reads them; None is all, without a range."""
    if (text := headers.get("range")) is not None:
        return _asked_range(text, size)
    if (text := headers.get("content-range")) is None:
        return None
    # A legacy of Glance's: a Content-Range in the request is a range too.
    found = re.match(r"bytes (\d+)-(\d+)/(\d+|\*)", text)
    if not found or int(found[2]) < int(found[1]):
        return _Refused(416, "Invalid Content-Range header.")
    start, stop = int(found[1]), int(found[2]) + 1
    if start >= size or (found[3] == "*" and stop > size):
        return _Refused(416, "Invalid position in Content-Range header.")
    return start, min(stop, size)


def _asked_range(text: str, size: int) -> tuple[int, int] | _Refused:
    if "," in text:
        return _Refused(400, "Requests with multiple ranges are not supported in Glance.")
    found = re.match(r"bytes *= *(\d*) *- *(\d*)", text, re.IGNORECASE)
    if not found or not (found[1] or found[2]):
        return _Refused(416, "Invalid Range header.")
    if not found[1]:
        suffix = int(found[2])  # Neither more than all of it nor nothing is wrong to Glance: both are all.
        start, stop = (size - suffix if 0 < suffix < size else 0), size
    else:
        start, stop = int(found[1]), int(found[2]) + 1 if found[2] else size
    if found[1] and found[2] and start >= stop:
        return _Refused(416, "Invalid Range header.")
    if start >= size:
        return _Refused(416, "Invalid start position in Range header.")
    return start, min(stop, size)


def _data(image: OriginImage, request: Request) -> _Reply:
    fault = request.fault
    headers = {} if isinstance(fault, IgnoreRange) else request.headers
    if image.size is None:
        if "range" in headers or "content-range" in headers:
            return _refusal(500, "The server has either erred or is incapable of performing the operation.")
        return _Reply(204, {}, literal(b""), 0, 0)
    asked = _asked(headers, image.size)
    if isinstance(asked, _Refused):
        return _refusal(asked.status, asked.reason)
    if not image.locations:
        return _Reply(204, {}, literal(b""), 0, 0)
    start, stop = asked or (0, image.size)
    if asked and (isinstance(fault, RefuseRange) or not image.ranges):
        told = f"Offset: {start}, length: {stop - start}"
        return _refusal(400, f"Getting images randomly from this store is not supported. {told}")
    fields = {"Content-Type": "application/octet-stream"}
    if image.checksum is not None:
        fields["Content-MD5"] = image.checksum  # The whole image's, also with 206.
    if asked:
        fields["Content-Range"] = _content_range(start, stop, image.size, fault)
    return _stretched(_Reply(206 if asked else 200, fields, image.content, start, stop - start), fault)


def _content_range(start: int, stop: int, size: int, fault: Fault | None) -> str:
    shift = fault.shift if isinstance(fault, WrongContentRange) else 0
    total = fault.total if isinstance(fault, WrongTotal) else size
    return f"bytes {start + shift}-{stop - 1 + shift}/{'*' if total is None else total}"


def _stretched(reply: _Reply, fault: Fault | None) -> _Reply:
    match fault:
        case ShortLength(by=by):
            return replace(reply, length=max(0, reply.length - by))
        case LongBody(extra=extra, declared=declared):
            return replace(_ended(reply), length=reply.length + extra, undeclared=0 if declared else extra)
        case _:
            return reply


def _ended(reply: _Reply) -> _Reply:
    """The same, of a content that ends where the answer ends."""
    end, content = reply.offset + reply.length, reply.content
    return replace(reply, content=lambda at, length: content(at, min(length, end - at)) if at < end else b"")


def _list(images: list[OriginImage], query: Mapping[str, str]) -> _Reply:
    """A page, in the order of `images`. Glance gives a `next` link whenever a page is full."""
    hidden = query.get("os_hidden", "false").lower()
    limit = query.get("limit", str(PAGE_IMAGES_DEFAULT))
    if hidden not in ("true", "false") or not limit.isdigit():
        return _refusal(400, "Invalid value for a filter or the limit.")
    after = 0
    if (marker := query.get("marker")) is not None:
        ids = [image.id for image in images]
        if marker not in ids:
            return _refusal(400, f"Invalid marker. Image {marker} could not be found.")
        after = ids.index(marker) + 1
    chosen = (image for image in images[after:] if _listed(image, query, hidden == "true"))
    page = list(islice(chosen, min(int(limit), PAGE_IMAGES_MAX)))
    body: dict[str, Any] = {"images": [i.shown() for i in page], "schema": "/v2/schemas/images"}
    rest = {name: value for name, value in query.items() if name != "marker"}
    body["first"] = _link("/v2/images", rest)
    if page and len(page) == min(int(limit), PAGE_IMAGES_MAX):
        body["next"] = _link("/v2/images", {**rest, "marker": page[-1].id})
    return _json(200, body)


def _listed(image: OriginImage, query: Mapping[str, str], hidden: bool) -> bool:
    shown = image.shown()
    visibility = query.get("visibility")
    if visibility is None and image.visibility == "community":
        return False  # Other people's, which only those who ask for them see.
    return (
        image.os_hidden == hidden
        and visibility in (None, "all", image.visibility)
        and all(shown[name] == query[name] for name in LIST_FILTERS if name in query)
    )


def _link(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _json(status: int, body: Any, headers: Mapping[str, str] | None = None) -> _Reply:
    data = json.dumps(body).encode()
    return _Reply(status, {"Content-Type": "application/json", **(headers or {})}, literal(data), 0, len(data))


def _refusal(status: int, reason: str, headers: Mapping[str, str] | None = None) -> _Reply:
    phrase = responses.get(status, "Unknown")
    title = f"{status} {phrase}"
    text = f"<html>\n <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n  {reason}"
    data = f"{text}<br /><br />\n\n </body>\n</html>".encode()
    fields = {"Content-Type": "text/html; charset=UTF-8", **(headers or {})}
    return _Reply(status, fields, literal(data), 0, len(data))


def _status(fault: Status) -> _Reply:
    if fault.body is None:
        return _refusal(fault.code, "As scripted.", fault.headers)
    return _Reply(fault.code, fault.headers, literal(fault.body), 0, len(fault.body))


def _versions(path: str, url: str) -> _Reply:
    if path.startswith("/v3"):
        links = [{"rel": "self", "href": f"{url}/v3/"}]
        return _json(200, {"version": {"id": "v3.14", "status": "stable", "links": links}})
    links = [{"rel": "self", "href": f"{url}/v2/"}]
    versions = [{"id": f"v2.{minor}", "status": "SUPPORTED", "links": links} for minor in range(15, -1, -1)]
    current = {"id": "v2.17", "status": "CURRENT", "links": links}
    return _json(200 if path == "/versions" else 300, {"versions": [current, *versions]})


def _token_body(url: str, life_s: float) -> dict[str, Any]:
    now = datetime.now(UTC)
    domain = {"id": "default", "name": "Default"}
    endpoints = [
        {"id": interface, "interface": interface, "region": "RegionOne", "region_id": "RegionOne", "url": url}
        for interface in ("public", "internal", "admin")
    ]
    return {
        "token": {
            "methods": ["password"],
            "issued_at": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "expires_at": (now + timedelta(seconds=life_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "audit_ids": ["audit"],
            "user": {"id": "cachefs", "name": "cachefs", "domain": domain, "password_expires_at": None},
            "project": {"id": "service", "name": "service", "domain": domain},
            "roles": [{"id": "admin", "name": "admin"}],
            "catalog": [{"id": "glance", "name": "glance", "type": "image", "endpoints": endpoints}],
        }
    }


LIST_FILTERS = ("name", "status", "disk_format", "container_format", "owner", "id")

_TEXT, _TEXT_OR_NULL, _NUMBER = {"type": "string"}, {"type": ["null", "string"]}, {"type": "integer"}
_NUMBER_OR_NULL, _TRUTH = {"type": ["null", "integer"]}, {"type": "boolean"}

_LINKS = ("self", "file", "schema")

SCHEMA = {
    "name": "image",
    "properties": {
        **dict.fromkeys(
            ["id", "status", "visibility", "created_at", "updated_at", "self", "file", "schema", "stores"],
            _TEXT,
        ),
        **dict.fromkeys(["name", "checksum", "os_hash_algo", "os_hash_value", "owner"], _TEXT_OR_NULL),
        **dict.fromkeys(("container_format", "disk_format"), _TEXT_OR_NULL),
        **dict.fromkeys(("size", "virtual_size"), _NUMBER_OR_NULL),
        **dict.fromkeys(("min_ram", "min_disk"), _NUMBER),
        **dict.fromkeys(("protected", "os_hidden"), _TRUTH),
        "tags": {"type": "array", "items": _TEXT},
    },
    "additionalProperties": _TEXT,
}


# Connections


class _Server(socketserver.ThreadingTCPServer):
    """A thread for each connection. It knows them all, because keep-alive would outlast the server."""

    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, origin: ScriptedOrigin) -> None:
        self.origin = origin
        self._live: set[socket.socket] = set()
        self._live_lock = threading.Lock()
        super().__init__((LOOPBACK, origin.port), _Handler)

    def hang_up(self) -> None:
        with self._live_lock:
            for connection in self._live:
                _shut(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._live_lock:
            self._live.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._live_lock:
            self._live.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET:
            self.close_request(request)  # Without the FIN that would come before the RST.
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, (ConnectionError, _Stopped)):
            self.origin.failures.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def answer(self) -> None:
        with self.server.origin.arrival(self) as request:
            match request.fault:
                case HangUp(reset=reset):
                    return self._hang_up(reset)
                case SlowHeaders(release=release):
                    self.server.origin.hold(request, release)
                case _:
                    pass
            reply = self.server.origin.reply(request)
            self._send_head(request, reply)
            self._send_body(request, reply)
            if isinstance(request.fault, Cut) and request.fault.after < reply.length:
                self._hang_up(request.fault.reset)
            elif reply.undeclared:
                self.close_connection = True
        return None

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `requests` tells it all."""

    def _send_head(self, request: Request, reply: _Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Length", str(reply.length - reply.undeclared))
        if "X-Openstack-Request-Id" not in reply.headers:
            self.send_header("X-Openstack-Request-Id", f"req-00000000-0000-4000-8000-{request.number:012x}")
        self.server.origin.move(request, status=reply.status)
        self.end_headers()

    def _send_body(self, request: Request, reply: _Reply) -> None:
        origin, fault = self.server.origin, request.fault
        end = min(reply.length, fault.after) if isinstance(fault, Cut) else reply.length
        piece = fault.size if isinstance(fault, Trickle) else PIECE_SIZE_BYTES
        sent = 0
        while sent < end and self.command != "HEAD":
            stop = min(sent + piece, end)
            if isinstance(fault, Stall):
                if sent == fault.after:
                    origin.hold(request, fault.release)
                elif sent < fault.after:
                    stop = min(stop, fault.after)
            if isinstance(fault, Trickle) and sent:
                origin.pause(fault.every_s)
            data = reply.content(reply.offset + sent, stop - sent)
            self._send(request, data + bytes(stop - sent - len(data)), last=stop == end)
            sent = stop

    def _send(self, request: Request, data: bytes, last: bool) -> None:
        rest = memoryview(data)
        while rest:
            taken = self.server.origin.send(request, self.connection, rest, last)
            rest = rest[taken:]
            if not taken:
                self._wait_writable()

    def _wait_writable(self) -> None:
        waiting = select.poll()
        waiting.register(self.connection, select.POLLOUT)
        waiting.poll()

    def _hang_up(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.close_connection = True


RESET = struct.pack("ii", 1, 0)  # A close that lingers for no time is a reset.


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # The other side was first.
