"""An image's bytes for a converter, as an export of NBD over an inherited socket. Rule: it serves reads of this
one image, inside its size; whatever else is asked ends the connection.

Why not the file itself: a program that opens /dev/fd/N opens the file anew, as its own user, which the mount's
file_mode, gid and allow_other may forbid; it would need a /proc; it would hold the mount busy, and nobody could
kill it while a read of it waits for Glance. And only so is it known what it waits for: a converter that is slow
because Glance is, or that fails because Glance does, is not to blame.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from cachefs.errors import CachefsError, OriginUnavailable
from cachefs.plan.extents import floor
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
# Of input for one answer, in bytes: tables of the largest disks are some MiB, an answer is one. A read counts as
# SPENT_MIN at least, for it costs the loop some 100 us.
SPENT_MAX, SPENT_MIN = 256 << 20, 16 << 10
# A compressed grain of a vmdk, and the few bytes before it, are two reads that wait for each other.
WINDOW, WINDOWS_MAX = 256 << 10, 4
TOGETHER_MAX = 64 << 10  # To copy so much is less than a second call.
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
    """Images that are files: `open_image` gives a descriptor for reading, which is closed afterwards. It is
    called in a thread, and so are the reads: the file may be one of this very daemon's mount."""

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
    """Serves `source` to the one client behind `sock`, who may be anybody. `answers` counts what the client has
    done with it so far: between two of them it may `spend` no more than SPENT_MAX."""

    def __init__(self, sock: trio.socket.SocketType, source: Input, answers: Callable[[], int]) -> None:
        self._sock, self._input, self._answers = sock, source, answers
        self._windows = _Windows(source)
        self._answered = 0
        self._places = trio.Semaphore(SERVED_AT_ONCE)
        self._sending = trio.Lock()
        self._reading = 0
        self._waited_s = self._waiting_since_s = 0.0
        self.spent = 0
        self.reason = ""  # Why it was left, if it did what it may not do.
        self.error: CachefsError | None = None  # Of the last read of the input that failed, if one did, and when.
        self.failed_s = -math.inf

    def own_time(self) -> float:
        """The client's own time, in seconds: a clock that stands still while it waits for its input."""
        now_s = trio.current_time()
        return now_s - self._waited_s - (now_s - self._waiting_since_s if self._reading else 0.0)

    async def run(self) -> None:
        """Until the client leaves or breaks the rules, which is all the same."""
        try:
            if await self._shake_hands():
                async with trio.open_nursery() as reads:
                    await self._serve(reads)
                    reads.cancel_scope.cancel()
        except* NbdBroken:
            pass
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
                raise self._broken("it asks for what its input cannot do")
            if command == CMD_DISC:
                return
            if not 0 < length <= REQUEST_MAX:
                raise self._broken(f"it asks for {length} bytes of its input at once")
            self._spend(length)
            near = self._windows.now(offset, length)
            if near is not None:  # Most are: it reads one compressed piece after the other, in some bytes each.
                await self._reply(cookie, 0, near)
                continue
            await self._places.acquire()
            reads.start_soon(self._answer, cookie, offset, length)

    def _broken(self, reason: str) -> NbdBroken:
        self.reason = reason
        return NbdBroken(reason)

    def _spend(self, length: int) -> None:
        if self._answered != self._answers():
            self._answered, self.spent = self._answers(), 0
        self.spent += max(length, SPENT_MIN)
        if self.spent > SPENT_MAX:
            raise self._broken("it reads without end, and does not answer")

    async def _answer(self, cookie: int, offset: int, length: int) -> None:
        try:
            code, data = EINVAL, memoryview(b"")
            if offset + length <= self._input.size:
                code, data = await self._read(offset, length)
            await self._reply(cookie, code, data)
        finally:
            self._places.release()

    async def _reply(self, cookie: int, code: int, data: memoryview) -> None:
        async with self._sending:
            head = REPLY.pack(REPLY_MAGIC, code, cookie)
            if len(data) <= TOGETHER_MAX:
                await send(self._sock, head + data)
            else:
                await send(self._sock, head)
                await send(self._sock, data)

    async def _read(self, offset: int, length: int) -> tuple[int, memoryview]:
        if not self._reading:
            self._waiting_since_s = trio.current_time()
        self._reading += 1
        try:
            data = await self._windows.read(offset, length)
        except CachefsError as error:
            self.error, self.failed_s = error, trio.current_time()
            return EIO, memoryview(b"")
        finally:
            self._reading -= 1
            if not self._reading:
                self._waited_s += trio.current_time() - self._waiting_since_s
        assert len(data) == length, "an input gives what was asked for, or fails"
        return 0, data


class _Windows:
    """The parts of an input that were read last, WINDOW bytes each. An image never changes."""

    def __init__(self, source: Input) -> None:
        self._input = source
        self._kept: OrderedDict[int, memoryview] = OrderedDict()  # By their start, the last used last.

    def now(self, offset: int, length: int) -> memoryview | None:
        """What is kept of it, if that is all."""
        start = floor(offset, WINDOW)
        kept = self._kept.get(start)
        if kept is None or offset + length > start + len(kept):
            return None
        self._kept.move_to_end(start)
        return kept[offset - start : offset - start + length]

    async def read(self, offset: int, length: int) -> memoryview:
        """As `Input.read`. What crosses the edge of a window is large, or soon over."""
        start = floor(offset, WINDOW)
        if offset + length > start + WINDOW:
            return memoryview(await self._input.read(offset, length))
        kept = memoryview(await self._input.read(start, min(WINDOW, self._input.size - start)))
        self._kept[start] = kept
        while len(self._kept) > WINDOWS_MAX:
            self._kept.popitem(last=False)
        return kept[offset - start : offset - start + length]
