"""The NBD client against servers that lie, and the input against clients that do. Rule: every test ends, with
bytes that are right or with an NbdBroken.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.errors import OriginUnavailable
from cachefs.plan.extents import Extent
from cachefs.sources import nbd
from cachefs.sources.nbd import Client, NbdBroken, NbdRefused
from cachefs.sources.nbd_input import REQUEST_MAX, SPENT_MAX, WINDOW, InputServer
from tests.converters import READ_ONLY, Wire, pattern
from tests.flow import MIB, quiet, virtual_time

DISK = pattern(9 * MIB + 512)
Serve = Callable[[Wire], Awaitable[None]]


class Collected:
    """A sink that keeps everything, with rooms of a size that fits nothing."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._room = bytearray(100_001)

    async def room(self) -> memoryview:
        await trio.lowlevel.checkpoint()
        return memoryview(self._room)

    def room_now(self) -> memoryview | None:
        return memoryview(self._room)

    def awaited(self, n: int) -> bool:
        return True

    def arrived(self, n: int) -> None:
        self.data += self._room[:n]


def ends() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    return trio.socket.socketpair(socket.AF_UNIX)


@asynccontextmanager
async def client_of(serve: Serve, size: int = len(DISK)) -> AsyncIterator[Client]:
    """A client, shaken hands with, of a server that then does `serve` and leaves."""
    ours, theirs = ends()

    async def server() -> None:
        with theirs:
            wire = Wire(theirs)
            await wire.shake_hands(size)
            try:
                await serve(wire)
            except NbdBroken:
                pass  # The client left.

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server)
        client = await nbd.connect(ours)
        nursery.start_soon(client.run)
        yield client
        nursery.cancel_scope.cancel()
    ours.close()


async def leave(wire: Wire) -> None:
    await trio.lowlevel.checkpoint()


async def stay_silent(wire: Wire) -> None:
    await trio.sleep_forever()


# ── reading ──


@virtual_time
async def test_any_extent_comes_whole_and_in_order() -> None:
    async with client_of(lambda wire: wire.serve(DISK)) as client:
        assert client.size == len(DISK)
        for start, end in ((0, len(DISK)), (1, 2), (MIB - 1, MIB + 1), (len(DISK) - 1, len(DISK)), (77, 5 * MIB)):
            sink = Collected()
            await client.read_into(Extent(start, end), sink)
            assert sink.data == DISK[start:end]


@virtual_time
async def test_several_reads_are_under_way_and_may_be_answered_in_any_order() -> None:
    async def backwards(wire: Wire) -> None:
        asked = [await wire.request() for _ in range(nbd.AHEAD)]
        for cookie, offset, length in reversed(asked):
            await wire.reply(cookie, DISK[offset : offset + length])
        await wire.serve(DISK)

    async with client_of(backwards) as client:
        sink = Collected()
        await client.read_into(Extent(5, len(DISK)), sink)
        assert sink.data == DISK[5:]


@virtual_time
async def test_no_more_than_so_many_are_asked_for_at_once() -> None:
    async with client_of(stay_silent) as client, trio.open_nursery() as nursery:
        for _ in range(3 * nbd.IN_FLIGHT_MAX):
            nursery.start_soon(client.ask, Extent(0, 512))
        await quiet()
        assert len(client._reads) == nbd.IN_FLIGHT_MAX
        nursery.cancel_scope.cancel()


@virtual_time
async def test_a_refused_read_is_an_error_of_its_own() -> None:
    async def serve(wire: Wire) -> None:
        cookie, _, _ = await wire.request()
        await wire.reply(cookie, code=5)
        await wire.serve(DISK)

    async with client_of(serve) as client:
        with pytest.raises(NbdRefused) as refused:
            await client.read_into(Extent(0, 512), Collected())
        assert refused.value.code == 5
        assert await (await client.ask(Extent(8, 16))).wait() == DISK[8:16]
        assert client.answers == 2


@virtual_time
async def test_who_gives_up_is_in_nobodys_way() -> None:
    go_on = trio.Event()

    async def serve(wire: Wire) -> None:
        await go_on.wait()
        await wire.serve(DISK)

    async with client_of(serve) as client:
        with trio.move_on_after(1):
            await client.read_into(Extent(0, len(DISK)), Collected())
        assert client.oldest_s == 0
        go_on.set()
        sink = Collected()
        await client.read_into(Extent(4 * MIB, len(DISK)), sink)
        assert sink.data == DISK[4 * MIB :]
        assert client.oldest_s is None


# ── handshakes that are none ──


async def _endless(wire: Wire) -> None:
    await wire.greet()
    while True:
        await wire.option_reply(nbd.REP_INFO, struct.pack(">H", 1) + b"name")


async def _after_greeting(wire: Wire, *then: Awaitable[None]) -> None:
    await wire.greet()
    for step in then:
        await step


HANDSHAKES: dict[str, Serve] = {
    "leaves": leave,
    "another protocol": lambda wire: wire.send(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "another magic": lambda wire: wire.greet(magic=b"NBDMAGIK"),
    "oldstyle": lambda wire: wire.greet(flags=0),
    "leaves in the middle": lambda wire: wire.greet(),
    "endless": _endless,
    "no magic in a reply": lambda wire: _after_greeting(wire, wire.option_reply(nbd.REP_ACK, magic=0)),
    "no export": lambda wire: _after_greeting(wire, wire.option_reply(nbd.REP_ACK)),
    "refuses": lambda wire: _after_greeting(wire, wire.option_reply(nbd.REP_ERR_UNSUP, b"go away")),
    "too long a reply": lambda wire: _after_greeting(wire, wire.option_reply(nbd.REP_INFO, length=1 << 31)),
    "a short export": lambda wire: _after_greeting(wire, wire.option_reply(nbd.REP_INFO, bytes(4))),
    "writable": lambda wire: _after_greeting(wire, wire.export(512, flags=1), wire.option_reply(nbd.REP_ACK)),
    "too large": lambda wire: _after_greeting(
        wire, wire.export(1 << 63, READ_ONLY), wire.option_reply(nbd.REP_ACK)
    ),
}


@pytest.mark.parametrize("name", HANDSHAKES)
@virtual_time
async def test_no_client_without_a_handshake(name: str) -> None:
    ours, theirs = ends()

    async def server() -> None:
        with theirs:
            try:
                await HANDSHAKES[name](Wire(theirs))
            except NbdBroken:
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server)
        with pytest.raises(NbdBroken), ours:
            await nbd.connect(ours)


# ── replies that are none ──


async def _of_another(wire: Wire) -> None:
    cookie, _, length = await wire.request()
    await wire.reply(cookie + 1000, bytes(length))


async def _twice(wire: Wire) -> None:
    cookie, offset, length = await wire.request()
    for _ in range(2):
        await wire.reply(cookie, DISK[offset : offset + length])


async def _too_long(wire: Wire) -> None:
    cookie, offset, length = await wire.request()
    await wire.reply(cookie, DISK[offset : offset + length + 512])


async def _cut(wire: Wire) -> None:
    cookie, offset, length = await wire.request()
    await wire.reply(cookie, DISK[offset : offset + length - 1])


async def _other_magic(wire: Wire) -> None:
    cookie, _, length = await wire.request()
    await wire.reply(cookie, bytes(length), magic=0x668E33EF)  # A structured reply, which nobody asked for.


async def _flood(wire: Wire) -> None:
    while True:
        await wire.send(bytes(1 << 16))


REPLIES: dict[str, Serve] = {
    "leaves": leave,
    "of another": _of_another,
    "twice": _twice,
    "too long": _too_long,
    "cut": _cut,
    "another magic": _other_magic,
    "a flood": _flood,
}


@pytest.mark.parametrize("name", REPLIES)
@virtual_time
async def test_a_wrong_reply_ends_the_connection_for_everybody(name: str) -> None:
    async with client_of(REPLIES[name]) as client:
        failed = 0

        async def read(sink: Collected) -> None:
            nonlocal failed
            try:
                await client.read_into(Extent(0, 3 * MIB), sink)
            except NbdBroken:
                failed += 1
                # Whatever came before was in reply to what was asked for.
                assert len(sink.data) <= MIB

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(read, Collected())
        assert failed == 2
        assert client.broken is not None
        assert client.oldest_s is None
        with pytest.raises(NbdBroken):
            await client.read_into(Extent(0, 1), Collected())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8), st.booleans())
def test_whatever_is_sent_a_read_ends_with_the_connection(sent: list[bytes], shaken: bool) -> None:
    @virtual_time
    async def run() -> None:
        ours, theirs = ends()

        async def server() -> None:
            with theirs:
                wire = Wire(theirs)
                try:
                    await (wire.shake_hands(MIB) if shaken else wire.greet())
                    for data in sent:
                        await wire.send(data)
                except NbdBroken:
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server)
            with ours, pytest.raises(NbdBroken):
                await use(ours, nursery)

    async def use(sock: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        client = await nbd.connect(sock)
        nursery.start_soon(client.run)
        await client.read_into(Extent(0, MIB), Collected())

    run()


# ── the input ──


class Bytes:
    """An input in memory; `failing` reads end badly, and `slow_s` is what each takes."""

    def __init__(self, data: bytes, failing: bool = False, slow_s: float = 0.0) -> None:
        self.size, self._data, self.failing, self.slow_s = len(data), data, failing, slow_s
        self.at_once = self.most = self.reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await trio.sleep(self.slow_s)
        self.at_once -= 1
        if self.failing:
            raise OriginUnavailable("an image", "it is away")
        assert offset + length <= self.size
        return self._data[offset : offset + length]


@asynccontextmanager
async def input_of(source: Bytes) -> AsyncIterator[tuple[InputServer, trio.socket.SocketType]]:
    ours, theirs = ends()
    server = InputServer(ours, source, lambda: 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        with theirs:
            yield server, theirs
            nursery.cancel_scope.cancel()


def request(offset: int, length: int, command: int = nbd.CMD_READ, cookie: int = 1) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, cookie, offset, length)


@virtual_time
async def test_the_input_can_be_read_by_our_own_client() -> None:
    async with input_of(Bytes(DISK)) as (_, sock), trio.open_nursery() as nursery:
        client = await nbd.connect(sock)
        nursery.start_soon(client.run)
        sink = Collected()
        await client.read_into(Extent(3, len(DISK)), sink)
        assert sink.data == DISK[3:]
        nursery.cancel_scope.cancel()


@virtual_time
async def test_small_reads_of_one_part_are_one_read_of_the_input() -> None:
    source = Bytes(DISK)
    async with input_of(source) as (_, sock), trio.open_nursery() as nursery:
        client = await nbd.connect(sock)
        nursery.start_soon(client.run)
        for start in range(0, len(DISK), 10_000):
            end = min(start + 10_000, len(DISK))
            assert await (await client.ask(Extent(start, end))).wait() == DISK[start:end]
        crossing = len(DISK) // WINDOW
        assert source.reads <= len(DISK) // WINDOW + 1 + crossing
        nursery.cancel_scope.cancel()


@virtual_time
async def test_nothing_outside_the_input_is_read_and_nobody_is_blamed_for_it() -> None:
    async with input_of(Bytes(DISK)) as (server, sock):
        await nbd.connect(sock)
        for offset, length in ((len(DISK), 1), (len(DISK) - 1, 2), ((1 << 64) - 1, MIB)):
            await nbd.send(sock, request(offset, length))
            assert nbd.REPLY.unpack(await nbd.receive(sock, nbd.REPLY.size)) == (nbd.REPLY_MAGIC, 22, 1)
        assert server.error is None


@virtual_time
async def test_a_failure_of_the_input_is_remembered() -> None:
    async with input_of(Bytes(DISK, failing=True)) as (server, sock):
        await nbd.connect(sock)
        await nbd.send(sock, request(0, 512))
        assert nbd.REPLY.unpack(await nbd.receive(sock, nbd.REPLY.size)) == (nbd.REPLY_MAGIC, 5, 1)
        assert isinstance(server.error, OriginUnavailable)


@pytest.mark.parametrize(
    "sent",
    [
        request(0, 512, command=nbd.CMD_WRITE) + bytes(512),
        request(0, REQUEST_MAX + 1),
        request(0, 0),
        bytes(nbd.REQUEST.size),
        request(0, 0, command=7),
    ],
)
@virtual_time
async def test_the_input_is_gone_for_who_asks_for_more_than_reads(sent: bytes) -> None:
    async with input_of(Bytes(DISK)) as (server, sock):
        await nbd.connect(sock)
        await nbd.send(sock, sent)
        with pytest.raises(NbdBroken):
            await nbd.receive(sock, 1)
        assert server.reason


@virtual_time
async def test_reading_without_end_ends() -> None:
    async with input_of(Bytes(DISK)) as (server, sock):
        await nbd.connect(sock)
        for _ in range(SPENT_MAX // MIB):
            await nbd.send(sock, request(0, MIB))
            await nbd.receive(sock, nbd.REPLY.size + MIB)
        assert not server.reason
        await nbd.send(sock, request(0, 1))
        with pytest.raises(NbdBroken):
            await nbd.receive(sock, 1)
        assert "without end" in server.reason


@virtual_time
async def test_a_client_that_does_not_listen_holds_no_more_than_some_reads() -> None:
    source = Bytes(DISK, slow_s=1.0)
    async with input_of(source) as (_, sock):
        await nbd.connect(sock)
        for cookie in range(64):
            await nbd.send(sock, request(0, MIB, cookie=cookie))
        await trio.sleep(100)
        assert source.most == 8
        assert source.at_once == 0


@virtual_time
async def test_a_clients_own_time_stands_while_it_waits_for_its_input() -> None:
    async with input_of(Bytes(DISK, slow_s=10.0)) as (server, sock):
        await nbd.connect(sock)
        before_s = server.own_time()
        await trio.sleep(1)
        for cookie in range(2):  # The second one comes while the first one is read.
            await nbd.send(sock, request(0, 512, cookie=cookie))
            await trio.sleep(5)
        await trio.sleep(20)  # Both are over after 15.
        assert server.own_time() - before_s == pytest.approx(1 + 30 - 15, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8), st.booleans())
def test_whatever_a_client_sends_the_input_survives_it(sent: list[bytes], shaken: bool) -> None:
    @virtual_time
    async def run() -> None:
        async with input_of(Bytes(DISK)) as (_, sock):
            if shaken:
                await nbd.connect(sock)
            try:
                for data in sent:
                    await nbd.send(sock, data)
            except NbdBroken:
                pass

    run()
