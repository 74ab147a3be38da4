"""The source against what a Glance can do: a real one behind a real Keystone, and a scripted one that cuts,
stalls, refuses and lies. An answer that is not exactly what was asked for is an error, and what is passed on of it
is the image's to the last byte.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import trio

from cachefs import config
from cachefs.errors import (
    BytesMissing,
    IdentityUnavailable,
    ImageForbidden,
    ImageGone,
    NotReached,
    OriginAway,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginThrottled,
    OriginUnauthorized,
    OriginUnavailable,
    RangeRefused,
    TokenRefused,
)
from cachefs.plan.extents import Extent
from cachefs.sources import Timing
from cachefs.sources.glance import Glance
from tests import cloud
from tests.conftest import KeystoneCloud
from tests.node import Node, errno_of, read_buffered, read_direct
from tests.origin import (
    Cut,
    Fault,
    HangUp,
    IgnoreRange,
    Kind,
    LongBody,
    OriginImage,
    RefuseRange,
    Request,
    ScriptedOrigin,
    ShortLength,
    SlowHeaders,
    Stall,
    Status,
    Trickle,
    WrongContentRange,
    WrongTotal,
    pattern,
)

Answer = TypeVar("Answer")

KIB, MIB = 1 << 10, 1 << 20
SIZE: Final = 8 * MIB
BYTES: Final = pattern(SIZE)
IMAGE: Final = "40000000-0000-4000-8000-000000000001"
UNKNOWN: Final = "40000000-0000-4000-8000-00000000dead"
START, END = 100 * KIB, 700 * KIB
JSON: Final = {"Content-Type": "application/json"}
HTML: Final = {"Content-Type": "text/html"}


def source_of(folder: Path, *endpoints: str, **glance: object) -> Glance:
    """The source as the daemon makes it: from a configuration file."""
    node = Node(folder, *endpoints, glance=glance)
    return Glance(config.load([str(node.config_file)], [], {}).glance.auth)


class Collected:
    """A sink that keeps everything; its rooms are small and of odd sizes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._room = bytearray(100_003)

    async def room(self) -> memoryview:
        return memoryview(self._room)

    def room_now(self) -> memoryview | None:
        return memoryview(self._room) if len(self.data) % 2 else None

    def awaited(self, n: int) -> bool:
        return True

    def arrived(self, n: int) -> None:
        self.data += self._room[:n]


def fetch(source: Glance, sink: Collected, start: int = START, end: int = END, image: str = IMAGE) -> Timing:
    return trio.run(source.fetch, image, SIZE, Extent(start, end), sink)


def fetched(source: Glance, start: int = START, end: int = END, image: str = IMAGE) -> bytes:
    sink = Collected()
    fetch(source, sink, start, end, image)
    return bytes(sink.data)


def streamed(source: Glance, image: str = IMAGE) -> bytes:
    sink = Collected()
    trio.run(source.stream, image, SIZE, sink)
    return bytes(sink.data)


def ask(method: Callable[..., Awaitable[Answer]], *args: object) -> Answer:
    return trio.run(method, *args)


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)]) as origin:
        yield origin


@pytest.fixture
def source(tmp_path: Path, origin: ScriptedOrigin) -> Glance:
    return source_of(tmp_path, origin.url)


# ── A scripted Glance: bytes ──────────────────────────────────────────────────────────────────────────


def test_a_range(source: Glance, origin: ScriptedOrigin) -> None:
    sink = Collected()
    timing = fetch(source, sink)
    assert sink.data == BYTES(START, END - START)
    assert timing.first_byte_s > 0
    assert timing.body_s > 0
    (request,) = origin.data
    assert request.range == f"bytes={START}-{END - 1}"
    assert request.headers["accept-encoding"] == "identity"


def test_ends_of_the_image(source: Glance) -> None:
    for start, end in ((0, 1), (0, SIZE), (SIZE - 1, SIZE)):
        assert fetched(source, start, end) == BYTES(start, end - start)


def test_a_stream(source: Glance, origin: ScriptedOrigin) -> None:
    origin.change(IMAGE, ranges=False)
    assert streamed(source) == BYTES(0, SIZE)
    assert origin.data[0].range is None


FAULTS: Final[dict[str, tuple[Fault, type[OriginError]]]] = {
    "cut before a byte": (Cut(0), OriginUnavailable),
    "cut mid-body": (Cut(300 * KIB + 7), OriginUnavailable),
    "cut one byte early": (Cut(END - START - 1), OriginUnavailable),
    "reset mid-body": (Cut(300 * KIB, reset=True), OriginUnavailable),
    "hung up": (HangUp(), OriginUnavailable),
    "reset": (HangUp(reset=True), OriginUnavailable),
    "500": (Status(500), OriginUnavailable),
    "502": (Status(502), OriginUnavailable),
    "503": (Status(503), OriginBusy),
    "504": (Status(504), OriginUnavailable),
    "429": (Status(429), OriginThrottled),
    "200 to a range": (IgnoreRange(), RangeRefused),
    "400 to a range": (RefuseRange(), RangeRefused),
    "short Content-Length": (ShortLength(), OriginLied),
    "Content-Length 0": (ShortLength(1 << 30), OriginLied),
    "wrong Content-Range": (WrongContentRange(), OriginLied),
    "wrong total": (WrongTotal(SIZE + 1), OriginLied),
    "unknown total": (WrongTotal(None), OriginLied),
    "longer body": (LongBody(1), OriginLied),
    "204": (Status(204, body=b""), OriginLied),
    "206 without Content-Range": (Status(206, body=bytes(END - START)), OriginLied),
    "encoded": (
        Status(
            206,
            {"Content-Range": f"bytes {START}-{END - 1}/{SIZE}", "Content-Encoding": "gzip"},
            bytes(END - START),
        ),
        OriginLied,
    ),
    "302": (Status(302, {"Location": "http://127.0.0.1:1/"}), OriginLied),
    "401": (Status(401), TokenRefused),
    "403": (Status(403), ImageForbidden),
    "404 of an image that is there": (Status(404), BytesMissing),
    "410 of an image that is there": (Status(410), BytesMissing),
    "a page of a proxy": (Status(200, HTML, b"<html>Welcome</html>"), OriginUnavailable),
    "a page of a proxy, said to be the range": (
        Status(206, HTML | {"Content-Range": f"bytes {START}-{END - 1}/{SIZE}"}, bytes(END - START)),
        OriginUnavailable,
    ),
    "something else of Glance's": (Status(200, JSON, b"{}"), OriginUnavailable),
    "418": (Status(418), OriginLied),
}
# Of these, what came before the end is the image's.
CUT: Final = ("cut before a byte", "cut mid-body", "cut one byte early", "reset mid-body", "hung up", "reset")


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_an_error_and_the_next_request_is_served(
    source: Glance, origin: ScriptedOrigin, fault: str
) -> None:
    said, error = FAULTS[fault]
    origin.fault(said)
    sink = Collected()
    with pytest.raises(error) as raised:
        fetch(source, sink)
    assert type(raised.value) is error
    assert raised.value.image == IMAGE
    assert sink.data == (BYTES(START, len(sink.data)) if fault in CUT else b"")
    assert fetched(source) == BYTES(START, END - START)


@pytest.mark.parametrize(
    "fault",
    ["cut mid-body", "reset mid-body", "hung up", "503", "longer body", "204", "a page of a proxy"],
)
def test_a_fault_in_a_stream(source: Glance, origin: ScriptedOrigin, fault: str) -> None:
    said, error = FAULTS[fault]
    origin.fault(said)
    with pytest.raises(error):
        streamed(source)
    assert streamed(source) == BYTES(0, SIZE)


def test_a_refused_stream_is_no_refused_range(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(Status(400))
    with pytest.raises(OriginLied):
        streamed(source)


def test_a_trickle_is_slow_and_right(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(Trickle(4099, 0.002))
    assert fetched(source, 10, 150 * KIB) == BYTES(10, 150 * KIB - 10)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("86400", 30.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("-1", 0.0)]
)
@pytest.mark.parametrize("code", [503, 429])
def test_retry_after(source: Glance, origin: ScriptedOrigin, code: int, header: str, seconds: float) -> None:
    origin.fault(Status(code, {"Retry-After": header}))
    with pytest.raises(OriginBusy) as raised:
        fetched(source)
    assert raised.value.retry_after == seconds
    assert raised.value.again().retry_after == seconds


def test_bytes_behind_the_answer_are_nobodys(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(LongBody(5000, declared=False))
    for _ in range(2):
        assert fetched(source) == BYTES(START, END - START)


@pytest.mark.parametrize("fault", [SlowHeaders(), Stall(0), Stall(200 * KIB)], ids=["headers", "body", "middle"])
def test_a_stall_ends_at_the_read_timeout(tmp_path: Path, origin: ScriptedOrigin, fault: Fault) -> None:
    source = source_of(tmp_path, origin.url, read_timeout=0.3)
    origin.fault(fault)
    sink = Collected()
    with pytest.raises(OriginUnavailable):
        fetch(source, sink)
    assert sink.data == BYTES(START, len(sink.data))
    assert fetched(source) == BYTES(START, END - START)


def test_a_cancelled_fetch_ends_at_once(source: Glance, origin: ScriptedOrigin) -> None:
    stall = Stall(200 * KIB)
    origin.fault(stall)

    async def give_up() -> None:
        sink = Collected()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.fetch, IMAGE, SIZE, Extent(START, END), sink)
            await trio.to_thread.run_sync(origin.wait_for, lambda: origin.held == 1)
            nursery.cancel_scope.cancel()

    trio.run(give_up)
    assert fetched(source) == BYTES(START, END - START)
    stall.release.set()


# ── A scripted Glance: metadata ───────────────────────────────────────────────────────────────────────


def test_the_listing_has_every_image_once(source: Glance, origin: ScriptedOrigin) -> None:
    ids = [f"40000000-0000-4000-9000-{number:012d}" for number in range(2500)]
    origin.add(*(OriginImage(id_, None, SIZE, BYTES, visibility="community") for id_ in ids))
    hidden = OriginImage(UNKNOWN, "hidden", SIZE, BYTES, os_hidden=True)
    origin.add(hidden)
    listed = ask(source.images)
    assert sorted(image["id"] for image in listed) == sorted([IMAGE, UNKNOWN, *ids])
    assert len(origin.of_kind(Kind.LIST)) <= 5


def test_an_image_and_an_unknown_one(source: Glance) -> None:
    found = ask(source.image, IMAGE)
    assert (found["id"], found["size"], found["status"]) == (IMAGE, SIZE, "active")
    with pytest.raises(ImageGone):
        ask(source.image, UNKNOWN)


BAD_ANSWERS: Final[dict[str, tuple[Fault, type[OriginError]]]] = {
    "hung up": (HangUp(), OriginUnavailable),
    "500": (Status(500), OriginUnavailable),
    "503": (Status(503), OriginBusy),
    "429": (Status(429), OriginUnavailable),
    "502": (Status(502), OriginUnavailable),
    "504": (Status(504), OriginUnavailable),
    "418": (Status(418), OriginUnavailable),
    "403": (Status(403), ImageForbidden),
    "401": (Status(401), OriginUnauthorized),
    "a page of a proxy": (Status(200, HTML, b"<html>Welcome</html>"), OriginUnavailable),
    "an empty body": (Status(200, JSON, b""), OriginUnavailable),
    "half a body": (Status(200, JSON, b'{"id": "4000'), OriginUnavailable),
    "a list": (Status(200, JSON, b"[]"), OriginUnavailable),
    "a number": (Status(200, JSON, b"7"), OriginUnavailable),
    "null": (Status(200, JSON, b"null"), OriginUnavailable),
    "nothing in it": (Status(200, JSON, b"{}"), OriginUnavailable),
    "no UTF-8": (Status(200, JSON, b'{"id": "\xff"}'), OriginUnavailable),
    "an error without a type": (Status(500, {}, b"broken"), OriginUnavailable),
    "an error that is no JSON": (Status(500, JSON, b"broken"), OriginUnavailable),
    "bytes": (Status(200, {"Content-Type": "application/octet-stream"}, b"\0"), OriginUnavailable),
}


@pytest.mark.parametrize("kind", [Kind.IMAGE, Kind.LIST], ids=["image", "listing"])
@pytest.mark.parametrize("answer", list(BAD_ANSWERS))
def test_a_bad_answer_is_an_origin_error(source: Glance, origin: ScriptedOrigin, kind: Kind, answer: str) -> None:
    fault, error = BAD_ANSWERS[answer]

    def asked() -> Any:
        return ask(source.image, IMAGE) if kind is Kind.IMAGE else ask(source.images)

    origin.fault(fault, kind=kind)
    with pytest.raises(error):
        asked()
    assert asked()


def test_an_answer_about_another_image_is_not_believed(source: Glance, origin: ScriptedOrigin) -> None:
    origin.change(IMAGE, properties={"id": UNKNOWN})
    with pytest.raises(OriginUnavailable):
        ask(source.image, IMAGE)


def test_a_404_of_what_is_no_glance_says_nothing(source: Glance, origin: ScriptedOrigin) -> None:
    for kind in (Kind.IMAGE, Kind.LIST):
        origin.fault(Status(404, HTML, b"<h1>nginx</h1>"), kind=kind)
    with pytest.raises(OriginUnavailable):
        ask(source.image, IMAGE)
    assert ask(source.image, IMAGE)["id"] == IMAGE


# ── Several endpoints ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def second() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)]) as origin:
        yield origin


def test_the_second_endpoint_serves_while_the_first_is_dead_and_until_it_is_back(
    tmp_path: Path, origin: ScriptedOrigin, second: ScriptedOrigin
) -> None:
    source = source_of(tmp_path, origin.url, second.url)
    origin.stop()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(source.endpoints.run)
            for _ in range(4):
                await right(source)
                assert (await source.image(IMAGE))["id"] == IMAGE
            first, other = source.endpoints.status()["endpoints"]
            assert (first["state"], other["state"], other["in_use"]) == ("open", "closed", True)
            assert "connection refused" in first["last_error"]
            before = second.data_requests
            origin.start()
            with trio.fail_after(10):
                while not source.endpoints.status()["endpoints"][0]["in_use"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await right(source)
            assert (origin.data_requests, second.data_requests) == (1, before)
            second.stop()
            await right(source)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def right(source: Glance) -> None:
    sink = Collected()
    await source.fetch(IMAGE, SIZE, Extent(START, END), sink)
    assert sink.data == BYTES(START, END - START)


def test_when_no_endpoint_is_asked_any_more_it_is_said_at_once(tmp_path: Path, origin: ScriptedOrigin) -> None:
    source = source_of(tmp_path, origin.url)
    origin.stop()
    for _ in range(3):
        with pytest.raises(NotReached):
            fetched(source)
    origin.start()
    with pytest.raises(OriginAway, match="after 3 failures: NotReached"):
        fetched(source)
    with pytest.raises(OriginAway):
        ask(source.images)
    assert origin.requests == []


def test_a_body_that_was_begun_is_not_begun_anew_elsewhere(
    tmp_path: Path, origin: ScriptedOrigin, second: ScriptedOrigin
) -> None:
    source = source_of(tmp_path, origin.url, second.url)
    origin.fault(Cut(100 * KIB))
    sink = Collected()
    with pytest.raises(OriginUnavailable):
        fetch(source, sink)
    assert sink.data == BYTES(START, len(sink.data))
    assert second.requests == []


@pytest.mark.parametrize("fault", [Status(500), Status(503), HangUp()], ids=["500", "503", "hung up"])
def test_the_second_endpoint_serves_while_the_first_is_unwell(
    tmp_path: Path, origin: ScriptedOrigin, second: ScriptedOrigin, fault: Fault
) -> None:
    source = source_of(tmp_path, origin.url, second.url)
    origin.fault(fault)
    assert fetched(source) == BYTES(START, END - START)
    assert second.data_requests == 1


def test_what_one_endpoint_says_of_an_image_is_said(
    tmp_path: Path, origin: ScriptedOrigin, second: ScriptedOrigin
) -> None:
    source = source_of(tmp_path, origin.url, second.url)
    origin.fault(Status(403))
    with pytest.raises(ImageForbidden):
        fetched(source)
    with pytest.raises(ImageGone):
        ask(source.image, UNKNOWN)
    assert second.requests == []


def test_the_bytes_of_an_image_that_is_gone(source: Glance, origin: ScriptedOrigin) -> None:
    origin.remove(IMAGE)
    with pytest.raises(ImageGone):
        fetched(source)


def test_a_first_endpoint_that_is_no_glance(
    tmp_path: Path, origin: ScriptedOrigin, second: ScriptedOrigin
) -> None:
    def proxy(request: Request) -> Fault:
        return Status(404, HTML, b"<h1>nginx</h1>")

    origin.script = proxy
    for work in (lambda source: ask(source.image, IMAGE), fetched):
        assert work(source_of(tmp_path, origin.url, second.url))
    assert len(origin.data) == 1


# ── A scripted Keystone ───────────────────────────────────────────────────────────────────────────────


def password(auth_url: str) -> dict[str, object]:
    return {
        "auth_type": "password", "auth_url": auth_url, "username": "cachefs", "password": "pa$$ word",
        "project_name": "service", "user_domain_id": "default", "project_domain_id": "default",
    }  # fmt: skip


def test_a_token_that_was_expired_is_renewed(tmp_path: Path) -> None:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)], auth=True) as origin:
        source = source_of(tmp_path, **password(origin.auth_url))
        for issued in (1, 2, 3):
            assert fetched(source) == BYTES(START, END - START)
            assert ask(source.image, IMAGE)["id"] == IMAGE
            assert len(ask(source.images)) == 1
            assert origin.tokens_issued == issued
            origin.expire_tokens()


def test_a_401_to_the_question_which_versions_there_are_is_an_error_and_no_deadlock(tmp_path: Path) -> None:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)], auth=True) as origin:
        source = source_of(tmp_path, **password(origin.auth_url))
        origin.fault(*[Status(401)] * 4, kind=Kind.DISCOVERY)
        with pytest.raises(OriginUnauthorized):
            fetched(source)
        origin.clear()
        assert fetched(source) == BYTES(START, END - START)


def test_a_token_that_is_about_to_expire_is_renewed_before(tmp_path: Path) -> None:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)], auth=True, token_life_s=1) as origin:
        source = source_of(tmp_path, **password(origin.auth_url))
        for _ in range(2):
            assert fetched(source) == BYTES(START, END - START)
        assert origin.tokens_issued >= 2
        assert {request.status for request in origin.data} == {206}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Status(401), OriginUnauthorized),
        (Status(403), OriginUnauthorized),
        (Status(404), OriginUnauthorized),
        (Status(429), IdentityUnavailable),
        (Status(500), IdentityUnavailable),
        (Status(503), IdentityUnavailable),
        (HangUp(), IdentityUnavailable),
        (Status(201, JSON, b"{}"), IdentityUnavailable),
        (Status(200, HTML, b"<html>Welcome</html>"), IdentityUnavailable),
    ],
)  # fmt: skip
def test_a_keystone_that_gives_no_token(tmp_path: Path, fault: Fault, error: type[OriginError]) -> None:
    """What Keystone answers says nothing of the image, whatever it is."""
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)], auth=True) as origin:
        source = source_of(tmp_path, **password(origin.auth_url))
        works: tuple[Callable[[], object], ...] = (
            lambda: fetched(source), lambda: ask(source.image, IMAGE), lambda: ask(source.images),
        )  # fmt: skip
        for work in works[:2]:
            origin.fault(fault, fault, kind=Kind.TOKEN)
            with pytest.raises(error) as raised:
                work()
            assert type(raised.value) is error
        status = source.endpoints.status()
        assert status["endpoints"][0]["failures"] == 0
        assert (status["identity"]["failures"], status["images"]) == (2, {})
        origin.clear()
        assert fetched(source) == BYTES(START, END - START)
        assert source.endpoints.status()["identity"]["trouble"] is None
        for _ in range(3):
            origin.expire_tokens()
            origin.fault(fault, fault, kind=Kind.TOKEN)
            with pytest.raises(OriginError):
                works[2]()
        asked = len(origin.requests)
        with pytest.raises(OriginUnauthorized if error is OriginUnauthorized else OriginAway):
            works[2]()
        assert len(origin.requests) == asked, "Keystone is left alone for a while"
        assert source.endpoints.status()["endpoints"][0]["state"] == "closed"


# ── A real Glance ─────────────────────────────────────────────────────────────────────────────────────

REAL_SIZE: Final = 5 * MIB + 321


def data_of(seed: int) -> bytes:
    return pattern(REAL_SIZE, seed)(0, REAL_SIZE)


@pytest.mark.cloud
@pytest.mark.mount
def test_two_images_at_once(tmp_path: Path, glance: cloud.Glance) -> None:
    images = {glance.upload(f"at once {seed}", data_of(seed)): data_of(seed) for seed in (1, 2)}
    with Node(tmp_path, glance.endpoint) as node, ThreadPoolExecutor(4) as pool:
        reads = [
            (image, pool.submit(read, node.path(image), 0, REAL_SIZE))
            for image in images
            for read in (read_buffered, read_direct)
        ]
        for image, read in reads:
            assert read.result(timeout=60) == images[image]
        for image, data in images.items():
            assert node.path(image).stat().st_size == len(data)
            assert image in os.listdir(node.mountpoint / "images")


@pytest.mark.cloud
@pytest.mark.mount
def test_a_glance_that_restarts_during_a_read(tmp_path: Path, private_glance: cloud.Glance) -> None:
    image = private_glance.upload("restart", data_of(3))
    with Node(tmp_path, private_glance.endpoint, glance={"retries": 20}, mount={"read_deadline": 120}) as node:
        path = node.path(image)
        assert read_buffered(path, 0, 4096) == data_of(3)[:4096]
        private_glance.stop()
        with path.open("rb") as opened, ThreadPoolExecutor(1) as pool:
            read = pool.submit(os.pread, opened.fileno(), 4096, 4 * MIB)
            try:
                node.wait_for_status(lambda now: now["fetcher"]["retries"] > 0)
                assert not read.done()
                assert os.pread(opened.fileno(), 4096, 0) == data_of(3)[:4096]
            finally:
                private_glance.start()
            assert read.result(timeout=60) == data_of(3)[4 * MIB : 4 * MIB + 4096]
        assert path.read_bytes() == data_of(3)


@pytest.mark.cloud
@pytest.mark.mount
def test_an_image_that_is_deleted_meanwhile(tmp_path: Path, glance: cloud.Glance) -> None:
    image = glance.upload("to be deleted", data_of(4))
    with Node(tmp_path, glance.endpoint, glance={"listing_ttl": 0, "connections": 1}) as node:
        path = node.path(image)
        opened = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            right = read_direct(path, 0, 64 * KIB)
            node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
            glance.delete(image)
            assert errno_of(lambda: os.pread(opened, 4096, REAL_SIZE // 4096 * 4096)) == errno.EIO
            assert read_at(opened, 0, 64 * KIB) == right == data_of(4)[: 64 * KIB]
            assert errno_of(lambda: os.open(path, os.O_RDONLY)) == errno.ENOENT
            assert image not in os.listdir(node.mountpoint / "images")
            assert read_at(opened, 0, 64 * KIB) == right
        finally:
            os.close(opened)


def read_at(file: int, offset: int, length: int) -> bytes:
    return os.pread(file, length, offset)


def keystone_node(folder: Path, cloud: KeystoneCloud, user: str, **glance: object) -> Node:
    return Node(folder, glance=cloud.keystone.password_options(user) | glance)


@pytest.mark.cloud
def test_a_password_and_an_application_credential(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload("credentials", data_of(5))
    for options in (keystone.password_options("cachefs"), keystone.application_credential_options("cachefs")):
        source = source_of(tmp_path, **options)
        sink = Collected()
        trio.run(source.fetch, image, REAL_SIZE, Extent(4097, 2 * MIB), sink)
        assert sink.data == data_of(5)[4097 : 2 * MIB]
        assert ask(source.image, image)["size"] == REAL_SIZE
        assert image in [found["id"] for found in ask(source.images)]


@pytest.mark.cloud
@pytest.mark.mount
def test_wrong_credentials(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    """The mount is there, says what is wrong, and works as soon as they are right."""
    image = keystone_cloud.glance.upload("wrong credentials", data_of(6), visibility="community")
    right = keystone_cloud.keystone.password_options("cachefs")
    node = Node(tmp_path, glance=right | {"password": "wrong"})
    with node:
        assert errno_of(node.path(image).stat) == errno.EIO
        assert os.listdir(node.mountpoint / "images") == []
        assert "the credentials are refused" in node.status()["images"]["glance_trouble"]
        assert "wrong" not in node.log.replace("wrong_credentials", "")
    node.configure(glance=right)
    with node:
        assert read_buffered(node.path(image), 0, 4096) == data_of(6)[:4096]
    node.configure(glance={"password": "wrong"})
    with node:  # A known image is not lost by it.
        assert read_direct(node.path(image), 0, 4096) == data_of(6)[:4096]
        assert errno_of(lambda: read_direct(node.path(image), 4 * MIB + 512 * KIB, 4096)) == errno.EIO
        assert node.path(image).stat().st_size == REAL_SIZE


@pytest.mark.cloud
@pytest.mark.mount
def test_a_token_is_revoked_between_two_reads(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload("revoked", data_of(7), visibility="community")
    node = Node(tmp_path, glance=keystone.application_credential_options("cachefs") | {"connections": 1})
    with node:
        path = node.path(image)
        assert read_direct(path, 0, 4096) == data_of(7)[:4096]
        keystone.revoke_tokens("cachefs")
        assert read_direct(path, 4 * MIB + 512 * KIB, 4096) == data_of(7)[4 * MIB + 512 * KIB :][:4096]
        keystone.revoke_tokens("cachefs")
        glance.upload("after the revocation", data_of(7), visibility="community")
        assert errno_of(node.path(UNKNOWN).stat) == errno.ENOENT


@pytest.mark.cloud
@pytest.mark.mount
def test_what_the_service_user_may_not(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    glance = keystone_cloud.glance
    unseen = glance.upload("unseen", data_of(8), user="other", visibility="private")
    seen = glance.upload("seen", data_of(8), visibility="community")
    with keystone_node(tmp_path, keystone_cloud, "reader", listing_ttl=0) as node:
        assert errno_of(node.path(unseen).stat) == errno.ENOENT
        assert node.path(seen).stat().st_size == REAL_SIZE
        assert errno_of(lambda: read_buffered(node.path(seen), 0, 1)) == errno.EIO  # 403: not for readers.
        listed = os.listdir(node.mountpoint / "images")
        assert seen in listed
        assert unseen not in listed


@pytest.mark.cloud
@pytest.mark.mount
def test_an_image_that_is_deactivated_meanwhile(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    glance = keystone_cloud.glance
    image = glance.upload("to be deactivated", data_of(9), visibility="community")
    with keystone_node(tmp_path, keystone_cloud, "cachefs", listing_ttl=0, connections=1) as node:
        path = node.path(image)
        opened = os.open(path, os.O_RDONLY)
        try:
            assert read_at(opened, 0, 4096) == data_of(9)[:4096]
            node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
            glance.deactivate(image)
            assert errno_of(lambda: read_direct(path, 0, 4096)) == errno.EACCES
            assert errno_of(lambda: read_at(opened, 5 * MIB, 100)) == errno.EIO
            assert read_at(opened, 0, 4096) == data_of(9)[:4096]
            glance.reactivate(image)
            assert read_at(opened, 5 * MIB, 100) == data_of(9)[5 * MIB : 5 * MIB + 100]
            assert read_direct(path, 0, 4096) == data_of(9)[:4096]
        finally:
            os.close(opened)
