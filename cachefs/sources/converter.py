"""One process that turns one image into its guest disk: qemu-nbd in a sandbox. Rule: who is to blame for its end
is decided here, from what its input did and what the kernel says, never from what it says itself.

It gets two sockets, and nothing else: one to listen on, where we are connected already and nobody can be any
more, and one to read the image from (`nbd_input`). The format is given, never found out, and there is no backing
file.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Protocol

import trio

from cachefs import logs
from cachefs.errors import CachefsError, OriginError, OriginUnavailable
from cachefs.sandbox import LIMITS, NOBODY, Account, Ending, Limits, sandboxed
from cachefs.sources.nbd import Client, NbdBroken, connect
from cachefs.sources.nbd_input import Input, InputServer, OpenInput

log = logs.get(__name__)

TOOL = "qemu-nbd"
SEARCHED = "/usr/local/bin:/usr/bin:/bin"
LEAVING_S = 1.0  # For a process that has closed its socket to be gone, and to say how.
WATCH_MIN_S = 0.1
# The limits on CPU time and on life are for a process as a whole. Before an honest one can come near, it is
# replaced.
SERVED_MAX, AGE_MAX_S = 64 << 30, 12 * 3600.0


class Crashed(OriginError):
    """The converter is no more, and neither its input nor we are to blame."""


class ConverterUnusable(OriginError):
    """The converter or its sandbox cannot be started here, which says nothing of the image."""


class Launched(Protocol):
    """A converter's process."""

    def stop(self) -> None: ...

    async def wait(self) -> Ending: ...


class Tool(Protocol):
    """What converts."""

    @property
    def missing(self) -> str | None:
        """Why it cannot be used here, for people; None when it is installed."""
        ...

    def launch(
        self, driver: str, listener: socket.socket, source: socket.socket
    ) -> AbstractAsyncContextManager[Launched]:
        """A process for one of qemu's drivers, with a listening socket and its input, which stay the caller's."""
        ...


class QemuNbd:
    """qemu-nbd in a sandbox. It is not looked for in PATH, which others may have set."""

    def __init__(self, account: Account = NOBODY, limits: Limits = LIMITS, searched: str = SEARCHED) -> None:
        self._account, self._limits, self._searched = account, limits, searched

    @property
    def missing(self) -> str | None:
        return None if shutil.which(TOOL, path=self._searched) else "qemu-utils is not installed"

    @asynccontextmanager
    async def launch(self, driver: str, listener: socket.socket, source: socket.socket) -> AsyncIterator[Launched]:
        tool = shutil.which(TOOL, path=self._searched) or TOOL
        files = [listener.fileno(), source.fileno()]  # There: 3 and 4.
        command = [tool, "--read-only", _disk(driver, source=4)]
        async with sandboxed(command, files, listening=1, account=self._account, limits=self._limits) as process:
            yield process


def _disk(driver: str, source: int) -> str:
    """As JSON and not as --image-opts: only here can a backing file be ruled out (null)."""
    file = {"driver": "nbd", "read-only": True, "server": {"type": "fd", "str": str(source)}}
    return "json:" + json.dumps({"driver": driver, "read-only": True, "backing": None, "file": file})


class Converter:
    """While `users` is 0 it may be ended, and after `idle_s` it is. `patience_s` is how long it may owe an answer
    while it does not wait for its input."""

    def __init__(self, image: str, driver: str, idle_s: float, patience_s: float) -> None:
        self.image, self._driver = image, driver
        self._idle_s, self._patience_s = idle_s, patience_s
        self.began_s = self.idle_since_s = trio.current_time()
        self.users = 0
        self.served = 0  # Bytes.
        self.leaving = False  # Nobody new gets it.
        self.client: Client | None = None
        self.failure: OriginError | None = None  # Why it is over, unless it was time for it to go.
        self.over = trio.Event()
        self._shaken = trio.Event()
        self._scope = trio.CancelScope()
        self._server: InputServer | None = None
        self._reason = ""  # Why it has to end, in our words.
        self._stuck = False  # And that it will not by itself.

    # ── for who uses it ──

    async def ready(self) -> Client:
        """When it can be read. Raises what it failed with."""
        await self._shaken.wait()
        if self.client is None:
            raise await self.why_over()
        return self.client

    async def why_over(self) -> OriginError:
        """Its failure, as a new exception, when it is over."""
        await self.over.wait()
        failure = self.failure or OriginUnavailable(self.image, "its converter was stopped")
        return failure.again()

    def input_error(self, since_s: float) -> OriginError | None:
        """What went wrong with its input from then on, as a new exception."""
        if self._server is None or self._server.error is None or self._server.failed_s < since_s:
            return None
        error = self._server.error
        return error.again() if isinstance(error, OriginError) else OriginUnavailable(self.image, str(error))

    @property
    def is_worn(self) -> bool:
        return self.served >= SERVED_MAX or trio.current_time() >= self.began_s + AGE_MAX_S

    def release(self) -> None:
        """One user less."""
        self.users -= 1
        self.idle_since_s = trio.current_time()
        if self.is_worn:
            self.leaving = True
        if self.leaving and not self.users:
            self.end()

    def end(self) -> None:
        self.leaving = True
        self._scope.cancel()

    # ── its life ──

    async def run(self, open_input: OpenInput, tool: Tool) -> None:
        """From its start to its end. Raises nothing: see `failure`. Its owner sets `over`."""
        try:
            with self._scope:
                async with open_input(self.image) as source:
                    await self._live(source, tool)
        except OriginError as error:
            self.failure = error
        except (CachefsError, OSError) as error:
            self.failure = ConverterUnusable(self.image, f"{type(error).__name__}: {error}")
        except Exception:  # A bug in one is an error of its readers, not the end of everybody's mount.
            log.exception("unexpected failure of a converter", image=self.image)
            self.failure = ConverterUnusable(self.image, "unexpected failure")
        finally:
            self.leaving = True
            self._shaken.set()

    async def _live(self, source: Input, tool: Tool) -> None:
        with ExitStack() as stack:
            listener, ours = map(stack.enter_context, await trio.to_thread.run_sync(rendezvous))
            its_input, our_end = map(stack.enter_context, socket.socketpair())
            server = InputServer(_for_trio(our_end), source, lambda: self.client.answers if self.client else 0)
            self._server = server
            async with tool.launch(self._driver, listener, its_input) as process:
                listener.close()
                its_input.close()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve, server, nursery.cancel_scope)
                    nursery.start_soon(self._watch, server, nursery.cancel_scope)
                    nursery.start_soon(self._end_when_idle)
                    await self._converse(_for_trio(ours), server)
                    nursery.cancel_scope.cancel()
                self.failure = self._verdict(await _ended(process, at_once=self._stuck))

    async def _converse(self, sock: trio.socket.SocketType, server: InputServer) -> None:
        try:
            self.client = await connect(sock, server.own_time)
        except NbdBroken as error:
            self._reason = error.reason
            return
        self._shaken.set()
        await self.client.run()
        assert self.client.broken is not None
        self._reason = self.client.broken.reason

    async def _end_when_idle(self) -> None:
        while True:
            now_s = trio.current_time()
            if not self.users and now_s >= self.idle_since_s + self._idle_s:
                self.end()
            await trio.sleep_until(now_s + self._idle_s if self.users else self.idle_since_s + self._idle_s)

    async def _watch(self, server: InputServer, scope: trio.CancelScope) -> None:
        """Ends it when it owes an answer for too long. Its own time does not go faster than ours."""
        began_s = server.own_time()
        while True:
            now_s = server.own_time()
            owing_s = self.client.oldest_s if self.client else began_s
            left_s = self._patience_s - (0.0 if owing_s is None else now_s - owing_s)
            if left_s <= 0:
                self._reason, self._stuck = f"no answer for {self._patience_s:g} s", True
                scope.cancel()
            await trio.sleep(max(left_s, WATCH_MIN_S))

    async def _serve(self, server: InputServer, scope: trio.CancelScope) -> None:
        """Ends it when it has no input any more."""
        await server.run()
        self._reason, self._stuck = server.reason or "it left its input", bool(server.reason)
        scope.cancel()

    def _verdict(self, ending: Ending) -> OriginError:
        if ending.failed:
            log.warning("%s %s", TOOL, ending, image=self.image)
            return ConverterUnusable(self.image, f"{TOOL} {ending}")
        how = self._reason if self._stuck or ending.stopped == "asked" else str(ending)
        log.warning("%s: %s (it said: %s)", TOOL, how, ending.said or "nothing", image=self.image)
        return self.input_error(trio.current_time() - self._patience_s) or Crashed(self.image, f"{TOOL}: {how}")


async def _ended(process: Launched, at_once: bool) -> Ending:
    """How it ended, when it has; it gets a moment to do so by itself."""
    if not at_once:
        with trio.move_on_after(LEAVING_S):
            return await process.wait()
    process.stop()
    return await process.wait()


def rendezvous() -> tuple[socket.socket, socket.socket]:
    """A listening socket, and the one connection that it will ever have: its name is gone, and nobody else could
    have used it. Takes a moment of the disk's time."""
    listener, ours = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
            fd = os.open(folder, os.O_PATH)
            try:
                name = f"/proc/self/fd/{fd}/s"  # A socket's name may be no longer than 107 bytes.
                listener.bind(name)
                listener.listen(1)
                ours.connect(name)
            finally:
                os.close(fd)
    except BaseException:
        listener.close()
        ours.close()
        raise
    return listener, ours


def _for_trio(sock: socket.socket) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(sock)
