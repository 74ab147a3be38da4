"""Work that may hang, each piece in a process of its own with a time limit. Rule: whoever waits for it never hangs
with it, also where the kernel does not let go of it.

A thread would not do: one that hangs in the kernel keeps its process from ending.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Says one thing, as JSON, to whoever waits.
Say = Callable[[Any], None]

REAP_S = 0.5


@dataclass
class Piece:
    """One piece of work. Afterwards `said` is what it said, `failure` its exception, and `hung` whether it was not
    done within `limit_s` seconds."""

    name: str
    work: Callable[[Say], None]
    limit_s: float
    said: list[Any] = field(default_factory=list)
    failure: str | None = None
    hung: bool = False


def run(pieces: Sequence[Piece]) -> None:
    """All of them at once; returns when each is done or its time is over."""
    sys.stdout.flush()
    sys.stderr.flush()
    began_s = time.monotonic()
    children: dict[int, tuple[Piece, int, bytearray]] = {}
    pids: list[int] = []
    with selectors.DefaultSelector() as selector:
        try:
            for piece in pieces:
                ours, theirs = os.pipe()
                pid = os.fork()
                if pid == 0:
                    _child(piece, theirs)
                os.close(theirs)
                pids.append(pid)
                children[ours] = piece, pid, bytearray()
                selector.register(ours, selectors.EVENT_READ)
            while children:
                left_s = min(piece.limit_s for piece, *_ in children.values()) - (time.monotonic() - began_s)
                for key, _ in selector.select(max(left_s, 0.0)):
                    piece, _, text = children[key.fd]
                    data = os.read(key.fd, 65536)
                    text += data
                    if not data:
                        _end(selector, key.fd)
                        _take(piece, children.pop(key.fd)[2])
                now_s = time.monotonic() - began_s
                for ours, (piece, pid, text) in list(children.items()):
                    if now_s >= piece.limit_s:
                        piece.hung = True
                        os.kill(pid, signal.SIGKILL)
                        _end(selector, ours)
                        _take(piece, text)
                        del children[ours]
        finally:
            for ours, (_, pid, _) in children.items():
                os.kill(pid, signal.SIGKILL)
                _end(selector, ours)
            _reap(pids)


def _end(selector: selectors.BaseSelector, ours: int) -> None:
    selector.unregister(ours)
    os.close(ours)


def _take(piece: Piece, text: bytearray) -> None:
    for line in bytes(text).splitlines():
        try:
            kind, value = json.loads(line)
        except ValueError:
            continue  # Cut short by its end.
        if kind == "said":
            piece.said.append(value)
        else:
            piece.failure = str(value)


def _child(piece: Piece, theirs: int) -> None:
    """Never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # What libraries say is not for here; nor is the caller's pipe to be held open.
            os.dup2(nothing, stream)

        def tell(kind: str, value: Any) -> None:
            data = json.dumps([kind, value]).encode() + b"\n"
            while data:
                data = data[os.write(theirs, data) :]

        try:
            piece.work(lambda value: tell("said", value))
        except Exception as error:  # noqa: BLE001  # Whatever it is: it is told.
            tell("failed", f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _reap(pids: Sequence[int]) -> None:
    """Those that have ended. One that hangs in the kernel is left to init."""
    until_s = time.monotonic() + REAP_S
    left = list(pids)
    while left:
        left = [pid for pid in left if not _has_ended(pid)]
        if not left or time.monotonic() > until_s:
            return
        time.sleep(0.005)


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
