"""An image's bytes for a converter, as an export of NBD over an inherited socket. Rule: it serves reads of this one
image, inside its size; whatever else is asked ends the connection.

Why not the file itself: a program that opens /dev/fd/N opens the file anew, as its own user, which the mount's
file_mode, gid and allow_other may forbid; it would need a /proc; it would hold the mount busy, and nobody could kill
it while a read of it waits for Glance. And only so is it known what it waits for: a converter that is slow because
Glance is, or that fails because Glance does, is not to blame.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from cachefs.errors import CachefsError, OriginUnavailable
from cachefs.sources.nbd import (
    CMD_DISC,
    CMD_READ,
    EXPORT,
    EXPORT_HAS_FLAGS,
    EXPORT_READ_ONLY,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_MAGIC,
    OPT_ABORT,
    OPT_GO,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_UNSUP,
    REP_INFO,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    NbdBroken,
    receive,
    send,
)

EIO, EINVAL = 5, 22
REQUEST_MAX = 1 << 20
SERVED_AT_ONCE = 8
OPTIONS_MAX, OPTION_BYTES_MAX = 16, 4096


class Input(Protocol):
    """An image that can be read at any place."""

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly `length` bytes from `offset`, which lie inside `size`. Raises CachefsError."""
        ...


OpenInput = Callable[[str], AbstractAsyncContextManager[Input]]


def from_files(open_image: Callable[[str], int]) -> OpenInput:
    """Images that are files: `open_image` gives a descriptor for reading, which is closed afterwards. It is called in
    a thread, and so are the reads: the file may be one of this very daemon's mount."""

    @asynccontextmanager
    async def opened(image: str) -> AsyncIterator[Input]:
        try:
            fd = await trio.to_thread.run_sync(open_image, image)
        except OSError as error:
            raise OriginUnavailable(image, f"cannot be opened: {error.strerror}") from error
        try:
            found = await trio.to_thread.run_sync(os.fstat, fd)
            if not stat.S_ISREG(found.st_mode):
                raise OriginUnavailable(image, "is no regular file")
            yield _File(image, fd, found.st_size)
        finally:
            # Every read has ended: they are not left behind when they are cancelled.
            os.close(fd)

    return opened


class _File:
    def __init__(self, image: str, fd: int, size: int) -> None:
        self._image, self._fd, self.size = image, fd, size

    async def read(self, offset: int, length: int) -> bytes:
        try:
            data = await trio.to_thread.run_sync(os.pread, self._fd, length, offset)
        except OSError as error:
            raise OriginUnavailable(self._image, f"cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise OriginUnavailable(self._image, f"{len(data)} of {length} bytes can be read at {offset}")
        return data


class InputServer:
    """Serves `source` to the one client behind `sock`, who may be anybody."""

    def __init__(self, sock: trio.socket.SocketType, source: Input) -> None:
        self._sock, self._input = sock, source
        self._places = trio.Semaphore(SERVED_AT_ONCE)
        self._sending = trio.Lock()
        self._reading = 0
        self._quiet_since_s = trio.current_time()
        self.bytes_read = 0
        self.error: CachefsError | None = None  # The last read of the input that failed, if one did.

    @property
    def quiet_since_s(self) -> float | None:
        """Since when the client has not waited for the input; None while it does (of trio's clock)."""
        return None if self._reading else self._quiet_since_s

    async def run(self) -> None:
        """Until the client leaves or breaks the rules, which is all the same."""
        try:
            if await self._shake_hands():
                async with trio.open_nursery() as reads:
                    await self._serve(reads)
                    reads.cancel_scope.cancel()
        except NbdBroken:
            pass
        except BaseExceptionGroup as group:
            _, others = group.split(NbdBroken)
            if others is not None:
                raise others from None
        finally:
            self._sock.close()

    async def _shake_hands(self) -> bool:
        await send(self._sock, GREETING.pack(NBD_MAGIC, OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        await receive(self._sock, 4)
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION.unpack(await receive(self._sock, OPTION.size))
            if magic != OPTION_MAGIC or length > OPTION_BYTES_MAX or option == OPT_ABORT:
                return False
            await receive(self._sock, length)  # Whatever it calls the export: there is one.
            if option != OPT_GO:
                await self._reply_to_option(option, REP_ERR_UNSUP)
                continue
            flags = EXPORT_HAS_FLAGS | EXPORT_READ_ONLY
            await self._reply_to_option(option, REP_INFO, EXPORT.pack(INFO_EXPORT, self._input.size, flags))
            await self._reply_to_option(
                option, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, 4096, REQUEST_MAX)
            )
            await self._reply_to_option(option, REP_ACK)
            return True
        return False

    async def _reply_to_option(self, option: int, kind: int, data: bytes = b"") -> None:
        await send(self._sock, OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    async def _serve(self, reads: trio.Nursery) -> None:
        while True:
            head = await receive(self._sock, REQUEST.size)
            magic, _, command, cookie, offset, length = REQUEST.unpack(head)
            if magic != REQUEST_MAGIC or command not in (CMD_READ, CMD_DISC):
                raise NbdBroken("no request that this export knows")
            if command == CMD_DISC:
                return
            if not 0 < length <= REQUEST_MAX:
                raise NbdBroken("a read that is too long")
            await self._places.acquire()
            reads.start_soon(self._answer, cookie, offset, length)

    async def _answer(self, cookie: int, offset: int, length: int) -> None:
        try:
            code, data = EINVAL, memoryview(b"")
            if offset + length <= self._input.size:
                code, data = await self._read(offset, length)
            async with self._sending:
                await send(self._sock, REPLY.pack(REPLY_MAGIC, code, cookie))
                await send(self._sock, data)
        finally:
            self._places.release()

    async def _read(self, offset: int, length: int) -> tuple[int, memoryview]:
        self._reading += 1
        try:
            data = memoryview(await self._input.read(offset, length))
        except CachefsError as error:
            self.error = error
            return EIO, memoryview(b"")
        finally:
            self._reading -= 1
            self._quiet_since_s = trio.current_time()
        assert len(data) == length, "an input gives what was asked for, or fails"
        self.bytes_read += length
        return 0, data
