"""Requests to Glance bear an id, and a failure says it, with the one that the answer bore."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trio

from cachefs.errors import ImageGone, OriginBusy, OriginError, OriginUnavailable, ReadDeadline
from cachefs.plan.extents import Extent
from cachefs.sources import request_ids
from cachefs.sources.glance import Glance
from tests import cloud
from tests.node import Node, errno_of, read_direct
from tests.origin import Cut, HangUp, Kind, OriginImage, Request, ScriptedOrigin, Status, pattern
from tests.test_glance_source import Collected, source_of

SIZE: Final = 1 << 20
IMAGE: Final = "70000000-0000-4000-8000-000000000001"
UNKNOWN: Final = "70000000-0000-4000-8000-00000000dead"
ID: Final = r"req-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
THEIRS: Final = "req-0badc0de-0000-4000-8000-0123456789ab"


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(IMAGE, None, SIZE, pattern(SIZE))]) as origin:
        yield origin


@pytest.fixture
def source(tmp_path: Path, origin: ScriptedOrigin) -> Glance:
    return source_of(tmp_path, origin.url)


def failure_of(source: Glance, image: str = IMAGE) -> OriginError:
    with pytest.raises(OriginError) as caught:
        trio.run(source.fetch, image, SIZE, Extent(0, SIZE), Collected())
    return caught.value


def id_of(request: Request) -> str:
    return request.headers["x-openstack-request-id"]


def test_every_request_bears_an_id_and_each_question_its_own(source: Glance, origin: ScriptedOrigin) -> None:
    async def ask() -> None:
        await source.fetch(IMAGE, SIZE, Extent(0, SIZE), Collected())
        await source.image(IMAGE)
        await source.images()

    trio.run(ask)
    ids = [id_of(request) for request in origin.requests]
    assert all(re.fullmatch(ID, one) for one in ids)
    data, shown, *listed = ids
    assert len({data, shown, *listed}) == 3, "the pages of a listing are one question"


def test_a_failure_says_our_id_and_theirs(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(Status(503, {"X-Openstack-Request-Id": THEIRS}))
    error = failure_of(source)
    ours = id_of(origin.requests[0])
    assert isinstance(error, OriginBusy)
    assert error.requests == f"{ours}, answered as {THEIRS}"
    assert str(error).endswith(f" ({ours}, answered as {THEIRS})")
    assert str(error.again()) == str(error), "each who waited for it can say so"


def test_a_failure_in_the_middle_of_a_body_says_them_too(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(Cut(after=4096))
    error = failure_of(source)
    assert isinstance(error, OriginUnavailable)
    ours = id_of(origin.requests[0])
    assert re.fullmatch(rf"{ours}, answered as {ID}", error.requests)


def test_without_an_answer_there_is_one_id(source: Glance, origin: ScriptedOrigin) -> None:
    origin.fault(HangUp())
    assert re.fullmatch(ID, failure_of(source).requests)


@pytest.mark.parametrize("theirs", ["x" * 5000, "req-short", "req-\x1b[31m-red", f"{THEIRS} {THEIRS}"])
def test_what_is_no_id_does_not_come_into_the_log(source: Glance, origin: ScriptedOrigin, theirs: str) -> None:
    origin.fault(Status(503, {"X-Openstack-Request-Id": theirs}))
    assert re.fullmatch(ID, failure_of(source).requests)


def test_an_id_ends_with_its_question() -> None:
    seen: list[str] = []

    def work() -> None:
        exchange = request_ids.current()
        assert exchange is not None
        seen.append(exchange.sent)

    request_ids.identified(work)
    request_ids.identified(work)
    assert len(set(seen)) == 2
    assert request_ids.current() is None


def test_a_failure_that_was_no_request_has_no_id() -> None:
    assert str(ReadDeadline(IMAGE, "late")) == f"ReadDeadline: image {IMAGE}: late"


@pytest.mark.cloud
def test_a_real_glance_answers_with_an_id(tmp_path: Path, glance: cloud.Glance) -> None:
    error = failure_of(source_of(tmp_path, glance.url), UNKNOWN)
    assert isinstance(error, ImageGone)
    assert re.fullmatch(rf"{ID}, answered as {ID}", error.requests)
    ours, theirs = re.findall(ID, error.requests)
    assert ours != theirs


@pytest.mark.mount
def test_the_log_of_a_node_has_both_and_says_it_once(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url, glance={"retries": 0}, mount={"read_deadline": 1}) as node:
        path = node.path(IMAGE)
        path.stat()
        origin.fault(*[Status(500, {"X-Openstack-Request-Id": THEIRS})] * 100)
        assert errno_of(lambda: read_direct(path, 0, 4096)) is not None
        lines = [line for line in node.log.splitlines() if THEIRS in line]
        assert lines, node.log
        ours = [id_of(request) for request in origin.requests if request.kind is Kind.DATA]
        for line in lines:
            assert f"[image {IMAGE}] " in line or " endpoint " in line, line
            assert any(one in line for one in ours), line
        assert len(lines) <= 4, "what failed again is counted"
