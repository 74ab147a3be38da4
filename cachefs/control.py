"""The Unix socket: one JSON request a line in, one JSON answer a line out. Rule: nothing here touches the mount,
so that a command answers when the mount does not.

A request is `{"command": NAME, ...operands}`; an answer `{"ok": true, "result": ...}` or
`{"ok": false, "error": TEXT}`. The socket belongs to the daemon's user and group, and to nobody else.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from cachefs import logs
from cachefs.errors import CachefsError, ControlError

log = logs.get(__name__)

REQUEST_BYTES_MAX = 1 << 20
REQUEST_WAIT_S = 30.0
CONNECTIONS_MAX = 64

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


class ControlServer:
    """Answers requests by the handler that has the command's name."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self.path, self._handlers = path, handlers
        self._socket: trio.socket.SocketType | None = None
        self._made: tuple[int, int] | None = None
        self._limit = trio.CapacityLimiter(CONNECTIONS_MAX)

    async def open(self) -> None:
        """Begins to listen. Raises ControlError where another daemon does, or the path cannot be used."""
        try:
            await self._clear()
            self._make_folder()
        except OSError as error:
            raise ControlError(self.path, f"cannot be made: {error.strerror or error}") from error
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o117)  # rw-rw----
            try:
                await listener.bind(self.path)
            finally:
                os.umask(before)
            listener.listen(CONNECTIONS_MAX)
            self._made = _identity(self.path)
        except OSError as error:
            listener.close()
            raise ControlError(self.path, f"cannot be made: {error.strerror or error}") from error
        self._socket = listener

    async def _clear(self) -> None:
        """Removes the socket of a daemon that is gone. Anything else is not this daemon's to remove."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise ControlError(self.path, "is there and is no socket")
        if await _is_alive(self.path):
            raise ControlError(self.path, "another daemon answers there")
        os.unlink(self.path)

    def _make_folder(self) -> None:
        """The last one of the path, which /run has lost with the last boot. More would be somebody's mistake: the
        root of a disk that is not mounted yet, a name with a slip in it."""
        folder = os.path.dirname(self.path)
        try:
            os.mkdir(folder or ".", 0o755)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise ControlError(
                self.path,
                f"there is no folder {os.path.dirname(folder)}, and only {os.path.basename(folder)} in it would "
                "be made: make it, or see to [control] socket",
            ) from None

    async def serve(self) -> None:
        """Until cancelled."""
        assert self._socket is not None, "open comes first"
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await self._socket.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                        raise
                    log.warning("control socket: %s", error.strerror)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._converse, trio.SocketStream(connection))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            try:
                if _identity(self.path) == self._made:  # Or somebody else has put his there since.
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
            except OSError as error:  # Nothing to end otherwise for.
                log.warning("the control socket stays behind: %s", error)

    async def _converse(self, stream: trio.SocketStream) -> None:
        async with self._limit, stream:
            try:
                with trio.move_on_after(REQUEST_WAIT_S):
                    line = await _line(stream)
                    if line:
                        await stream.send_all(json.dumps(await self._answer(line)).encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # Whoever asked has gone away.

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"ok": False, "error": "this daemon does not know that request"}
        try:
            return {"ok": True, "result": await handler(request)}
        except CachefsError as error:
            return {"ok": False, "error": str(error)}
        except Exception:  # A bug in an answer must not end the daemon.
            log.exception("unexpected failure of %s", request["command"])
            return {"ok": False, "error": "the daemon failed to answer; its log says why"}


async def _line(stream: trio.SocketStream) -> bytes:
    """Up to the first newline; what came, when the other side stops before it or sends too much."""
    line = b""
    while not line.endswith(b"\n") and len(line) < REQUEST_BYTES_MAX:
        part = await stream.receive_some(65536)
        if not part:
            break
        line += part
    return line


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


async def _is_alive(path: str) -> bool:
    with trio.move_on_after(2), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            await probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True
