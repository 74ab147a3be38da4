"""Which endpoint is asked next, how many requests at once, and who is to blame when one fails: the endpoint, the
identity service, or the image. Rule: one image's trouble never keeps others from being asked for, nor does that of
a token.

The first endpoint whose circuit is closed is asked, and the next ones at once when it fails. So load goes back to
the first endpoint by itself as soon as a probe of it was answered. Where nobody may be asked, who asks is told so
at once (OriginAway), and may wait for `until_well`. When load comes to an endpoint anew it comes gradually:
`on_width` says how many requests at once there may be. Probes are sent by `run`, so no guest waits for one.

What is wrong is said once when it begins and once when it is over, with the number of failures between.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

import trio

from cachefs import logs
from cachefs.errors import (
    LISTING,
    BytesMissing,
    IdentityUnavailable,
    ImageGone,
    NotReached,
    OriginAway,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginThrottled,
    OriginUnauthorized,
    OriginUnavailable,
    RangeRefused,
    TokenRefused,
)
from cachefs.sources.circuit import Circuit, Width
from cachefs.words import counted

log = logs.get(__name__)

T = TypeVar("T")

# When a node's whole load comes to another endpoint, all but one request wait for up to this.
MOVE_HOLD_S = 1.0
# Refused credentials are seldom right a moment later, and many tries can lock an account.
REFUSED_PAUSE_S = 30.0
TROUBLES_MAX = 100


class Blame(Enum):
    """Whose failure it is. NOBODY: it was asked, and answered."""

    NOBODY = auto()
    ENDPOINT = auto()
    IDENTITY = auto()
    IMAGE = auto()
    LOAD = auto()


def blame(error: OriginError) -> Blame:
    match error:
        case OriginUnauthorized() | IdentityUnavailable():
            return Blame.IDENTITY
        case ImageGone() | RangeRefused():
            return Blame.NOBODY
        case OriginThrottled():
            return Blame.LOAD
        case OriginUnavailable() if not isinstance(error, BytesMissing):
            return Blame.ENDPOINT
        case _:
            return Blame.IMAGE


@dataclass(eq=False)
class Endpoint:
    """`url` None: what Keystone's catalog says."""

    url: str | None
    name: str
    circuit: Circuit
    checking: bool = False  # A probe is under way.
    suspicion: tuple[str, OriginError] | None = None  # Of what all failures in a row were.


@dataclass
class Trouble:
    """What is wrong with one image, as far as it is not the origin."""

    error: str
    since_s: float
    failures: int = 1


@dataclass
class Progress:
    """What one question has brought so far. Who puts it calls `answered` when that is enough to call it a success,
    before its end."""

    answered: Callable[[], None] = field(default=lambda: None)
    begun: bool = False  # Something of it was handed on, so it cannot be put anew.
    told: bool = False


class Endpoints:
    """See the module. `probe` asks an endpoint something small, `renew` the identity service for a token; both
    raise OriginError. `connections` bounds `on_width`. Everything is on the loop; `clock` gives seconds."""

    def __init__(
        self,
        urls: tuple[str | None, ...],
        connections: int,
        probe: Callable[[str | None], Awaitable[None]],
        renew: Callable[[], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._probe, self._renew, self._clock, self._chance = probe, renew, clock, chance
        self._endpoints = [Endpoint(url, f"endpoint {url or 'of the catalog'}", Circuit(chance)) for url in urls]
        self._identity = Endpoint(None, "identity", Circuit(chance))
        self._refused = False  # The identity service does not take our credentials.
        self._width = Width(connections)
        self._in_use: Endpoint | None = self._endpoints[0]
        self._changed = trio.Event()
        self._troubles: OrderedDict[str, Trouble] = OrderedDict()
        self.reached_s: float | None = None  # When somebody last answered something real, by the clock.
        self.trouble: str | None = None  # Why the last question came to nothing, until one is answered.
        self.on_width: Callable[[int], None] = lambda width: None
        self.on_well: Callable[[], None] = lambda: None  # Somebody may be asked again, after nobody might.

    # ── asking ──

    @property
    def may_ask(self) -> bool:
        return self._identity.circuit.may_ask and any(e.circuit.may_ask for e in self._endpoints)

    async def until_well(self) -> None:
        """Returns when somebody may be asked."""
        while not self.may_ask:
            await self._changed.wait()

    async def ask(
        self, subject: str, work: Callable[[str | None], Awaitable[T]], progress: Progress | None = None
    ) -> T:
        """What `work` comes to with the first endpoint that serves. Raises OriginError: OriginAway, at once, where
        nobody may be asked."""
        progress = Progress() if progress is None else progress
        failure: OriginError | None = None
        for endpoint in self._endpoints:
            if not endpoint.circuit.may_ask:
                continue
            self._refuse_without_identity(subject)
            tickets = endpoint.circuit.ticket, self._identity.circuit.ticket
            progress.answered = partial(self._answered, endpoint, tickets, subject, progress)
            try:
                result = await work(endpoint.url)
            except OriginError as error:
                self._failed(endpoint, tickets, subject, error)
                others_may_serve = isinstance(error, OriginUnavailable) and blame(error) is not Blame.IDENTITY
                if progress.begun or not others_may_serve:
                    raise
                log.debug("%s: %s", endpoint.name, error)
                failure = error
            else:
                self._answered(endpoint, tickets, subject, progress)
                return result
        if failure is None:
            circuit = self._endpoints[0].circuit
            failure = OriginAway(
                subject,
                f"no endpoint is asked now, after {counted(circuit.failures, 'failure')}: {circuit.last_error}",
            )
        raise failure

    def _refuse_without_identity(self, subject: str) -> None:
        circuit = self._identity.circuit
        if not circuit.may_ask:
            kind = OriginUnauthorized if self._refused else OriginAway
            raise kind(
                subject,
                f"no token is asked for now, after {counted(circuit.failures, 'failure')}: {circuit.last_error}",
            )

    # ── what it came to ──

    def _answered(self, endpoint: Endpoint, tickets: tuple[int, int], subject: str, progress: Progress) -> None:
        if progress.told:
            return
        progress.told = True
        endpoint.circuit.succeeded(tickets[0])
        self._identity_is_well(tickets[1])
        self._reached()
        trouble = self._troubles.pop(subject, None)
        if trouble is not None:
            failures = counted(trouble.failures, "failure")
            log.info("can be had again, after %s", failures, image=_image(subject))
        if self._width.answered(self._clock()):
            self.on_width(self._width.now)

    def _failed(self, endpoint: Endpoint, tickets: tuple[int, int], subject: str, error: OriginError) -> None:
        match blame(error):
            case Blame.ENDPOINT:
                self.trouble = _plainly(error)
                self._endpoint_failed(endpoint, tickets[0], subject, error)
            case Blame.IDENTITY:
                self.trouble = _plainly(error)
                if isinstance(error, TokenRefused):
                    endpoint.circuit.succeeded(tickets[0])
                self._identity_failed(tickets[1], error)
            case Blame.LOAD:
                pass
            case found:
                if not isinstance(error, OriginLied):  # It may be anybody's lie.
                    endpoint.circuit.succeeded(tickets[0])
                self._identity_is_well(tickets[1])
                if not isinstance(error, OriginLied):
                    self._reached()
                if found is Blame.IMAGE:
                    self._note_trouble(subject, error)
                elif isinstance(error, ImageGone):
                    self._troubles.pop(subject, None)  # It cannot be had for good, and that is said elsewhere.

    def _reached(self) -> None:
        self.reached_s, self.trouble = self._clock(), None

    def _endpoint_failed(self, endpoint: Endpoint, ticket: int, subject: str, error: OriginError) -> None:
        about = None if isinstance(error, NotReached) else subject
        pause_s = error.retry_after if isinstance(error, OriginBusy) else 0.0
        if endpoint.circuit.failed(ticket, self._clock(), _said(error), about, pause_s):
            self._opened(endpoint)
        elif endpoint.circuit.suspected:
            endpoint.suspicion = subject, error
            self._wake()

    def _opened(self, endpoint: Endpoint) -> None:
        circuit = endpoint.circuit
        pause_s = circuit.probe_at_s - self._clock()
        log.warning(
            "%s: left alone after %s, to be asked again in %.1f s: %s",
            endpoint.name, counted(circuit.failures, "failure"), pause_s, circuit.last_error,
        )  # fmt: skip
        self._look_who_serves()

    def _identity_failed(self, ticket: int, error: OriginError) -> None:
        circuit = self._identity.circuit
        self._refused = isinstance(error, OriginUnauthorized)
        if circuit.may_ask and not circuit.failures:
            log.warning("identity: no token that is good: %s", _said(error))
        if circuit.failed(ticket, self._clock(), _said(error), None, REFUSED_PAUSE_S if self._refused else 0.0):
            self._wake()

    def _identity_is_well(self, ticket: int) -> None:
        circuit = self._identity.circuit
        if circuit.failures and circuit.may_ask and ticket == circuit.ticket:
            log.info("identity: well again after %s", counted(circuit.failures, "failure"))
        circuit.succeeded(ticket)

    def _note_trouble(self, subject: str, error: OriginError) -> None:
        trouble = self._troubles.get(subject)
        if trouble is not None:
            trouble.error, trouble.failures = _said(error), trouble.failures + 1
            return
        log.warning("cannot be had: %s", _said(error), image=_image(subject))
        self._troubles[subject] = Trouble(_said(error), self._clock())
        while len(self._troubles) > TROUBLES_MAX:
            self._troubles.popitem(last=False)

    def _look_who_serves(self) -> None:
        """After a circuit changed: load that comes to an endpoint anew comes gradually."""
        was, self._in_use = self._in_use, next((e for e in self._endpoints if e.circuit.may_ask), None)
        if self._in_use is not None and self._in_use is not was:
            if len(self._endpoints) > 1:
                level = logging.INFO if self._in_use is self._endpoints[0] else logging.WARNING
                log.log(level, "%s serves now", self._in_use.name)
            self._begin_anew(0.0 if was is None else MOVE_HOLD_S * self._chance())
        self._wake()

    def _begin_anew(self, hold_s: float) -> None:
        self._width.begin_anew(self._clock(), hold_s)
        self.on_width(self._width.now)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ── probing ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Without it a circuit that opened stays open."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                changed = self._changed
                next_s = float("inf")
                for endpoint in (*self._endpoints, self._identity):
                    due_s = self._due_s(endpoint)
                    if due_s <= self._clock():
                        endpoint.checking = True
                        nursery.start_soon(self._check, endpoint)
                    else:
                        next_s = min(next_s, due_s)
                with trio.move_on_after(max(next_s - self._clock(), 0.0)):
                    await changed.wait()

    @staticmethod
    def _due_s(endpoint: Endpoint) -> float:
        if endpoint.checking or (endpoint.circuit.may_ask and not endpoint.circuit.suspected):
            return float("inf")
        return -float("inf") if endpoint.circuit.suspected else endpoint.circuit.probe_at_s

    async def _check(self, endpoint: Endpoint) -> None:
        try:
            await (self._check_suspected if endpoint.circuit.suspected else self._check_open)(endpoint)
        except Exception:  # A bug in a probe must not take the mount down, nor be met again at once.
            log.exception("%s: unexpected failure of a probe", endpoint.name)
            if endpoint.circuit.may_ask:
                endpoint.circuit.suspicion_was_wrong(endpoint.circuit.ticket)
            else:
                endpoint.circuit.probe_told_nothing(self._clock())
        finally:
            endpoint.checking = False
            self._wake()

    async def _check_suspected(self, endpoint: Endpoint) -> None:
        ticket, suspicion = endpoint.circuit.ticket, endpoint.suspicion
        error = await self._probed(endpoint)
        if error is None or blame(error) is not Blame.ENDPOINT:
            endpoint.circuit.suspicion_was_wrong(ticket)
            self._reached()
            if suspicion is not None:
                self._note_trouble(*suspicion)
        elif endpoint.circuit.suspicion_was_right(ticket, self._clock(), _said(error)):
            self._opened(endpoint)

    async def _check_open(self, endpoint: Endpoint) -> None:
        circuit, is_identity = endpoint.circuit, endpoint is self._identity
        if not is_identity and not self._identity.circuit.may_ask:
            circuit.probe_told_nothing(self._clock())
            return
        circuit.probe()
        were_away, failures, since_s = not self.may_ask, circuit.failures, circuit.since_s or 0.0
        error = await self._probed(endpoint)
        now_s = self._clock()
        if error is not None and blame(error) in _TELL_NOTHING:
            self.trouble = _plainly(error)
        if is_identity and error is not None:
            self._refused = isinstance(error, OriginUnauthorized)
            circuit.probe_failed(now_s, _said(error), REFUSED_PAUSE_S if self._refused else 0.0)
        elif error is None or isinstance(error, TokenRefused) or blame(error) not in _TELL_NOTHING:
            circuit.probe_succeeded()
            many = counted(failures, "failure")
            log.info("%s: well again after %.1f s and %s", endpoint.name, now_s - since_s, many)
            if is_identity:
                self._begin_anew(0.0)
            elif error is None:
                self._reached()
            self._look_who_serves()
            if were_away and self.may_ask:
                self.on_well()
        elif blame(error) is Blame.ENDPOINT:
            busy_s = error.retry_after if isinstance(error, OriginBusy) else 0.0
            circuit.probe_failed(now_s, _said(error), busy_s)
        else:
            circuit.probe_told_nothing(now_s)
        if error is not None:
            log.debug("%s: %s", endpoint.name, error)
            if not is_identity and blame(error) is Blame.IDENTITY:
                self._identity_failed(self._identity.circuit.ticket, error)

    async def _probed(self, endpoint: Endpoint) -> OriginError | None:
        try:
            await (self._renew() if endpoint is self._identity else self._probe(endpoint.url))
        except OriginError as error:
            return error
        return None

    # ── what is to be known ──

    def status(self) -> dict[str, Any]:
        """For `status`: times in seconds since 1970."""
        now_s, here_s = time.time(), self._clock()

        def described(endpoint: Endpoint) -> dict[str, Any]:
            circuit = endpoint.circuit
            since_s = circuit.since_s
            return {
                "state": circuit.state.value,
                "since": None if since_s is None else round(now_s - (here_s - since_s)),
                "failures": circuit.failures,
                "last_error": circuit.last_error,
            }

        identity = described(self._identity)
        return {
            "endpoints": [
                {"url": e.url, "in_use": e is self._in_use, **described(e)} for e in self._endpoints
            ],
            "identity": {"trouble": identity["last_error"] if identity["failures"] else None, **identity},
            "images": {
                image: {
                    "error": trouble.error,
                    "since": round(now_s - (here_s - trouble.since_s)),
                    "failures": trouble.failures,
                }
                for image, trouble in self._troubles.items()
            },
            "requests_at_once": self._width.now,
            "reached": None if self.reached_s is None else round(now_s - (here_s - self.reached_s)),
            "trouble": self.trouble,
        }  # fmt: skip


# Of a probe: they are no answer of the endpoint.
_TELL_NOTHING = (Blame.ENDPOINT, Blame.IDENTITY)


def _image(subject: str) -> str | None:
    return None if subject == LISTING else subject


def _plainly(error: OriginError) -> str:
    """For people who look for the reason, not for the line of a log."""
    match error:
        case TokenRefused():
            said = "Glance does not take the token"
        case OriginUnauthorized():
            said = "the credentials are refused"
        case IdentityUnavailable():
            said = "no token can be had"
        case OriginBusy():
            said = "Glance is busy"
        case _:
            said = ""
    return ": ".join(filter(None, (said, error.detail))) or type(error).__name__


def _said(error: OriginError) -> str:
    """Without the image that happened to be asked for."""
    said = f"{type(error).__name__}: {error.detail}" if error.detail else type(error).__name__
    return f"{said} ({error.requests})" if error.requests else said
