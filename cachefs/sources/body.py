"""The body of one answer, from the socket into the buffer that it is meant for. Rule: what HTTP says of the body's
end is believed, and nothing is said here about what the bytes should be.

urllib3 gives a body in `bytes` of its own making: each is allocated, filled, and copied to where it belongs while
Python's lock is held. Where the length is known from the start, no coding lies between the socket and the body,
and the file object below urllib3 reads into any buffer; it gives first what came together with the headers. All
other bodies (in chunks, or as long as the connection) come through urllib3.
"""

from __future__ import annotations

import http.client
import select

import urllib3
from urllib3.response import HTTPResponse

# Through urllib3: what a fast link has ready at once, so that a piece costs little and comes soon.
PIECE_BYTES = 1 << 20


class Body:
    """The body of `answer`, of which nothing has been read. In one thread; errors are urllib3's and OSErrors."""

    def __init__(self, answer: urllib3.BaseHTTPResponse) -> None:
        self._answer = answer
        self._below = _below(answer)
        self._poll: select.poll | None = None

    @property
    def is_direct(self) -> bool:
        """Whether its bytes come into the buffer without a detour."""
        return self._below is not None

    def read_into(self, room: memoryview) -> int:
        """How many bytes of `room` are filled now: as many as one read of the socket gives, at least one; 0 at the
        body's end, and where the connection ended before it."""
        if self._below is None:
            piece = self._answer.read1(min(len(room), PIECE_BYTES))
            room[: len(piece)] = piece
            return len(piece)
        answer, below = self._below
        assert below.length is not None
        assert answer.length_remaining is not None
        # One read of the socket. http.client's own `readinto` returns when all of `room` is full.
        n: int = below.fp.readinto1(room[: below.length]) if below.length else 0
        below.length -= n
        answer.length_remaining -= n
        return n

    def is_at_end(self) -> bool:
        """Whether there is no more, after all that was expected. Gives the connection back if so."""
        return not self._answer.read1(1)

    def has_more_within(self, seconds: float) -> bool:
        """Whether more can be read so soon. Not to be asked at the body's end: it has no socket any more."""
        if self._poll is None:
            self._poll = (
                select.poll()
            )  # Not select(2), which takes no file beyond the 1024th: segments are open, too.
            self._poll.register(self._answer.fileno(), select.POLLIN)
        return bool(self._poll.poll(seconds * 1000))


def _below(answer: urllib3.BaseHTTPResponse) -> tuple[HTTPResponse, http.client.HTTPResponse] | None:
    """urllib3's answer, and http.client's which it reads from, where both say how long the body is and agree."""
    below = getattr(answer, "_fp", None)
    if not isinstance(answer, HTTPResponse) or not isinstance(below, http.client.HTTPResponse):
        return None
    framed = not below.chunked and below.length is not None and below.length == answer.length_remaining
    return (answer, below) if framed and hasattr(below.fp, "readinto1") else None
