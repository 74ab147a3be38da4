"""Which request a failure was: an id that we give each question, and the one that the answer bears. Rule: an id is
for people who compare logs; nothing is decided by it.

OpenStack's services write the `X-OpenStack-Request-ID` of a request into their logs beside an id of their own,
which comes back in a header of the same name. What is asked again after a new token keeps its id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Final, TypeVar
from uuid import uuid4

from cachefs.errors import OriginError

HEADER: Final = "X-OpenStack-Request-ID"

T = TypeVar("T")

_ID: Final = re.compile(r"req-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Exchange:
    """One question: the id that it was `sent` with, and the one that its last answer bore."""

    def __init__(self) -> None:
        self.sent = f"req-{uuid4()}"
        self.answered: str | None = None

    def sends(self, headers: MutableMapping[str, str]) -> None:
        headers[HEADER] = self.sent

    def receives(self, headers: Mapping[str, str]) -> None:
        found = headers.get(HEADER, "")
        if _ID.fullmatch(found):  # It may be anybody's answer, and goes into the log.
            self.answered = found

    def __str__(self) -> str:
        return self.sent if self.answered is None else f"{self.sent}, answered as {self.answered}"


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current() -> Exchange | None:
    """The question that this thread is at."""
    return _current.get()


def identified(work: Callable[[], T]) -> T:
    """What `work` gives, which puts one question in this thread. An OriginError that it raises bears the ids."""
    exchange = Exchange()
    token = _current.set(exchange)
    try:
        return work()
    except OriginError as error:
        error.requests = str(exchange)
        raise
    finally:
        _current.reset(token)
