"""Reading an export of an NBD server over a connected socket. Rule: nothing that the server says is believed
beyond the bytes of a disk that it may choose anyway; whatever else it does ends the connection, with a reason.

The server here is qemu-nbd with a tenant's image inside, so it may be anybody. It cannot make the client wait
for ever (`oldest_s` says how long it owes an answer, and its owner ends it), allocate (it is the client who says
how many bytes a reply has), or loop.

Spoken is what all servers know: the fixed newstyle handshake, NBD_OPT_GO, and simple replies. Structured replies
would name holes, at the price of a second and larger language to check; zeros through a socket cost little.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from cachefs.errors import CachefsError
from cachefs.plan.extents import Extent, pieces
from cachefs.sources import Sink

# https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; all numbers are big-endian.
NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698
FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_INFO, OPT_GO = 1, 2, 6, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP, REP_ERR_INVALID = 1, 3, (1 << 31) + 1, (1 << 31) + 3
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
EXPORT_HAS_FLAGS, EXPORT_READ_ONLY = 1, 2
CMD_READ, CMD_WRITE, CMD_DISC = 0, 1, 2
GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT = struct.Struct(">HQH")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")

READ_BYTES = 1 << 20
AHEAD = 4  # Reads of one fetch under way at once.
IN_FLIGHT_MAX = 16  # More than qemu-nbd works on at once it leaves in the socket.
OPTION_REPLIES_MAX, OPTION_REPLY_BYTES_MAX = 16, 4096
SIZE_MAX = 1 << 62


class NbdBroken(CachefsError):
    """The connection is of no more use: the server left, or said what it may not say. `reason` has nothing of the
    server's in it but numbers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class NbdRefused(CachefsError):
    """The server answers a read with `code` (5 is EIO, 22 EINVAL). The connection is sound."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"NBD error {self.code}"


async def receive_exactly(sock: trio.socket.SocketType, room: memoryview) -> None:
    """Fills `room`. Raises NbdBroken when the other end leaves before."""
    while room:
        try:
            n = await sock.recv_into(room)
        except OSError as error:
            raise NbdBroken(f"the connection failed: {error.strerror}") from error
        if n == 0:
            raise NbdBroken("the connection was closed")
        room = room[n:]


async def receive(sock: trio.socket.SocketType, n: int) -> bytes:
    data = bytearray(n)
    await receive_exactly(sock, memoryview(data))
    return bytes(data)


async def send(sock: trio.socket.SocketType, data: bytes | bytearray | memoryview) -> None:
    """Sends all of `data`. Raises NbdBroken. Who is cancelled in it may have sent a part."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[await sock.send(rest) :]
        except OSError as error:
            raise NbdBroken(f"the connection failed: {error.strerror}") from error


class Read:
    """One read that was asked for; it has its own buffer, so that nobody has to be there when its bytes come."""

    def __init__(self, length: int, asked_s: float) -> None:
        self.data = bytearray(length)
        self.asked_s = asked_s
        self.error: CachefsError | None = None
        self._over = trio.Event()

    def finish(self, error: CachefsError | None) -> None:
        self.error = error
        self._over.set()

    async def wait(self) -> bytearray:
        """The bytes. Raises NbdRefused or NbdBroken."""
        await self._over.wait()
        if self.error is not None:
            raise self.error.again()
        return self.data


class Client:
    """An export of `size` bytes. `run` has to run while it is in use, and returns when the connection is broken,
    why is in `broken`. `answers` counts the replies."""

    def __init__(self, sock: trio.socket.SocketType, size: int, clock: Callable[[], float]) -> None:
        self.size = size
        self.answers = 0
        self.broken: NbdBroken | None = None
        self._sock, self._clock = sock, clock
        self._reads: dict[int, Read] = {}  # By cookie, oldest first.
        self._cookie = 0
        self._places = trio.Semaphore(IN_FLIGHT_MAX, max_value=IN_FLIGHT_MAX)
        self._sending = trio.Lock()

    @property
    def oldest_s(self) -> float | None:
        """When the oldest read was asked for that has no answer; None when nothing is owed."""
        for read in self._reads.values():
            return read.asked_s
        return None

    async def ask(self, extent: Extent) -> Read:
        """Asks for `extent`, not empty and inside the export; waits only while too many reads are under way."""
        assert 0 <= extent.start < extent.end <= self.size, extent
        await self._places.acquire()
        self._cookie += 1
        cookie, read = self._cookie, Read(extent.length, self._clock())
        self._reads[cookie] = read
        request = REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, cookie, extent.start, extent.length)
        try:
            async with self._sending:
                if self.broken is not None:
                    raise self.broken.again()
                n = await self._sock.send(request)  # Who is cancelled here has sent nothing.
        except OSError as error:
            raise self._break(f"the connection failed: {error.strerror}").again() from error
        except BaseException:
            self._finish(cookie, NbdBroken("it was never asked for"))
            raise
        if n != len(request):
            raise self._break("the server takes no requests").again()
        return read

    async def read_into(self, extent: Extent, sink: Sink) -> None:
        """Gives all of `extent` to `sink`, in order. Raises NbdRefused or NbdBroken; what was given so far
        stays."""
        ahead: deque[Read] = deque()
        for piece in pieces(extent, READ_BYTES):
            if len(ahead) == AHEAD:
                await hand_on(await ahead.popleft().wait(), sink)
            ahead.append(await self.ask(piece))
        while ahead:
            await hand_on(await ahead.popleft().wait(), sink)

    async def run(self) -> None:
        """Takes the replies."""
        head = bytearray(REPLY.size)
        try:
            while True:
                await receive_exactly(self._sock, memoryview(head))
                magic, code, cookie = REPLY.unpack(head)
                read = self._reads.get(cookie)
                if magic != REPLY_MAGIC:
                    raise NbdBroken(f"a reply begins with {magic:#x}")
                if read is None:
                    raise NbdBroken("a reply to nothing that was asked")
                if code == 0:
                    await receive_exactly(self._sock, memoryview(read.data))
                self.answers += 1
                self._finish(cookie, NbdRefused(code) if code else None)
        except NbdBroken as error:
            self._break(error.reason)
        finally:
            self._break("the connection was given up")

    def _break(self, reason: str) -> NbdBroken:
        if self.broken is None:
            self.broken = NbdBroken(reason)
            for cookie in list(self._reads):
                self._finish(cookie, self.broken)
        return self.broken

    def _finish(self, cookie: int, error: CachefsError | None) -> None:
        read = self._reads.pop(cookie, None)
        if read is not None:
            read.finish(error)
            self._places.release()


async def hand_on(data: bytearray, sink: Sink) -> None:
    rest = memoryview(data)
    while rest:
        room = await sink.room()
        n = min(len(room), len(rest))
        room[:n] = rest[:n]
        sink.arrived(n)
        rest = rest[n:]


# ── the handshake ──


async def connect(sock: trio.socket.SocketType, clock: Callable[[], float] = trio.current_time) -> Client:
    """Asks the server behind `sock` for its default export. Raises NbdBroken; waits as long as the server lets
    it."""
    magic, option_magic, flags = GREETING.unpack(await receive(sock, GREETING.size))
    if magic != NBD_MAGIC or option_magic != OPTION_MAGIC or not flags & FLAG_FIXED_NEWSTYLE:
        raise NbdBroken("no NBD server that can do the fixed newstyle handshake")
    go = struct.pack(">IH", 0, 0)  # No name, nothing to know besides the size.
    await send(sock, struct.pack(">I", flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)))
    await send(sock, OPTION.pack(OPTION_MAGIC, OPT_GO, len(go)) + go)
    size = None
    for _ in range(OPTION_REPLIES_MAX):
        kind, data = await _option_reply(sock)
        if kind == REP_ACK and size is not None:
            return Client(sock, size, clock)
        if kind == REP_INFO and data[:2] == struct.pack(">H", INFO_EXPORT):
            size = _export_size(data)
        elif kind != REP_INFO:
            raise NbdBroken(f"the server answers {kind:#x} to NBD_OPT_GO")
    raise NbdBroken("the handshake does not end")


async def _option_reply(sock: trio.socket.SocketType) -> tuple[int, bytes]:
    magic, option, kind, length = OPTION_REPLY.unpack(await receive(sock, OPTION_REPLY.size))
    if magic != OPTION_REPLY_MAGIC or option != OPT_GO:
        raise NbdBroken("no reply to an option where one is due")
    if length > OPTION_REPLY_BYTES_MAX:
        raise NbdBroken(f"{length} bytes in reply to an option")
    return kind, await receive(sock, length)


def _export_size(data: bytes) -> int:
    if len(data) != EXPORT.size:
        raise NbdBroken(f"{len(data)} bytes of NBD_INFO_EXPORT")
    _, size, flags = EXPORT.unpack(data)
    if not flags & EXPORT_HAS_FLAGS or not flags & EXPORT_READ_ONLY:
        raise NbdBroken(f"the export's flags are {flags:#x}: it is not read-only")
    if size > SIZE_MAX:
        raise NbdBroken(f"an export of {size} bytes")
    assert isinstance(size, int)
    return size
