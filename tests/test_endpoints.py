"""Endpoints in virtual time: who is asked, who is left alone, who is blamed, and how load comes back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

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
from cachefs.sources.circuit import PAUSE_MAX_S
from cachefs.sources.endpoints import MOVE_HOLD_S, REFUSED_PAUSE_S, Endpoints
from tests.flow import virtual_time

A, B = "a", "b"


@dataclass
class World:
    """Endpoints that fail as `fails` says, an identity service that does as `identity` says; `asked` is all that
    was asked of endpoints, `probed` when they were probed, `renewed` when a token was asked for."""

    urls: tuple[str | None, ...] = (A, B)
    fails: dict[str, type[OriginError]] = field(default_factory=dict)
    images_fail: dict[str, type[OriginError]] = field(default_factory=dict)
    identity: type[OriginError] | None = None
    cost_s: float = 0.01
    asked: list[tuple[str, str, float]] = field(default_factory=list)
    probed: list[tuple[str, float]] = field(default_factory=list)
    renewed: list[float] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.endpoints = Endpoints(
            self.urls, 8, self._probe, self._renew, clock=trio.current_time, chance=lambda: 1.0
        )
        self.endpoints.on_width = self.widths.append

    async def read(self, image: str = "i") -> str:
        """Which endpoint served."""

        async def work(url: str | None) -> str:
            assert url is not None
            self.asked.append((url, image, trio.current_time()))
            await trio.sleep(self.cost_s)
            for failure in (self.identity, self.fails.get(url), self.images_fail.get(image)):
                if failure is not None:
                    raise failure(image, "scripted")
            return url

        return await self.endpoints.ask(image, work)

    async def _probe(self, url: str | None) -> None:
        assert url is not None
        self.probed.append((url, trio.current_time()))
        await trio.sleep(self.cost_s)
        if url in self.fails:
            raise self.fails[url]("(all)", "scripted")

    async def _renew(self) -> None:
        self.renewed.append(trio.current_time())
        await trio.sleep(self.cost_s)
        if self.identity is not None:
            raise self.identity("(all)", "scripted")

    def state(self, url: str) -> str:
        return str(next(e["state"] for e in self.endpoints.status()["endpoints"] if e["url"] == url))

    def count(self, url: str) -> int:
        return sum(1 for asked, _, _ in self.asked if asked == url)


@asynccontextmanager
async def world(*urls: str, **fields: object) -> AsyncIterator[World]:
    made = World(urls or (A, B), **fields)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(made.endpoints.run)
        yield made
        nursery.cancel_scope.cancel()


async def failures(w: World, times: int, image: str = "i") -> list[type[OriginError]]:
    found = []
    for _ in range(times):
        with pytest.raises(OriginError) as raised:
            await w.read(image)
        found.append(type(raised.value))
    return found


@virtual_time
async def test_the_first_serves_the_second_at_once_when_it_fails_and_the_first_again_when_it_is_well() -> None:
    async with world() as w:
        assert await w.read() == A
        w.fails[A] = NotReached
        began_s = trio.current_time()
        assert [await w.read() for _ in range(5)] == [B] * 5
        assert trio.current_time() - began_s < 0.2, "nobody waits for a pause"
        assert w.count(A) == 1 + 3, "then it is left alone"
        await trio.sleep(60)
        assert [await w.read() for _ in range(5)] == [B] * 5
        assert w.count(A) == 4
        del w.fails[A]
        await trio.sleep(PAUSE_MAX_S + 1)
        assert await w.read() == A
        assert w.count(A) == 5


@virtual_time
async def test_an_endpoint_that_is_left_alone_gets_one_probe_after_each_pause() -> None:
    async with world(A, fails={A: NotReached}) as w:
        await failures(w, 3)
        opened_s = trio.current_time()
        assert await failures(w, 100) == [OriginAway] * 100
        assert trio.current_time() == opened_s, "who asks is told at once"
        await trio.sleep(300)
        pauses = [b - a for (_, a), (_, b) in zip(w.probed, w.probed[1:], strict=False)]
        assert pauses[:4] == pytest.approx([2.0, 4.0, 8.0, 15.0], abs=0.02)
        assert pauses[4:] == pytest.approx([15.0] * len(pauses[4:]), abs=0.02)
        assert w.count(A) == 3


@virtual_time
async def test_who_waits_goes_on_as_soon_as_a_probe_is_answered_and_one_by_one_at_first() -> None:
    async with world(A, fails={A: NotReached}) as w:
        await failures(w, 3)
        served: list[str] = []

        async def wait() -> None:
            await w.endpoints.until_well()
            served.append(await w.read())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait)
            await trio.sleep(100)
            assert served == []
            del w.fails[A]
            back_s = w.probed[-1][1] + PAUSE_MAX_S
        assert served == [A] * 5
        assert trio.current_time() == pytest.approx(back_s, abs=0.1)
        assert w.widths == [1, 2, 3, 4, 5, 6]


@virtual_time
async def test_load_that_moves_begins_with_one_request_for_a_moment() -> None:
    async with world() as w:
        w.fails[A] = NotReached
        for _ in range(3):
            await w.read()
        moved_s = trio.current_time()
        assert w.widths == [1]
        while trio.current_time() < moved_s + MOVE_HOLD_S - 0.02:
            await w.read()
        assert w.widths == [1]
        await trio.sleep(0.1)
        for _ in range(20):
            await w.read()
        assert w.widths == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("error", [OriginUnavailable, OriginBusy])
@virtual_time
async def test_one_images_trouble_never_keeps_others_waiting(
    error: type[OriginError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cachefs.sources.endpoints")
    async with world(A, images_fail={"bad": error}) as w:
        for _ in range(20):
            await failures(w, 3, "bad")
            assert w.state(A) == "closed"
            await trio.sleep(0.1)
        assert await w.read("good") == A
        trouble = w.endpoints.status()["images"]["bad"]
        assert "scripted" in trouble["error"]
        assert w.endpoints.status()["endpoints"][0]["failures"] == 0
        del w.images_fail["bad"]
        await w.read("bad")
        assert w.endpoints.status()["images"] == {}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert said[0].startswith("cannot be had")
    assert said[1].startswith("can be had again")


@virtual_time
async def test_one_image_is_enough_where_the_endpoint_answers_no_probe_either() -> None:
    async with world(A, fails={A: OriginUnavailable}) as w:
        await failures(w, 3)
        assert w.state(A) == "closed"
        await trio.sleep(0.1)
        assert w.state(A) == "open"


@virtual_time
async def test_two_images_that_fail_are_the_endpoints_trouble() -> None:
    async with world(A, images_fail={"one": OriginBusy, "two": OriginBusy}) as w:
        await failures(w, 2, "one")
        await failures(w, 1, "two")
        assert w.state(A) == "open"


@pytest.mark.parametrize(
    "error", [ImageGone, ImageForbidden, OriginLied, BytesMissing, RangeRefused, OriginThrottled]
)
@virtual_time
async def test_what_is_no_fault_of_the_endpoint_opens_nothing(error: type[OriginError]) -> None:
    async with world(A, images_fail={f"{n}": error for n in range(50)}) as w:
        for n in range(50):
            assert await failures(w, 1, f"{n}") == [error]
        assert w.state(A) == "closed"
        assert await w.read() == A
        named = {ImageForbidden, OriginLied, BytesMissing}
        assert len(w.endpoints.status()["images"]) == (50 if error in named else 0)


@virtual_time
async def test_the_trouble_of_an_image_that_is_gone_is_over() -> None:
    async with world(A, images_fail={"i": BytesMissing}) as w:
        await failures(w, 2)
        assert "i" in w.endpoints.status()["images"]
        w.images_fail["i"] = ImageGone
        await failures(w, 1)
        assert w.endpoints.status()["images"] == {}


@virtual_time
async def test_troubles_of_images_are_bounded() -> None:
    async with world(A, images_fail={f"{n}": ImageForbidden for n in range(500)}) as w:
        for n in range(500):
            await failures(w, 1, f"{n}")
        assert len(w.endpoints.status()["images"]) == 100


@pytest.mark.parametrize("error", [TokenRefused, OriginUnauthorized, IdentityUnavailable])
@virtual_time
async def test_trouble_with_tokens_is_no_endpoints(
    error: type[OriginError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cachefs.sources.endpoints")
    async with world(identity=error) as w:
        assert await failures(w, 3) == [error] * 3
        assert w.count(B) == 0, "another endpoint would not help"
        assert (w.state(A), w.state(B)) == ("closed", "closed")
        status = w.endpoints.status()["identity"]
        assert (status["state"], status["trouble"]) == ("open", f"{error.__name__}: scripted")
        away = OriginAway if error is IdentityUnavailable else OriginUnauthorized
        assert await failures(w, 50) == [away] * 50
        await trio.sleep(3 * REFUSED_PAUSE_S)
        assert len(w.asked) == 3
        assert len(w.renewed) <= (4 if error is not IdentityUnavailable else 12)
        w.identity = None
        await trio.sleep(2 * REFUSED_PAUSE_S)
        assert await w.read() == A
        assert w.endpoints.status()["identity"]["trouble"] is None
    assert len(caplog.records) == 2, [record.getMessage() for record in caplog.records]


@virtual_time
async def test_while_there_is_no_token_endpoints_are_not_probed() -> None:
    async with world(A, fails={A: NotReached}) as w:
        await failures(w, 3)
        w.identity = IdentityUnavailable
        del w.fails[A]
        await trio.sleep(0.5)
        probes = len(w.probed)
        for _ in range(3):
            w.endpoints._identity_failed(w.endpoints._identity.circuit.ticket, IdentityUnavailable("i"))
        await trio.sleep(100)
        assert len(w.probed) == probes
        w.identity = None
        await trio.sleep(2 * PAUSE_MAX_S + 1)
        assert await w.read() == A


@virtual_time
async def test_an_endpoint_that_takes_no_connection_delays_no_probe_of_another() -> None:
    async with world(A, B, fails={A: NotReached, B: NotReached}) as w:
        await failures(w, 3)
        assert (w.state(A), w.state(B)) == ("open", "open")
        w.cost_s = 30.0
        await trio.sleep(5)
        w.cost_s = 0.01
        w.fails.clear()
        await trio.sleep(0.5)
        assert {url for url, _ in w.probed} == {A, B}
        with trio.fail_after(60):
            await w.endpoints.until_well()
            await w.read()


@virtual_time
async def test_one_line_for_each_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cachefs.sources.endpoints")
    async with world(A, B) as w:
        w.fails = {A: NotReached}
        for _ in range(100):
            await w.read()
        await trio.sleep(120)
        w.fails.clear()
        await trio.sleep(PAUSE_MAX_S + 1)
        await w.read()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == [
        "endpoint a", "endpoint b serves now", "endpoint a", "endpoint a serves now",
    ]  # fmt: skip
    assert "after 3 failures" in said[0]
    assert "well again" in said[2]


@virtual_time
async def test_who_gives_up_leaves_nothing_behind() -> None:
    async with world(A, cost_s=10.0) as w:
        for _ in range(10):
            with trio.move_on_after(0.1):
                await w.read()
        assert (w.state(A), w.endpoints.status()["endpoints"][0]["failures"]) == ("closed", 0)
