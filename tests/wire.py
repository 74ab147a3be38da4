"""The wire between cachefs and a scripted Glance and Keystone, without sockets and in virtual time: an adapter of
requests that asks a `ScriptedOrigin` in this process and gives its answer as HTTP, with faults. Rule: above it all
is what runs in production; nothing of it is patched.

    wire = Wire(origin)
    session.mount("http://", wire)
    wire.script = lambda request: Refused()

What takes time on a wire takes it with `flow.nap`, so tests must be `virtual_time` ones.
"""

from __future__ import annotations

import http.client
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import requests
import trio
import urllib3
from requests.adapters import HTTPAdapter

from tests import origin as o
from tests.flow import nap
from tests.origin import ScriptedOrigin

PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class Refused:
    """Nothing listens there."""


@dataclass(frozen=True)
class Blackhole:
    """No packet comes back."""


@dataclass(frozen=True)
class Hangs:
    """Connected, and no answer."""


Fault = Refused | Blackhole | Hangs | o.Fault
Script = Callable[[o.Request], Fault | None]


class Wire(HTTPAdapter):
    """`script` says which request meets what. `requests` is all that was asked, with its virtual time; an answer
    costs `cost_s`."""

    def __init__(
        self, origin: ScriptedOrigin, connect_timeout_s: float = 5.0, read_timeout_s: float = 20.0
    ) -> None:
        super().__init__()
        self._origin = origin
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        self.cost_s = 0.02
        self.script: Script = lambda request: None
        self.requests: list[o.Request] = []
        self._readable = os.open("/dev/null", os.O_RDONLY)

    def close(self) -> None:
        super().close()
        if self._readable >= 0:
            os.close(self._readable)
            self._readable = -1

    def of_kind(self, kind: o.Kind) -> list[o.Request]:
        return [request for request in self.requests if request.kind is kind]

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        asked = _asked(request)
        asked.at_s = trio.from_thread.run_sync(trio.current_time)
        self.requests.append(asked)
        fault = self.script(asked)
        self._meet(request, fault)
        if not asked.path.startswith("/v3"):  # Others wait for Keystone with a lock, of which time knows nothing.
            nap(self.cost_s)
        asked.fault = cast(o.Fault | None, fault)
        reply = self._origin.reply(asked)
        asked.status = reply.status
        raw = http.client.HTTPResponse(cast(Any, _Socket(self._readable, self._sent(reply, fault))), method="GET")
        raw.begin()
        answer = urllib3.HTTPResponse(
            body=cast(Any, raw),
            headers=dict(raw.msg.items()),
            status=raw.status,
            version=raw.version,
            preload_content=False,
            decode_content=False,
            original_response=raw,
            request_method=request.method,
        )
        made: requests.Response = self.build_response(request, answer)
        if not stream:
            assert made.content is not None
        return made

    def _meet(self, request: requests.PreparedRequest, fault: Fault | None) -> None:
        pool: Any = None
        match fault:
            case Refused():
                reason = urllib3.exceptions.NewConnectionError(pool, "Connection refused")
                why = urllib3.exceptions.MaxRetryError(pool, str(request.url), reason)
                raise requests.exceptions.ConnectionError(why, request=request)
            case Blackhole():
                nap(self._connect_timeout_s)
                raise requests.exceptions.ConnectTimeout("timed out", request=request)
            case Hangs():
                nap(self._read_timeout_s)
                raise requests.exceptions.ReadTimeout("timed out", request=request)
            case o.HangUp():
                why_ = urllib3.exceptions.ProtocolError("Connection aborted.")
                raise requests.exceptions.ConnectionError(why_, request=request)

    def _sent(self, reply: Any, fault: Fault | None) -> Iterator[bytes | float | Exception]:
        """What comes over the wire: bytes, pauses in seconds, and how it ends."""
        lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{k}: {v}" for k, v in reply.headers.items())]
        if reply.status != 204:
            lines.append(f"Content-Length: {reply.length - reply.undeclared}")
        yield "\r\n".join([*lines, "", ""]).encode()
        end = min(reply.length, fault.after) if isinstance(fault, o.Cut) else reply.length
        at, piece = 0, fault.size if isinstance(fault, o.Trickle) else PIECE_BYTES
        while at < end:
            n = min(piece, end - at)
            if isinstance(fault, o.Stall) and at >= fault.after:
                yield self._read_timeout_s
                yield TimeoutError("timed out")
            if isinstance(fault, o.Trickle) and at:
                yield fault.every_s
            data = reply.content(reply.offset + at, n)
            yield data + bytes(n - len(data))
            at += n
        if isinstance(fault, o.Cut) and fault.reset and fault.after < reply.length:
            yield ConnectionResetError("Connection reset by peer")


def _asked(request: requests.PreparedRequest) -> o.Request:
    url = urlsplit(str(request.url))
    kind, image = o._route(str(request.method), url.path)
    headers = {name.lower(): str(value) for name, value in request.headers.items()}
    return o.Request(
        kind=kind,
        method=str(request.method),
        path=url.path,
        query=dict(parse_qsl(url.query)),
        image=image,
        headers=headers,
        body=b"",
        at_s=0.0,
    )


class _Socket:
    """What http.client takes for one."""

    def __init__(self, readable: int, sent: Iterator[bytes | float | Exception]) -> None:
        self._raw = _Raw(readable, sent)

    def makefile(self, mode: str, *args: Any) -> io.BufferedReader:
        return io.BufferedReader(self._raw, PIECE_BYTES)


class _Raw(io.RawIOBase):
    def __init__(self, readable: int, sent: Iterator[bytes | float | Exception]) -> None:
        self._readable, self._sent = readable, sent
        self._rest = b""

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._readable

    def readinto(self, room: Any) -> int:
        while not self._rest:
            piece = next(self._sent, b"")
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                nap(piece)
            elif not piece:
                return 0
            else:
                self._rest = piece
        n = min(len(room), len(self._rest))
        room[:n], self._rest = self._rest[:n], self._rest[n:]
        return n
