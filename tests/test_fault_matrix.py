"""Every fault in every state of an image, in virtual time: what an open and a read come to is what the table of
`docs/outages.md` says. Above the wire everything is real, as the daemon joins it: keystoneauth, glanceclient, the
source, the catalog, the store. Rule: the table is the specification; nothing about outcomes stands here.

In each cell, besides: what is cached is read at once and in no time; an open takes no longer than its bound and a
read no longer than its deadline; no wrong byte is given; and when the fault is over the image is there and right,
but for a condemned one.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pytest
import trio

from cachefs import config
from cachefs.blocks import Blocks
from cachefs.catalog import OPEN_WAIT_S, UNKNOWN_WAIT_S, Catalog
from cachefs.claims import ByLeases
from cachefs.errors import CachefsError, ImageCondemned, OriginError
from cachefs.fetcher import Fetcher
from cachefs.hydrator import Hydrator
from cachefs.leases import Leases, NamedBy
from cachefs.leisure import Leisure
from cachefs.plan.extents import BLOCK, Extent
from cachefs.plan.windows import Pattern
from cachefs.sources.auth import AuthOptions
from cachefs.sources.glance import Glance
from cachefs.store.content import Store
from cachefs.store.format import DiskEntry, OriginMode, ViewKind
from cachefs.store.view import StoredView
from cachefs.verifier import Verifier
from tests import origin as o
from tests import wire as w
from tests.flow import until, virtual_time
from tests.origin import Kind, OriginImage, Request, ScriptedOrigin, pattern
from tests.stores import SPAN, running
from tests.wire import Wire

ROOT: Final = Path(__file__).parent.parent
IMAGE: Final = "50000000-0000-4000-8000-000000000001"
OTHER: Final = "50000000-0000-4000-8000-000000000002"
SIZE: Final = 2 * SPAN + 12345
BYTES: Final = pattern(SIZE)
FAR: Final = SPAN + 8 * BLOCK  # What is absent where something is cached, and behind 100 KiB of a stream.
DEADLINE_S: Final = 30.0
TTL_S: Final = 60.0
JSON: Final = {"Content-Type": "application/json"}
PAGE: Final = o.Status(200, {"Content-Type": "text/html"}, b"<html>Welcome</html>" * 100)

# ── The table ─────────────────────────────────────────────────────────────────────────────────────────


def table() -> dict[str, dict[str, str]]:
    """The rows of `docs/outages.md`, by their first cell."""
    lines = (ROOT / "docs" / "outages.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


TABLE: Final = table()

# ── What is wrong ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Wrong:
    """A fault that lasts until it is healed: what each request meets, and what Glance says of the image."""

    script: Callable[[Request], w.Fault | None] = lambda request: None
    change: Callable[[OriginImage], OriginImage | None] = lambda image: image
    tokens_expire: bool = False
    from_the_start: bool = False  # The image came so.


def everything(fault: w.Fault) -> Wrong:
    """Glance itself; Keystone is well."""
    return Wrong(lambda request: None if is_keystone(request) else fault)


def bytes_only(fault: w.Fault) -> Wrong:
    return Wrong(lambda request: fault if request.kind is Kind.DATA else None)


def keystone(fault: w.Fault) -> Wrong:
    return Wrong(lambda request: fault if is_keystone(request) else None, tokens_expire=True)


def is_keystone(request: Request) -> bool:
    return request.path.startswith("/v3")


def of_the_image(code: int) -> Wrong:
    """Glance has no such image, and says so where it is asked for."""
    missing = o.Status(code)
    return Wrong(lambda request: missing if request.image == IMAGE else None, lambda image: None)


def other_bytes(image: OriginImage) -> OriginImage:
    wrong = pattern(SIZE, 7)
    return replace(image, content=lambda at, n: BYTES(at, n) if at + n <= FAR else wrong(at, n))


FAULTS: Final[dict[str, Wrong]] = {
    "nothing": Wrong(),
    "Glance is down": everything(w.Refused()),
    "it cannot be reached": everything(w.Blackhole()),
    "it connects and hangs": everything(w.Hangs()),
    "it hangs up": everything(o.HangUp()),
    "bodies are reset after 100 KiB": bytes_only(o.Cut(100 << 10, reset=True)),
    "bodies end after 100 KiB": bytes_only(o.Cut(100 << 10)),
    "bodies end before a byte": bytes_only(o.Cut(0)),
    "bodies are too long": bytes_only(o.LongBody(1)),
    "bodies trickle": bytes_only(o.Trickle(1024, 10.0)),
    "a wrong Content-Range": bytes_only(o.WrongContentRange()),
    "200 to a range": bytes_only(o.IgnoreRange()),
    "401 once": Wrong(tokens_expire=True),
    "401 for good": everything(o.Status(401)),
    "Keystone refuses the credentials": keystone(o.Status(401)),
    "Keystone is down, the token expired": keystone(w.Refused()),
    "403": everything(o.Status(403)),
    "404 of the bytes only": bytes_only(o.Status(404)),
    "404 of the image": of_the_image(404),
    "410 of the image": of_the_image(410),
    "the status `deleted`": Wrong(
        lambda request: o.Status(404) if request.kind is Kind.DATA else None,
        lambda image: replace(image, status="deleted"),
    ),
    "deactivated": Wrong(change=lambda image: replace(image, status="deactivated")),
    "429 with Retry-After": everything(o.Status(429, {"Retry-After": "7"})),
    "500": everything(o.Status(500)),
    "503": everything(o.Status(503)),
    "a proxy's page for everything": everything(PAGE),
    "wrong JSON": Wrong(
        lambda request: o.Status(200, JSON, b'{"images": 7}') if request.kind in (Kind.LIST, Kind.IMAGE) else None
    ),
    "a listing without the image": Wrong(
        lambda request: o.Status(200, JSON, b'{"images": []}') if request.kind is Kind.LIST else None
    ),
    "another size in the metadata": Wrong(change=lambda image: replace(image, properties={"size": SIZE + SPAN})),
    "another hash in the metadata": Wrong(change=lambda image: replace(image, os_hash_value="0" * 128)),
    "other bytes than the hash says": Wrong(change=other_bytes, from_the_start=True),
}


def test_the_table_has_a_row_for_each_fault_and_a_column_for_each_state() -> None:
    assert list(TABLE) == list(FAULTS)
    assert [list(row) for row in TABLE.values()] == [[*STATES, "named in `status`"]] * len(TABLE)


# ── A node without a mount ────────────────────────────────────────────────────────────────────────────


@dataclass
class Node:
    """Everything that a read goes through."""

    origin: ScriptedOrigin
    wire: Wire
    store: Store
    glance: Glance
    blocks: Blocks
    catalog: Catalog
    leases: Leases
    hydrator: Hydrator
    services: trio.Nursery
    handles: list[StoredView] = field(default_factory=list)

    async def open(self) -> StoredView:
        """As `Filesystem` does: looks it up, opens it, and leases it from then on. Raises CachefsError."""
        known = await self.catalog.lookup(IMAGE)
        image = await self.catalog.openable(known.id)
        if image.condemned is not None:
            raise ImageCondemned(image.id, image.condemned)
        view = self.store.view(image.id, ViewKind.ORIGINAL, image.size)
        self.leases.opened(view.number)
        self.handles.append(view)
        self.hydrator.opened(view)
        return view

    def close(self) -> None:
        """Everything that `open` opened."""
        while self.handles:
            self.leases.released(self.handles.pop().number)

    async def read(self, view: StoredView, offset: int, length: int = 4096) -> bytes:
        return bytes(await self.blocks.read(view, offset, length, Pattern()))

    def begin_hydration(self) -> None:
        self.services.start_soon(self.hydrator.run)

    def break_(self, wrong: Wrong) -> None:
        self.wire.script = wrong.script
        changed = wrong.change(self.origin.images[IMAGE])
        if changed is None:
            del self.origin.images[IMAGE]
        else:
            self.origin.images[IMAGE] = changed
        if wrong.tokens_expire:
            self.origin.expire_tokens()

    def heal(self, image: OriginImage) -> None:
        self.wire.script = lambda request: None
        self.origin.images[IMAGE] = image

    def blamed(self) -> str:
        status = self.glance.endpoints.status()
        if any(endpoint["state"] != "closed" for endpoint in status["endpoints"]):
            return "endpoint"
        if status["identity"]["trouble"]:
            return "identity"
        return "image" if IMAGE in status["images"] else "nobody"


@asynccontextmanager
async def node(folder: Path, image: OriginImage) -> AsyncIterator[Node]:
    origin = ScriptedOrigin([image, OriginImage(OTHER, "other", SIZE, BYTES)], auth=True)
    wire = Wire(origin)
    try:
        auth = auth_of(folder, origin)
        session = auth.session()
        session.mount("http://", wire)
        glance = Glance(auth, session=session, clock=trio.lowlevel.current_clock().current_time)
        async with running(folder / "store") as store, trio.open_nursery() as services:
            fetcher = Fetcher(glance, store, connections=8, retries=4)
            blocks = Blocks(fetcher, DEADLINE_S)
            catalog = Catalog(glance, store, TTL_S, 10.0)
            leases = Leases(store, lambda: 1 << 60)
            verifier = Verifier(catalog, store, Leisure(blocks, lambda: 0))
            hydrator = Hydrator(
                store, fetcher, blocks, leases,
                is_gone=lambda id_: (known := catalog.known(id_)) is None or known.status == "gone",
            )  # fmt: skip
            glance.endpoints.on_width = fetcher.narrow
            fetcher.until_origin_is_well = glance.endpoints.until_well
            glance.on_gone = catalog.ended
            catalog.claims = ByLeases(leases, store)
            catalog.on_gone = lambda gone: hydrator.gone(gone.id)
            fetcher.give_way(blocks)

            def whole(view: StoredView) -> None:
                verifier.settled(view)
                hydrator.became_whole(view)

            def well() -> None:
                catalog.origin_is_well()
                hydrator.origin_is_well()

            store.on_whole = whole
            glance.endpoints.on_well = well
            for service in (glance.endpoints, fetcher, catalog, verifier):
                await services.start(service.run)
            yield Node(origin, wire, store, glance, blocks, catalog, leases, hydrator, services)
            services.cancel_scope.cancel()
    finally:
        wire.close()
        origin.close()


def auth_of(folder: Path, origin: ScriptedOrigin) -> AuthOptions:
    file = folder / "cachefs.conf"
    file.write_text(
        f"[mount]\nmountpoint = {folder}/mnt\n[store]\npath = {folder}/store\n"
        f"[glance]\nauth_type = password\nauth_url = {origin.auth_url}\nendpoints = {origin.url}\n"
        "username = cachefs\npassword = secret\nproject_name = service\nuser_domain_id = default\n"
        "project_domain_id = default\n"
    )
    return config.load([str(file)], [], {}).glance.auth


# ── States ────────────────────────────────────────────────────────────────────────────────────────────


async def unknown(n: Node) -> None:
    """Nobody has asked for it."""
    await n.glance.image(OTHER)  # But there is a token.


async def listed(n: Node) -> None:
    await n.catalog.listing()


async def in_part(n: Node) -> StoredView:
    """Its first block is here."""
    await n.catalog.listing()
    image = await n.catalog.openable(IMAGE)
    view = n.store.view(image.id, ViewKind.ORIGINAL, image.size)
    await n.blocks.read_just(view, Extent(0, BLOCK))
    await until(lambda: view.cached == BLOCK)
    return view


async def open_in_part(n: Node) -> StoredView:
    view = await in_part(n)
    n.leases.opened(view.number)
    return view


async def whole(n: Node) -> None:
    """All of it is here, and nobody leases it."""
    view = await in_part(n)
    for offset in range(0, SIZE, BLOCK):
        await n.blocks.read_just(view, Extent(offset, min(offset + BLOCK, SIZE)))
    await until(lambda: view.complete or view.condemned is not None)
    await until(lambda: (image := n.catalog.known(IMAGE)) is None or image.verified or image.condemned is not None)


async def an_instances(n: Node) -> None:
    """The same, and the disk of an instance names it."""
    await whole(n)
    entry = DiskEntry(b"/var/lib/nova/instances/1/disk", ViewKind.ORIGINAL, 0)
    n.leases.name(IMAGE, NamedBy((entry,), 1, 0.0, 86400.0))


async def pinned_in_part(n: Node) -> None:
    await in_part(n)
    n.leases.pin(IMAGE, SIZE)


async def one_stream(n: Node) -> None:
    """Its store gives no ranges, and that is known."""
    await n.catalog.listing()
    image = await n.catalog.openable(IMAGE)
    view = n.store.view(image.id, ViewKind.ORIGINAL, image.size)
    n.store.set_origin(view, OriginMode.STREAM)


STATES: Final = {
    "unknown": unknown,
    "listed": listed,
    "open, in part": open_in_part,
    "whole": whole,
    "an instance's": an_instances,
    "pinned, in part": pinned_in_part,
    "one stream": one_stream,
}

# ── A cell ────────────────────────────────────────────────────────────────────────────────────────────


async def tried(n: Node, opened: StoredView | None) -> str:
    """What an open and a read come to now; with `opened`, the read alone."""
    began_s = trio.current_time()
    try:
        view = await n.open() if opened is None else opened
    except CachefsError as error:
        assert trio.current_time() <= began_s + UNKNOWN_WAIT_S + 0.1
        return "condemned" if isinstance(error, ImageCondemned) else errno.errorcode[error.errno]
    known_before = n.catalog.known(IMAGE) is not None
    assert trio.current_time() <= began_s + (OPEN_WAIT_S if known_before else 0) + UNKNOWN_WAIT_S + 0.1
    check_hit(view)
    began_s = trio.current_time()
    try:
        data = await n.read(view, FAR)
    except OriginError:
        return "EIO"
    finally:
        assert trio.current_time() <= began_s + DEADLINE_S + 0.1, "the deadline of a read holds"
    assert data in (BYTES(FAR, 4096), pattern(SIZE, 7)(FAR, 4096)), "a wrong byte"
    return "bytes"


def check_hit(view: StoredView) -> None:
    """What is cached is read without a wait."""
    if view.present_at(0) and view.condemned is None:
        now = view.read_now(0, 4096)
        assert now is not None
        assert bytes(now) == BYTES(0, 4096)


# ── All endpoints away ────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_guests_that_wait_are_served_when_glance_is_back_and_not_all_at_once(tmp_path: Path) -> None:
    """While it is away nothing is asked but probes, however many guests wait."""
    right = OriginImage(IMAGE, "image", SIZE, BYTES).hashed()
    async with node(tmp_path, right) as n:
        view = await open_in_part(n)
        served: list[float] = []

        async def guest(offset: int) -> None:
            data = await n.blocks.read_just(view, Extent(offset, offset + BLOCK))
            assert data == BYTES(offset, BLOCK)
            served.append(trio.current_time())

        n.break_(everything(w.Refused()))
        async with trio.open_nursery() as guests:
            for number in range(12):
                guests.start_soon(guest, 2 * BLOCK * (number + 1))
            await trio.sleep(10.0)
            while_away = list(n.wire.requests)
            n.heal(right)
            n.wire.requests.clear()
        assert served, "no guest had to see an error"
        probes = [request for request in while_away if request.kind is Kind.LIST]
        data = [request for request in while_away if request.kind is Kind.DATA and request.at_s > 1.0]
        assert len(data) <= 8, "what was under way when it went away"
        # Two find it out; pauses are halved at most: 0.5, 1, 2, 4, and then 7.5 s.
        assert 2 <= len(probes) <= 6
        begun = sorted(request.at_s for request in n.wire.of_kind(Kind.DATA))
        in_steps = [
            sum(0 <= at - begun[0] - step * n.wire.cost_s < n.wire.cost_s for at in begun) for step in range(3)
        ]
        assert in_steps[0] == 1
        assert in_steps[1] <= 2
        assert in_steps[2] <= 4
        assert max(served) - min(served) < 1.0


AT_THE_START: Final = [
    "Glance is down", "it cannot be reached", "it connects and hangs", "401 for good",
    "Keystone refuses the credentials", "Keystone is down, the token expired", "403", "503",
    "a proxy's page for everything", "wrong JSON", "a listing without the image",
]  # fmt: skip


@pytest.mark.parametrize("fault", AT_THE_START)
@virtual_time
async def test_a_node_starts_and_serves_what_it_has(tmp_path: Path, fault: str) -> None:
    """The image is listed (where no good listing says otherwise), looked up, opened and read whole."""
    right = OriginImage(IMAGE, "image", SIZE, BYTES).hashed()
    async with node(tmp_path, right) as n:
        await an_instances(n)
    async with node(tmp_path, right) as n:
        await n.leases.load()
        n.break_(FAULTS[fault])
        listed = [image.id for image in await n.catalog.listing()]
        assert (IMAGE in listed) == (fault != "a listing without the image")
        view = await n.open()
        began_s = trio.current_time()
        for offset in range(0, SIZE, BLOCK):
            length = min(BLOCK, SIZE - offset)
            assert await n.read(view, offset, length) == BYTES(offset, length)
        assert trio.current_time() - began_s < 0.1, "nobody waits"
        known = n.catalog.known(IMAGE)
        assert known is not None
        assert known.verified


CELLS: Final = [(fault, state) for fault in FAULTS for state in STATES]


@pytest.mark.parametrize(("fault", "state"), CELLS, ids=[f"{fault}: {state}" for fault, state in CELLS])
@virtual_time
async def test_cell(tmp_path: Path, fault: str, state: str) -> None:
    wrong, cell = FAULTS[fault], TABLE[fault][state]
    right = OriginImage(IMAGE, "image", SIZE, BYTES, ranges=state != "one stream").hashed()
    async with node(tmp_path, right) as n:
        if wrong.from_the_start and state != "an instance's":
            n.break_(wrong)
        opened = await STATES[state](n)
        n.break_(wrong)
        n.begin_hydration()
        await trio.sleep(2 * TTL_S if opened is None else 0)
        outcome = await tried(n, opened)
        if outcome == "bytes" and "condemned" in cell:
            await until(lambda: (image := n.catalog.known(IMAGE)) is not None and image.condemned is not None)
            assert await tried(n, None) == "condemned"
            outcome = "bytes, then condemned"
        if n.hydrator.at_risk and state == "pinned, in part":
            outcome += ", alarm"
        assert outcome == cell.removesuffix(", for good")
        if state == "listed":
            await trio.sleep(TTL_S)  # A time-out is long, and whose it is is found out by another one.
            assert n.blamed() == TABLE[fault]["named in `status`"]
        n.heal(right)
        n.close()
        await trio.sleep(2 * TTL_S)
        if "for good" in cell:
            assert await tried(n, None) == outcome
        elif "condemned" not in cell:
            assert await tried(n, None) == "bytes"
            if opened is not None:
                assert await tried(n, opened) == "bytes"
            assert n.blamed() == "nobody"
            await until(lambda: not n.hydrator.at_risk)
