"""The scripted origin does what it is told, as real clients see it."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import glanceclient
import pytest
import requests
from glanceclient import exc as glance_exc
from keystoneauth1 import adapter, noauth, session
from keystoneauth1.exceptions import http as ksa_http
from keystoneauth1.identity import v3

from tests.origin import (
    LOOPBACK,
    PAGE_IMAGES_DEFAULT,
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
    literal,
    pattern,
    pattern_mask,
)

SIZE = 1 << 20
TIB = 1 << 40
IMAGE = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
BYTES = pattern(SIZE)


def image(image_id: str = IMAGE, **known: object) -> OriginImage:
    return replace(OriginImage(image_id, "debian", SIZE, BYTES), **known)  # type: ignore[arg-type]


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([image()]) as origin:
        yield origin


@pytest.fixture
def http_session() -> Iterator[requests.Session]:
    with requests.Session() as http_session:
        http_session.trust_env = False
        yield http_session


class Reader:
    """Reads data of the image with ranges, over kept connections."""

    def __init__(self, origin: ScriptedOrigin, http_session: requests.Session) -> None:
        self.origin, self.http = origin, http_session

    def __call__(self, range: str | None = None, image_id: str = IMAGE, **headers: str) -> requests.Response:
        if range is not None:
            headers["Range"] = range
        url = f"{self.origin.url}/v2/images/{image_id}/file"
        return self.http.get(url, headers=headers, timeout=10)


@pytest.fixture
def read(origin: ScriptedOrigin, http_session: requests.Session) -> Reader:
    return Reader(origin, http_session)


def received_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


# Contents


@pytest.mark.parametrize("offset", [0, 8, 65528, 65536, 1 << 30, TIB, 2 * TIB - 8])
def test_each_word_of_a_pattern_tells_its_offset(offset: int) -> None:
    word = pattern(2 * TIB, seed=3)(offset, 8)
    assert int.from_bytes(word) ^ pattern_mask(3) == offset


def test_a_pattern_is_the_same_however_it_is_read() -> None:
    content = pattern(200_000)
    whole = content(0, 200_000)
    for offset in (0, 1, 65535, 65536, 131_073, 199_999):
        assert content(offset, 70_001) == whole[offset : offset + 70_001]
    assert content(200_000, 1) == b""


def test_no_two_pages_of_two_patterns_are_equal_or_zero() -> None:
    pages = [pattern(SIZE, seed)(at, 4096) for seed in range(3) for at in range(0, SIZE, 4096)]
    assert len(set(pages) | {bytes(4096)}) == len(pages) + 1


# Ranges, as Glance has them


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=4096-8191", 4096, 8192),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=10-{SIZE + 10}", 10, SIZE),
        ("bytes=-5", SIZE - 5, SIZE),
        (f"bytes=-{SIZE + 1}", 0, SIZE),
        ("BYTES = 1 - 2", 1, 3),
    ],
)
def test_a_range_gives_206(read: Reader, asked: str, start: int, stop: int) -> None:
    got = read(asked)
    assert got.status_code == 206
    assert got.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert got.content == BYTES(start, stop - start)
    assert read.origin.data[0].extent == (start, stop)
    assert read.origin.data[0].range == asked


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=0-1,3-4", 400),
        ("nonsense", 416),
        ("bytes=-", 416),
        ("bytes=5-4", 416),
        (f"bytes={SIZE}-", 416),
    ],
)
def test_a_bad_range_is_refused(read: Reader, asked: str, status: int) -> None:
    assert read(asked).status_code == status
    assert read.origin.data[0].extent is None


def test_a_content_range_in_the_request_is_a_range(read: Reader) -> None:
    got = read(**{"Content-Range": "bytes 10-19/*"})
    assert (got.status_code, got.content) == (206, BYTES(10, 10))
    assert read(**{"Content-Range": f"bytes 10-{SIZE}/*"}).status_code == 416
    assert read(**{"Content-Range": "bytes */*"}).status_code == 416


def test_no_range_gives_all(read: Reader) -> None:
    got = read()
    assert (got.status_code, got.content) == (200, BYTES(0, SIZE))
    assert "Content-Range" not in got.headers
    assert read.origin.data[0].extent is None


def test_the_md5_is_of_the_whole_image(read: Reader) -> None:
    whole = image().hashed()
    read.origin.add(whole)
    assert read("bytes=0-0").headers["Content-MD5"] == whole.checksum


def test_a_store_without_random_access_refuses_ranges(read: Reader) -> None:
    read.origin.change(IMAGE, ranges=False)
    got = read("bytes=0-")
    assert got.status_code == 400
    assert "Getting images randomly" in got.text
    assert read().content == BYTES(0, SIZE)


def test_without_locations_there_is_no_content(read: Reader) -> None:
    read.origin.change(IMAGE, locations=False)
    assert read("bytes=0-0").status_code == 204
    assert read().status_code == 204


def test_a_queued_image_has_no_size_to_range_over(read: Reader) -> None:
    read.origin.change(IMAGE, status="queued", size=None)
    assert read().status_code == 204
    assert read("bytes=0-0").status_code == 500


def test_a_deactivated_image_is_forbidden_except_to_admins(read: Reader) -> None:
    read.origin.change(IMAGE, status="deactivated")
    assert read("bytes=0-0").status_code == 403
    read.origin.admin = True
    assert read("bytes=0-0").status_code == 206


def test_an_unknown_image_is_404(read: Reader) -> None:
    assert read(image_id=OTHER).status_code == 404
    read.origin.remove(IMAGE)
    assert read().status_code == 404


def test_an_image_of_two_tebibytes_is_served_at_its_end(read: Reader) -> None:
    read.origin.add(OriginImage(OTHER, "big", 2 * TIB, pattern(2 * TIB, 7)))
    got = read(f"bytes={2 * TIB - 4096}-", OTHER)
    assert got.content == pattern(2 * TIB, 7)(2 * TIB - 4096, 4096)
    assert got.headers["Content-Range"] == f"bytes {2 * TIB - 4096}-{2 * TIB - 1}/{2 * TIB}"


# Faults


def test_faults_are_met_in_order_and_none_is_a_right_answer(read: Reader) -> None:
    read.origin.fault(Status(503), None, Status(429, {"Retry-After": "7"}, b"slow down"))
    answers = [read("bytes=0-9") for _ in range(4)]
    assert [got.status_code for got in answers] == [503, 206, 429, 206]
    assert (answers[2].headers["Retry-After"], answers[2].content) == ("7", b"slow down")


def test_a_script_decides_where_the_queue_is_empty(read: Reader) -> None:
    def script(request: Request) -> Fault | None:
        assert request.kind is Kind.DATA
        return Status(502) if request.extent == (0, 10) else None

    read.origin.script = script
    read.origin.fault(None)
    assert [read("bytes=0-9").status_code for _ in range(2)] == [206, 502]
    assert read("bytes=1-9").status_code == 206


@pytest.mark.parametrize("after", [0, 1, 4096])
def test_cut_sends_so_many_bytes(read: Reader, after: int) -> None:
    read.origin.fault(Cut(after))
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match=f"{after} bytes read"):
        read("bytes=0-65535")
    assert read.origin.data[0].bytes_sent == after
    assert read("bytes=0-9").content == BYTES(0, 10)


def test_cut_with_reset_resets(read: Reader) -> None:
    read.origin.fault(Cut(0, reset=True))
    with socket.create_connection((LOOPBACK, read.origin.port)) as connection:
        connection.sendall(b"GET /v2/images/%s/file HTTP/1.1\r\n\r\n" % IMAGE.encode())
        with pytest.raises(ConnectionResetError):
            received_to_end(connection)


@pytest.mark.parametrize("reset", [False, True])
def test_hang_up_answers_nothing(read: Reader, reset: bool) -> None:
    read.origin.fault(HangUp(reset))
    with pytest.raises(requests.exceptions.ConnectionError):
        read("bytes=0-9")
    assert read.origin.data[0].status is None


def test_trickle_sends_piece_by_piece(read: Reader) -> None:
    read.origin.fault(Trickle(size=10, every_s=0.01))
    assert read("bytes=0-94").content == BYTES(0, 95)
    read.origin.fault(Trickle(size=1, every_s=3600))
    url = f"{read.origin.url}/v2/images/{IMAGE}/file"
    with read.http.get(url, stream=True, timeout=10) as got:
        assert got.raw.read(1) == BYTES(0, 1)
        read.origin.wait_for(lambda: read.origin.data[-1].bytes_sent == 1)
        assert not read.origin.data[-1].done


def test_stall_sends_the_rest_when_released(read: Reader) -> None:
    stall = Stall(after=1000)
    read.origin.fault(stall)
    with read.http.get(f"{read.origin.url}/v2/images/{IMAGE}/file", stream=True, timeout=10) as got:
        assert got.raw.read(1000) == BYTES(0, 1000)
        read.origin.wait_for(lambda: read.origin.held == 1)
        assert read.origin.data[0].bytes_sent == 1000
        stall.release.set()
        assert got.raw.read() == BYTES(1000, SIZE)
    read.origin.wait_for(lambda: read.origin.data[0].done)
    assert read.origin.held == 0


def test_slow_headers_come_when_released(origin: ScriptedOrigin) -> None:
    slow = SlowHeaders()
    origin.fault(slow)
    connection = http.client.HTTPConnection(LOOPBACK, origin.port, timeout=10)
    connection.request("GET", f"/v2/images/{IMAGE}/file", headers={"Range": "bytes=0-9"})
    origin.wait_for(lambda: origin.held == 1)
    assert origin.data[0].status is None
    slow.release.set()
    assert connection.getresponse().read() == BYTES(0, 10)
    connection.close()


def test_ignore_range_gives_all(read: Reader) -> None:
    read.origin.fault(IgnoreRange())
    got = read("bytes=10-19")
    assert (got.status_code, got.content) == (200, BYTES(0, SIZE))
    assert "Content-Range" not in got.headers


def test_refuse_range_is_for_ranges_only(read: Reader) -> None:
    read.origin.fault(RefuseRange(), RefuseRange())
    got = read("bytes=10-19")
    assert got.status_code == 400
    assert "Getting images randomly" in got.text
    assert read().status_code == 200


@pytest.mark.parametrize(
    ("fault", "said", "length"),
    [
        (WrongContentRange(shift=100), f"bytes 110-119/{SIZE}", 10),
        (WrongTotal(999), "bytes 10-19/999", 10),
        (WrongTotal(None), "bytes 10-19/*", 10),
        (ShortLength(by=3), f"bytes 10-19/{SIZE}", 7),
        (LongBody(extra=3), f"bytes 10-19/{SIZE}", 13),
    ],
)
def test_lies_about_the_range(read: Reader, fault: Fault, said: str, length: int) -> None:
    read.origin.fault(fault)
    got = read("bytes=10-19")
    assert (got.status_code, got.headers["Content-Range"]) == (206, said)
    assert got.headers["Content-Length"] == str(length)
    assert got.content == (BYTES(10, 10) + bytes(3))[:length]


def test_an_undeclared_long_body_lies_behind_the_answer(origin: ScriptedOrigin) -> None:
    origin.fault(LongBody(extra=5, declared=False))
    with socket.create_connection((LOOPBACK, origin.port)) as connection:
        request = f"GET /v2/images/{IMAGE}/file HTTP/1.1\r\nRange: bytes=0-9\r\n\r\n"
        connection.sendall(request.encode())
        head, _, body = received_to_end(connection).partition(b"\r\n\r\n")
    assert b"Content-Length: 10\r\n" in head
    assert body == BYTES(0, 10) + bytes(5)


# What is recorded


def test_requests_and_counts(read: Reader) -> None:
    read("bytes=0-99")
    read(f"bytes={SIZE}-")
    read.http.get(f"{read.origin.url}/v2/images/{IMAGE}", timeout=10)
    origin = read.origin
    assert all(r.done for r in origin.data), "an answer that has come is done"
    assert [r.kind for r in origin.requests] == [Kind.DATA, Kind.DATA, Kind.IMAGE]
    assert [r.number for r in origin.requests] == [0, 1, 2]
    assert [r.status for r in origin.requests] == [206, 416, 200]
    assert [r.image for r in origin.requests] == [IMAGE] * 3
    assert (origin.data_requests, origin.bytes_sent, origin.in_flight) == (2, 100, 0)
    assert origin.in_flight_peak == 1
    assert len(origin.of_kind(Kind.DATA, OTHER)) == 0
    origin.clear()
    assert (origin.requests, origin.data_requests, origin.bytes_sent) == ([], 0, 0)


def test_requests_in_flight_are_counted(origin: ScriptedOrigin) -> None:
    release = threading.Event()
    origin.script = lambda request: SlowHeaders(release)
    connections = [http.client.HTTPConnection(LOOPBACK, origin.port, timeout=10) for _ in range(3)]
    for connection in connections:
        connection.request("GET", f"/v2/images/{IMAGE}/file")
    origin.wait_for(lambda: origin.held == 3)
    assert (origin.in_flight, origin.in_flight_peak) == (3, 3)
    release.set()
    for connection in connections:
        assert len(connection.getresponse().read()) == SIZE
        connection.close()
    origin.wait_for(lambda: origin.in_flight == 0)


def test_what_nothing_serves_is_recorded_too(read: Reader) -> None:
    assert read.http.delete(f"{read.origin.url}/v2/images/{IMAGE}", timeout=10).status_code == 405
    assert read.http.get(f"{read.origin.url}/v2/tasks", timeout=10).status_code == 404
    assert [(r.kind, r.method) for r in read.origin.requests] == [(Kind.OTHER, "DELETE"), (Kind.OTHER, "GET")]


def test_waiting_in_vain_says_what_was_asked(origin: ScriptedOrigin) -> None:
    with pytest.raises(TimeoutError, match="requests"):
        origin.wait_for(lambda: origin.data_requests == 1, timeout_s=0)


def test_a_failing_content_fails_the_test() -> None:
    def broken(offset: int, length: int) -> bytes:
        raise ZeroDivisionError

    origin = ScriptedOrigin([image(content=broken)])
    origin.start()
    connection = http.client.HTTPConnection(LOOPBACK, origin.port, timeout=10)
    connection.request("GET", f"/v2/images/{IMAGE}/file")
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()
    connection.close()
    with pytest.raises(ZeroDivisionError):
        origin.close()


# Its life


def test_the_port_stays_over_stop_and_start(read: Reader) -> None:
    assert read("bytes=0-9").status_code == 206
    before = read.origin.port
    read.origin.stop()
    with pytest.raises(requests.exceptions.ConnectionError):
        read("bytes=0-9")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, before)).close()
    read.origin.start()
    assert read.origin.port == before
    assert read("bytes=0-9").content == BYTES(0, 10)


@pytest.mark.parametrize("fault", [Stall(), SlowHeaders(), Trickle(1, 3600), None])
def test_nothing_is_left_behind(fault: Fault | None) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with ScriptedOrigin([image()]) as origin:
        origin.fault(fault)
        connection = http.client.HTTPConnection(LOOPBACK, origin.port, timeout=10)
        connection.request("GET", f"/v2/images/{IMAGE}/file", headers={"Range": "bytes=0-9"})
        origin.wait_for(lambda: origin.held == 1 or origin.bytes_sent > 0)
        stop_began_s = time.monotonic()
    assert time.monotonic() - stop_began_s < 60, "it does not wait for what it holds"
    connection.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


# With OpenStack's own clients


def glance(origin: ScriptedOrigin, auth: object = None) -> glanceclient.v2.client.Client:
    auth = auth or noauth.NoAuth(endpoint=origin.url)
    return glanceclient.Client("2", session=session.Session(auth=auth), interface="public")  # type: ignore[arg-type]


def test_glanceclient_lists_every_page(origin: ScriptedOrigin) -> None:
    ids = [f"{n:08x}-0000-0000-0000-000000000000" for n in range(7)]
    origin.remove(IMAGE)
    origin.add(*(image(image_id) for image_id in ids))
    assert [found.id for found in glance(origin).images.list(page_size=3)] == ids
    assert [r.query.get("marker") for r in origin.of_kind(Kind.LIST)] == [None, ids[2], ids[5]]


def test_a_full_last_page_has_a_next_link(origin: ScriptedOrigin) -> None:
    assert len(list(glance(origin).images.list(page_size=1))) == 1
    assert len(origin.of_kind(Kind.LIST)) == 2


def test_glanceclient_filters(origin: ScriptedOrigin) -> None:
    origin.add(
        image(OTHER, os_hidden=True, visibility="private"),
        image(OTHER.replace("9", "8"), visibility="community"),
    )
    images = glance(origin).images

    def listed(**filters: str) -> list[str]:
        return [found.id for found in images.list(filters=filters)]

    assert listed() == [IMAGE]
    assert listed(os_hidden="true") == [OTHER]
    assert listed(visibility="all") == [IMAGE, OTHER.replace("9", "8")]
    assert listed(visibility="all", os_hidden="true") == [OTHER]
    assert listed(visibility="private") == []
    assert listed(name="fedora") == []
    with pytest.raises(glance_exc.HTTPBadRequest):
        listed(os_hidden="perhaps")
    with pytest.raises(glance_exc.HTTPBadRequest):
        list(images.list(marker="unknown"))


def test_a_page_has_25_images_unless_asked(origin: ScriptedOrigin, http_session: requests.Session) -> None:
    origin.add(*(image(f"{n:08x}-0000-0000-0000-000000000000") for n in range(40)))
    body = http_session.get(f"{origin.url}/v2/images", timeout=10).json()
    assert len(body["images"]) == PAGE_IMAGES_DEFAULT
    assert body["next"].startswith("/v2/images?marker=")


def test_glanceclient_shows_an_image(origin: ScriptedOrigin) -> None:
    origin.add(OriginImage.of(OTHER, "small", b"bytes", properties={"os_type": "linux"}, tags=("a",)))
    found = glance(origin).images.get(OTHER)
    assert (found.name, found.size, found.os_type, found.tags) == ("small", 5, "linux", ["a"])
    assert found.os_hash_algo == "sha512"
    with pytest.raises(glance_exc.HTTPNotFound):
        glance(origin).images.get(IMAGE.replace("1", "7"))


def test_glanceclient_verifies_a_download(origin: ScriptedOrigin) -> None:
    good = OriginImage.of(OTHER, "small", b"bytes")
    origin.add(good, image(content=literal(b"other")), replace(good, id=IMAGE, content=literal(b"other")))
    assert b"".join(glance(origin).images.data(OTHER)) == b"bytes"
    with pytest.raises(OSError, match="Corrupt"):
        b"".join(glance(origin).images.data(IMAGE))


def test_properties_may_contradict(origin: ScriptedOrigin) -> None:
    origin.change(IMAGE, properties={"size": 12, "status": "importing"})
    found = glance(origin).images.get(IMAGE)
    assert (found.size, found.status) == (12, "importing")


def keystone(origin: ScriptedOrigin) -> v3.Password:
    return v3.Password(
        auth_url=origin.auth_url,
        username="cachefs",
        password="secret",
        user_domain_id="default",
        project_name="service",
        project_domain_id="default",
    )


def test_a_token_is_renewed_after_401() -> None:
    with ScriptedOrigin([image()], auth=True) as origin:
        images = glance(origin, keystone(origin)).images
        assert [found.id for found in images.list()] == [IMAGE]
        assert origin.tokens == {"token-1"}
        origin.expire_tokens()
        assert images.get(IMAGE).id == IMAGE
        assert origin.tokens == {"token-2"}
        asked = [r for r in origin.requests if r.kind is Kind.IMAGE]
        assert [r.status for r in asked] == [401, 200]
        assert [r.headers["x-auth-token"] for r in asked] == ["token-1", "token-2"]
        assert b"secret" in origin.of_kind(Kind.TOKEN)[0].body


def test_without_a_token_there_is_401_for_data_too(http_session: requests.Session) -> None:
    with ScriptedOrigin([image()], auth=True) as origin:
        read = Reader(origin, http_session)
        assert read("bytes=0-9").status_code == 401
        assert read("bytes=0-9", **{"X-Auth-Token": "token-1"}).status_code == 401
        origin.tokens.add("mine")
        assert read("bytes=0-9", **{"X-Auth-Token": "mine"}).status_code == 206


def test_a_session_reads_ranges_through_the_catalog() -> None:
    with ScriptedOrigin([image()], auth=True) as origin, requests.Session() as pool:
        pool.trust_env = False
        client = adapter.Adapter(
            session.Session(auth=keystone(origin), session=pool), service_type="image", interface="public"
        )
        got = client.get(f"/v2/images/{IMAGE}/file", headers={"Range": "bytes=5-9"})
        assert (got.status_code, got.content) == (206, BYTES(5, 5))
        assert client.get_api_major_version() == (2, 17)


def test_a_keystone_can_fail() -> None:
    with ScriptedOrigin([image()], auth=True) as origin:
        origin.fault(Status(401), Status(503), kind=Kind.TOKEN)
        auth = keystone(origin)
        client = session.Session(auth=auth)
        with pytest.raises(ksa_http.Unauthorized):
            auth.get_token(client)
        with pytest.raises(ksa_http.ServiceUnavailable):
            auth.get_token(client)
        assert auth.get_token(client) == "token-1"


def test_an_expired_token_is_known_by_its_time() -> None:
    with ScriptedOrigin([image()], auth=True, token_life_s=60) as origin:
        auth = keystone(origin)
        client = session.Session(auth=auth)
        assert [auth.get_token(client) for _ in range(2)] == ["token-1", "token-2"]


def test_the_versions_are_found(origin: ScriptedOrigin, http_session: requests.Session) -> None:
    assert http_session.get(origin.url, timeout=10).status_code == 300
    assert http_session.get(f"{origin.url}/versions", timeout=10).json()["versions"][0]["id"] == "v2.17"
    assert http_session.get(origin.auth_url, timeout=10).json()["version"]["id"] == "v3.14"
