"""Whether somebody who failed may be asked again, and how many may ask at once after that. Rule: pure; time and
chance are arguments, and who is asked, and for what, is not known here.

A circuit is *closed* while its endpoint is asked as ever. After FAILURES_MAX failures in a row it *opens*: nothing
is sent there until a pause is over. Then one probe is let through (*half-open*): when it is answered the circuit
closes, else it opens again, for a pause that doubles. Pauses are jittered over half their length, so that a
thousand nodes do not probe at once. A pause begins at its first length again only when something real was
answered, and not by a probe: an endpoint that answers nothing but probes is asked seldom.

Failures that all concern one subject (an image) do not open a circuit, for it may be the subject: the circuit is
*suspected* then, and a probe decides. A failure without a subject (no connection) is the endpoint's.

What is answered late says nothing of the present: a result counts only if the state is the one in which the
question was put (`ticket`).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

FAILURES_MAX = 3
PAUSE_FIRST_S, PAUSE_MAX_S = 1.0, 15.0
PAUSE_ASKED_JITTER = 0.25


class State(StrEnum):
    """The value is the word in `status`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Circuit:
    """Of one endpoint. `chance` gives numbers from 0 to 1. All times are seconds of one clock."""

    def __init__(self, chance: Callable[[], float]) -> None:
        self._chance = chance
        self.state = State.CLOSED
        self.since_s: float | None = None  # When it opened; None while it is closed.
        self.failures = 0  # In a row.
        self.last_error: str | None = None
        self.probe_at_s = 0.0  # While it is open: when it may be probed.
        self.ticket = 0
        self._subjects: set[str | None] = set()  # Of the failures in a row: two are enough to know.
        self._pause_s = PAUSE_FIRST_S

    @property
    def may_ask(self) -> bool:
        return self.state is State.CLOSED

    @property
    def suspected(self) -> bool:
        """Whether a probe is to tell the endpoint's trouble from its one subject's."""
        return self.state is State.CLOSED and self.failures >= FAILURES_MAX

    # ── what questions came to ──

    def succeeded(self, ticket: int) -> None:
        """Something real was answered."""
        if ticket == self.ticket and self.state is State.CLOSED:
            self._forget_failures()
            self._pause_s = PAUSE_FIRST_S

    def failed(
        self, ticket: int, now_s: float, why: str, subject: str | None = None, pause_s: float = 0.0
    ) -> bool:
        """Whether that opened it. It is not probed before `pause_s`."""
        if ticket != self.ticket or self.state is not State.CLOSED:
            return False
        self.failures += 1
        self.last_error = why
        if len(self._subjects) < 2:
            self._subjects.add(subject)
        if self.failures < FAILURES_MAX or (len(self._subjects) == 1 and None not in self._subjects):
            return False
        self._open(now_s, pause_s)
        return True

    # ── probes ──

    def probe(self) -> None:
        """A probe is sent."""
        self.ticket += 1
        self.state = State.HALF_OPEN

    def probe_succeeded(self) -> None:
        """It is asked again. The pause does not become shorter by that."""
        self.ticket += 1
        self.state, self.since_s = State.CLOSED, None
        self._forget_failures()

    def probe_failed(self, now_s: float, why: str, pause_s: float = 0.0) -> None:
        self.failures += 1
        self.last_error = why
        self._open(now_s, pause_s)

    def probe_told_nothing(self, now_s: float) -> None:
        """The probe did not get as far as the endpoint: the same pause again."""
        self.ticket += 1
        self.state = State.OPEN
        self.probe_at_s = now_s + self._jittered()

    def suspicion_was_wrong(self, ticket: int) -> None:
        """The endpoint answered a probe: the failures were their subject's."""
        if ticket == self.ticket and self.state is State.CLOSED:
            self._forget_failures()

    def suspicion_was_right(self, ticket: int, now_s: float, why: str, pause_s: float = 0.0) -> bool:
        """Whether that opened it."""
        if ticket != self.ticket or self.state is not State.CLOSED:
            return False
        self.probe_failed(now_s, why, pause_s)
        return True

    # ── inside ──

    def _open(self, now_s: float, pause_s: float) -> None:
        self.ticket += 1
        self.state = State.OPEN
        self.since_s = now_s if self.since_s is None else self.since_s
        # Who is told to come back later is not to come at that very moment, with all others.
        self.probe_at_s = now_s + max(self._jittered(), pause_s * (1 + PAUSE_ASKED_JITTER * self._chance()))
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def _jittered(self) -> float:
        return self._pause_s * (0.5 + 0.5 * self._chance())

    def _forget_failures(self) -> None:
        self.failures = 0
        self._subjects.clear()


class Width:
    """How many may ask at once: `most`; after a pause or a move one, and one more with each answer, which is twice
    as many in the time of a request. The first waits for `hold_s`: nodes whose load moves at the same moment widen
    at different ones."""

    def __init__(self, most: int) -> None:
        self.now = self.most = most
        self._held_until_s = -float("inf")

    def begin_anew(self, now_s: float, hold_s: float = 0.0) -> None:
        self.now = 1
        self._held_until_s = now_s + hold_s

    def answered(self, now_s: float) -> bool:
        """Whether it is wider now."""
        if self.now == self.most or now_s < self._held_until_s:
            return False
        self.now += 1
        return True
