"""Signals that end the demo. Rule: one of them raises `Ended` once, in the main thread; what comes after that
waits for the cleaning up.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """Somebody wants this to end. No Exception: no net on the way may hold it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """From `catch` on, the signals of ENDING raise `Ended`, but not within `held` and only once."""

    def __init__(self) -> None:
        self._holds = 0
        self._pending: int | None = None
        self._raised = False

    def catch(self) -> None:
        for number in ENDING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            return
        if self._holds:
            self._pending = number
            return
        self._raised = True
        raise Ended(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For steps that are short and must be whole: making something and noting that it is there."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._pending is not None and not self._holds and not self._raised:
            self._raised = True
            raise Ended(self._pending)

    def ignore(self) -> None:
        """From here on it ends anyway."""
        self._raised = True
