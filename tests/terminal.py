"""A pseudo-terminal with a command on it. Rule: whatever the test does, the command ends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.cloud.service import clean_environment
from tests.node import ROOT

COLUMNS, LINES = 120, 40


def _at_a_terminal() -> None:
    """In the child. What runs in the background of a shell would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """`said` is all that came so far, with whatever a terminal would obey."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        columns: int = COLUMNS,
        lines: int = LINES,
    ) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.said = ""
        self.process = subprocess.Popen(
            list(command),
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
            preexec_fn=_at_a_terminal,
            env=clean_environment() | {"TERM": "xterm"} | dict(environment or {}),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)

    @property
    def mode(self) -> list[object]:
        """What the terminal is set to."""
        return list(termios.tcgetattr(self._theirs))

    @property
    def text(self) -> str:
        """What was said, without movement and colours."""
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.said)

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def read_until(self, pattern: str, timeout_s: float = 30, *, plain: bool = False) -> None:
        """Until it has come; `plain`: without movement and colours."""
        until_s = time.monotonic() + timeout_s
        while re.search(pattern, self.text if plain else self.said) is None:
            left_s = until_s - time.monotonic()
            came = self._read(min(left_s, 0.5))
            ended = not came and self.process.poll() is not None
            assert left_s > 0, f"{pattern!r} did not come: {self.said[-3000:]!r}"
            assert not ended, f"{pattern!r} did not come: {self.said[-3000:]!r}"

    def end(self, timeout_s: float = 30) -> int:
        """Reads to the end; the exit status."""
        until_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < until_s, f"it does not end: {self.said[-3000:]!r}"
            self._read(0.05)
        while self._read(0.0):
            pass
        return self.process.wait()

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.ours], [], [], timeout_s)[0]:
            return False
        data = os.read(self.ours, 65536)
        self.said += data.decode(errors="replace")
        return bool(data)
