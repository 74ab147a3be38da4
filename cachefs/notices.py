"""Telling the kernel what it is to forget, in a thread: it may wait for what the loop has not answered yet.
Rule: nothing is told after `close`. The session that it would go through is no more then, and its descriptor
another's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger(__name__)

# A notice that waits for the loop waits for the one who closes: then it is aborted by the unmount.
CLOSE_WAIT_S = 0.5


class Notices:
    """All methods are the loop's."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._telling = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, tell: Callable[[], None]) -> None:
        """Calls `tell` soon, after those that came before. An OSError of it means that the kernel knows nothing of
        that."""
        if self._closed:
            return
        self._queue.put(tell)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """From now on nothing is told. Waits for what is being told, but not for ever."""
        self._closed = True
        self._queue.put(None)
        if self._telling.acquire(timeout=CLOSE_WAIT_S):
            self._telling.release()

    def _run(self) -> None:
        while (tell := self._queue.get()) is not None:
            with self._telling:
                if self._closed:
                    return
                try:
                    tell()
                except OSError as error:
                    log.debug("%s: %s", tell, error)
                except Exception:
                    log.exception("unexpected failure of %s", tell)
