"""Whether Glance can be reached, and since when not. Rule: it asks in the background only: no start and no guest
waits for it.

At the start Glance is asked the least that only a Glance with a good token answers, so that a wrong address or a
wrong password is known before the first instance meets it. Afterwards others ask. When the last question came to
nothing, Glance is asked again and again until one is answered: what is said of it is never older than that. While
nobody may be asked (`endpoints`) nothing is sent.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.errors import OriginError
from cachefs.words import duration

log = logs.get(__name__)

# Between two questions while none is answered: it doubles, and is jittered, so that a thousand nodes do not ask at
# once.
AGAIN_FIRST_S, AGAIN_S = 1.0, 10.0
# A Glance that is well answers sooner.
PATIENCE_S = 5.0
LOOK = "`cachefs doctor` tries each step ([glance] in the configuration, the network, the account)"


class Origin(Protocol):
    """What is asked of the endpoints."""

    reached_s: float | None
    trouble: str | None

    @property
    def may_ask(self) -> bool: ...


class Catalog(Protocol):
    """What is asked of the catalog."""

    last_error: str | None

    @property
    def listing_age_s(self) -> float | None: ...

    def __len__(self) -> int: ...


class Contact:
    """`greet` puts the small question, `list_anew` has the catalog put its own; both raise OriginError. `chance`
    gives numbers from 0 to 1."""

    def __init__(
        self,
        origin: Origin,
        catalog: Catalog,
        greet: Callable[[], Awaitable[None]],
        list_anew: Callable[[], Awaitable[None]],
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._origin, self._catalog, self._greet, self._list_anew = origin, catalog, greet, list_anew
        self._chance = chance
        self._refusal: str | None = None  # Somebody answered, and not what was asked for.
        self._began_s = 0.0
        self._wake = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self._began_s = trio.current_time()
        task_status.started()
        await self._put()
        pause_s = AGAIN_FIRST_S
        while True:
            self._wake = trio.Event()
            with trio.move_on_after(pause_s * (0.5 + 0.5 * self._chance())):
                await self._wake.wait()
            if self.trouble is None and self.is_reached:
                pause_s = AGAIN_FIRST_S
            elif self._origin.may_ask:
                pause_s = min(2 * pause_s, AGAIN_S)
                await self._put()

    async def _put(self) -> None:
        was_reached, knew = self.is_reached, self.trouble
        try:
            await (self._greet if self._catalog.last_error is None else self._list_anew)()
            self._refusal = None
        except OriginError as error:
            self._refusal = None if self._origin.trouble is not None else str(error)
            level = logging.WARNING if knew is None else logging.DEBUG
            log.log(level, "Glance does not answer: %s", self.trouble)
        except Exception:  # A bug in a question is no reason to take the mount down.
            log.exception("unexpected failure of asking Glance")
        else:
            if not was_reached:
                log.info("Glance answers")

    def origin_is_well(self) -> None:
        """Somebody may be asked again."""
        self._wake.set()

    # ── what is to be known ──

    @property
    def is_reached(self) -> bool:
        """Whether Glance has answered since the start."""
        return self._origin.reached_s is not None

    @property
    def trouble(self) -> str | None:
        """Why the last question came to nothing; None where it was answered, or is under way."""
        return self._origin.trouble or self._refusal or self._catalog.last_error

    @property
    def is_useless(self) -> bool:
        """Whether no instance could be given a disk: nothing was known before, and Glance has not said what there
        is."""
        return not self.is_reached and not len(self._catalog)

    def reason(self) -> str | None:
        """What an operator is to know of it, and to do; None where all is well."""
        trouble = self.trouble
        if not self.is_reached:
            since_s = trio.current_time() - self._began_s
            if trouble is not None:
                return f"Glance was never reached since the start, {duration(since_s)} ago: {trouble}; {LOOK}"
            if since_s >= PATIENCE_S or self.is_useless:
                return f"Glance has not answered yet, asked {duration(since_s)} ago; {LOOK}"
            return None
        if not self._origin.may_ask:
            return "Glance cannot be asked: what is cached is served" + (f" ({trouble})" if trouble else "")
        if trouble is not None:
            return f"the last question to Glance was not answered, and is put again: {trouble}"
        return None

    @property
    def listed(self) -> float | None:
        """When Glance last said all that there is, in seconds since the epoch; None: not since the start."""
        age_s = self._catalog.listing_age_s
        return None if age_s is None else round(time.time() - age_s, 3)

    def status(self) -> dict[str, Any]:
        """For `cachefs images`."""
        return {
            "reached": self.is_reached, "trouble": self.trouble, "reason": self.reason(), "listed": self.listed,
        }  # fmt: skip
