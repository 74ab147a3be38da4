"""Whether Glance can be reached: when it is asked and what is said of it, in virtual time; and on a real node."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from cachefs.contact import AGAIN_S, PATIENCE_S, Contact
from cachefs.errors import LISTING, ImageForbidden, NotReached, OriginError
from tests.cloud.service import poll_until
from tests.node import Node
from tests.origin import OriginImage, ScriptedOrigin, Status, pattern

IMAGE: Final = "70000000-0000-4000-8000-000000000001"
SIZE: Final = 1 << 20


# ── In virtual time ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class World:
    """A Glance that answers with `error`, or after `takes_s`; the endpoints' and the catalog's view of it."""

    error: OriginError | None = None
    takes_s: float = 0.0
    known: int = 0
    may_ask: bool = True
    reached_s: float | None = None
    trouble: str | None = None
    last_error: str | None = None
    listing_age_s: float | None = None
    greeted_s: list[float] = field(default_factory=list)
    listed: int = 0

    def __len__(self) -> int:
        return self.known

    async def greet(self) -> None:
        self.greeted_s.append(trio.current_time())
        await self._answer()

    async def list_anew(self) -> None:
        self.listed += 1
        await self._answer()
        self.last_error = None

    async def _answer(self) -> None:
        await trio.sleep(self.takes_s)
        if isinstance(self.error, ImageForbidden):
            self.reached_s = trio.current_time()
        elif self.error is not None:
            self.trouble = self.error.detail
        else:
            self.reached_s, self.trouble = trio.current_time(), None
        if self.error is not None:
            raise self.error.again()


def told(world: World, work: Callable[[Contact], Awaitable[None]]) -> None:
    async def main() -> None:
        contact = Contact(world, world, world.greet, world.list_anew, chance=lambda: 1.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(contact.run)
            await work(contact)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


REFUSED: Final = NotReached(LISTING, "http://glance:9292: connection refused")


def test_it_asks_once_at_the_start_and_no_more_when_that_was_answered() -> None:
    world = World()

    async def work(contact: Contact) -> None:
        await trio.sleep(10 * AGAIN_S)
        assert (contact.is_reached, contact.is_useless, contact.reason()) == (True, False, None)

    told(world, work)
    assert len(world.greeted_s) == 1


def test_never_reached_says_since_when_and_why_until_somebody_answers() -> None:
    world = World(REFUSED)

    async def work(contact: Contact) -> None:
        await trio.sleep(3 * AGAIN_S + 0.7)
        said = contact.reason()
        assert said is not None
        assert said.startswith("Glance was never reached since the start, 31 s ago: http://glance:9292: conn")
        assert "cachefs doctor" in said
        assert contact.is_useless
        world.known = 3
        assert not contact.is_useless, "what was known before can be served"
        world.error = None
        await trio.sleep(AGAIN_S)
        assert contact.reason() is None

    told(world, work)
    assert [round(at_s) for at_s in world.greeted_s] == [0, 1, 3, 7, 15, 25, 35], "it doubles"


def test_one_failed_question_is_in_doubt_until_one_is_answered() -> None:
    world = World()

    async def work(contact: Contact) -> None:
        await trio.sleep(100.5)
        world.trouble = "http://glance:9292: no answer in time"
        said = contact.reason()
        assert said is not None
        assert "the last question to Glance was not answered" in said
        assert "no answer in time" in said
        await trio.sleep(1.5)
        assert contact.reason() is None

    told(world, work)
    assert len(world.greeted_s) == 2


def test_a_glance_that_hangs_is_not_taken_for_one_that_answered() -> None:
    world = World(takes_s=1000, known=1)

    async def work(contact: Contact) -> None:
        assert contact.reason() is None, "it has its time"
        await trio.sleep(PATIENCE_S + 0.9)
        said = contact.reason()
        assert said is not None
        assert said.startswith("Glance has not answered yet, asked 6 s ago")

    told(world, work)


def test_nobody_is_asked_while_nobody_may_be_and_at_once_after_that() -> None:
    world = World(REFUSED)

    async def work(contact: Contact) -> None:
        await trio.sleep(0.5)
        world.may_ask = False
        await trio.sleep(100 * AGAIN_S + 0.2)
        assert len(world.greeted_s) == 1
        world.may_ask, world.error = True, None
        before_s = trio.current_time()
        contact.origin_is_well()
        await trio.sleep(AGAIN_S)
        assert world.greeted_s[1:] == [before_s]

    told(world, work)


def test_a_refusal_is_an_answer_and_trouble_all_the_same() -> None:
    world = World(ImageForbidden(LISTING, "403 Forbidden"))

    async def work(contact: Contact) -> None:
        await trio.sleep(0.5)
        assert contact.is_reached
        assert "403 Forbidden" in str(contact.reason())
        world.error, world.last_error = None, "a listing failed"
        await trio.sleep(2 * AGAIN_S)
        assert (contact.reason(), world.listed) == (None, 1)

    told(world, work)


# ── On a node ─────────────────────────────────────────────────────────────────────────────────────────


def readiness(node: Node) -> tuple[int, dict[str, Any]]:
    """The status and the answer of /readyz."""
    node.wait_for_log("metrics on http://")
    found = re.search(r"metrics on (http://[\d.:]+)", node.log)
    assert found is not None
    try:
        with urllib.request.urlopen(f"{found[1]}/readyz", timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.mount
def test_a_new_node_that_never_reached_glance_says_so_everywhere(tmp_path: Path) -> None:
    image = OriginImage(IMAGE, "first", SIZE, pattern(SIZE))
    with ScriptedOrigin([image]) as origin:
        origin.stop()
        node = Node(tmp_path, origin.url)
        node.configure(metrics={"listen": "127.0.0.1:0"})
        why = f"{origin.url}: connection refused"
        with node:
            node.wait_for_status(lambda now: now["images"]["glance_trouble"])
            status, said = readiness(node)
            assert (status, said["state"]) == (503, "unready")
            assert "Glance was never reached since the start" in said["reasons"][0]
            assert why in said["reasons"][0]
            listed = node.cli("images")
            assert (listed.returncode, len(listed.stdout.splitlines())) == (0, 1)
            assert why in listed.stderr
            assert len(listed.stderr.splitlines()) == 1
            told = json.loads(node.cli("images", "--json").stdout)
            assert (told["images"], told["glance"]["reached"], told["glance"]["trouble"]) == ([], False, why)
            assert why in node.cli("status").stdout
            assert "HTTPConnectionPool" not in node.log
            # It comes, and nobody has to ask for it.
            origin.start()
            node.wait_for_status(lambda now: now["ready"]["state"] == "ready")
            assert poll_until(lambda: readiness(node)[0] == 200, 10), "a snapshot is good for a second"
            assert node.cli("images").stderr == ""
            assert IMAGE in node.cli("images").stdout
        origin.stop()
        with node:  # And once known, it serves without.
            node.wait_for_status(lambda now: now["images"]["glance_trouble"])
            status, said = readiness(node)
            assert (status, said["state"]) == (200, "degraded")
            assert (
                "Shown is what was known before, not listed by Glance since the daemon's start"
                in node.cli("images").stderr
            )
            assert IMAGE in node.cli("images").stdout


@pytest.mark.mount
def test_one_failed_listing_is_degraded_until_one_is_answered(tmp_path: Path) -> None:
    image = OriginImage(IMAGE, "first", SIZE, pattern(SIZE))
    with ScriptedOrigin([image]) as origin, Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node:
        node.wait_for_status(lambda now: now["images"]["glance_reached"])
        node.ask("images")
        origin.script = lambda request: Status(500)
        node.ask("images")
        ready = node.status()["ready"]
        assert (ready["state"], ready["is_ready"]) == ("degraded", True)
        assert "was not answered" in ready["reasons"][0] or "cannot be asked" in ready["reasons"][0]
        origin.script = None
        node.wait_for_status(lambda now: now["ready"]["state"] == "ready")
