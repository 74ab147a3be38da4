"""Converters and NBD servers that do what a test says: scripts at the other end of the sockets, in the test's own
loop. Rule: what is scripted is what the other end sends; nothing of cachefs is patched.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from cachefs.sandbox import Ending
from cachefs.sources import nbd

SERVER_FLAGS = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
READ_ONLY = nbd.EXPORT_HAS_FLAGS | nbd.EXPORT_READ_ONLY


def children(pid: int) -> list[int]:
    """Processes of which `pid` is the parent, in order of their birth."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended since.
        if int(fields[1]) == pid:
            found.append(int(proc.name))
    return sorted(found)


def helpers() -> list[int]:
    """The sandboxes of this process. (The suite has other children: a Glance, a Keystone.)"""
    found = []
    for pid in children(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"confine" in command:
            found.append(pid)
    return found


def pattern(size: int) -> bytes:
    """Bytes that say where they belong."""
    return b"".join(struct.pack(">Q", offset) for offset in range(0, size + 8, 8))[:size]


class Wire:
    """The server's end of a connection."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock

    async def send(self, data: bytes) -> None:
        await nbd.send(self.sock, data)

    async def greet(self, magic: bytes = nbd.NBD_MAGIC, flags: int = SERVER_FLAGS) -> None:
        """Up to the client's NBD_OPT_GO, which is waited for."""
        await self.send(nbd.GREETING.pack(magic, nbd.OPTION_MAGIC, flags))
        await nbd.receive(self.sock, 4)
        _, option, length = nbd.OPTION.unpack(await nbd.receive(self.sock, nbd.OPTION.size))
        assert option == nbd.OPT_GO
        await nbd.receive(self.sock, length)

    async def option_reply(
        self, kind: int, data: bytes = b"", magic: int = nbd.OPTION_REPLY_MAGIC, length: int | None = None
    ) -> None:
        head = nbd.OPTION_REPLY.pack(magic, nbd.OPT_GO, kind, len(data) if length is None else length)
        await self.send(head + data)

    async def export(self, size: int, flags: int = READ_ONLY) -> None:
        await self.option_reply(nbd.REP_INFO, nbd.EXPORT.pack(nbd.INFO_EXPORT, size, flags))

    async def shake_hands(self, size: int) -> None:
        await self.greet()
        await self.export(size)
        await self.option_reply(nbd.REP_ACK)

    async def request(self) -> tuple[int, int, int]:
        """The next read: cookie, offset, length."""
        head = await nbd.receive(self.sock, nbd.REQUEST.size)
        magic, _, command, cookie, offset, length = nbd.REQUEST.unpack(head)
        assert (magic, command) == (nbd.REQUEST_MAGIC, nbd.CMD_READ)
        return cookie, offset, length

    async def reply(self, cookie: int, data: bytes = b"", code: int = 0, magic: int = nbd.REPLY_MAGIC) -> None:
        await self.send(nbd.REPLY.pack(magic, code, cookie) + data)

    async def serve(self, disk: bytes, reads_max: int | None = None) -> None:
        """Answers reads of `disk` truly, `reads_max` of them."""
        while reads_max is None or reads_max > 0:
            cookie, offset, length = await self.request()
            await self.reply(cookie, disk[offset : offset + length])
            reads_max = None if reads_max is None else reads_max - 1


Script = Callable[[Wire, trio.socket.SocketType], Awaitable[int]]
"""What a converter does with its export and its input; its exit status."""


@dataclass
class Process:
    """A script that runs."""

    scope: trio.CancelScope
    over: trio.Event
    ending: Ending | None = None

    def stop(self) -> None:
        self.scope.cancel()

    async def wait(self) -> Ending:
        await self.over.wait()
        assert self.ending is not None
        return self.ending


class ScriptedTool:
    """Converters that follow `scripts`: the first the first, and so on; the last one goes for all others."""

    missing: str | None = None

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.drivers: list[str] = []  # One for each that was started.
        self.running = self.most = 0

    @asynccontextmanager
    async def launch(self, driver: str, listener: socket.socket, source: socket.socket) -> AsyncIterator[Process]:
        script = self._scripts[min(len(self.drivers), len(self._scripts) - 1)]
        self.drivers.append(driver)
        connection = trio.socket.from_stdlib_socket(listener.accept()[0])
        its_input = trio.socket.fromfd(source.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
        assert os.get_inheritable(source.fileno()) is False
        process = Process(trio.CancelScope(), trio.Event())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, script, process, connection, its_input)
            try:
                yield process
            finally:
                process.stop()

    async def _run(
        self,
        script: Script,
        process: Process,
        connection: trio.socket.SocketType,
        its_input: trio.socket.SocketType,
    ) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        status = 0
        try:
            with process.scope, connection, its_input:
                try:
                    status = await script(Wire(connection), its_input)
                except* nbd.NbdBroken:  # Its client left, or its input: qemu-nbd ends then, too.
                    status = 0
        finally:
            self.running -= 1
            stopped = process.scope.cancelled_caught
            process.ending = Ending(-9, "asked") if stopped else Ending(status)
            process.over.set()
