"""Loggers that say which image a line is about, and that count failures which repeat. Rule: nothing here decides
where lines go, or what they look like: that is oslo.log's configuration.

    log = logs.get(__name__)
    log.info("is here whole now", image=image)             → ... [image 21dc...] is here whole now

The image is the resource of the record, in the place that oslo.log's formats have for it, those of tracebacks
included; in JSON it is `extra.image`. Only the standard library is used: commands without a daemon log, too.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

EVERY_S: Final = 60.0
# More kinds than this at once are counted together.
KINDS_MAX: Final = 1000

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class Log(_Adapter):
    """A logger whose every method also takes `image=`, the id of the image that the line is about."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        image = kwargs.pop("image", None)
        if image is not None:
            # `instance` is where oslo.log's own formats put what a line is about; `resource` is what other
            # formats may name. The keys are listed as its JSON formatter wants them.
            prefix = f"[image {image}] "
            kwargs["extra"] = {
                **(kwargs.get("extra") or {}),
                "image": str(image), "instance": prefix, "resource": prefix, "extra_keys": ["image", "resource"],
            }  # fmt: skip
        return msg, kwargs


def get(name: str) -> Log:
    """The logger of a module."""
    return Log(logging.getLogger(name), {})


# ── What repeats ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Kind:
    """One failure that was said: until when it is counted, how often it came since, and its last text."""

    until_s: float
    level: int
    text: str
    image: str | None
    times: int = 0


# Runs something after so many seconds.
Later = Callable[[float, Callable[[], None]], object]


def _later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.name = "repeated-failures"
    timer.start()


class Repeats:
    """Says the first failure of a kind at once. Those that follow are counted, and every `every_s` one line says
    the last of them and how many they were, until none came. From any thread. With debug on each is a line too."""

    def __init__(
        self,
        log: Log,
        every_s: float = EVERY_S,
        *,
        clock: Callable[[], float] = time.monotonic,
        later: Later = _later,
    ) -> None:
        self._log, self._every_s, self._clock, self._later = log, every_s, clock, later
        self._kinds: dict[tuple[object, str | None], _Kind] = {}
        self._lock = threading.Lock()
        self._timer_runs = False
        _ALL.add(self)

    def warning(self, kind: object, msg: str, *args: object, image: str | None = None) -> None:
        self.log(logging.WARNING, kind, msg, *args, image=image)

    def error(self, kind: object, msg: str, *args: object, image: str | None = None) -> None:
        self.log(logging.ERROR, kind, msg, *args, image=image)

    def log(self, level: int, kind: object, msg: str, *args: object, image: str | None = None) -> None:
        """`kind` is what makes two failures of one image (or of none) the same."""
        if not self._log.isEnabledFor(level):
            return
        text = msg % args if args else msg  # Not kept as they are: an error holds all that its traceback names.
        if image is not None:  # It stands in front of the line: what an error says of itself names it once more.
            text = text.removeprefix(f"image {image} ").replace(f"image {image}: ", "", 1)
        now_s = self._clock()
        with self._lock:
            key = self._key(kind, image, now_s)
            known = self._kinds.get(key)
            if known is None:
                self._kinds[key] = _Kind(now_s + self._every_s, level, text, image)
            else:
                known.times, known.level, known.text, known.image = known.times + 1, level, text, image
                self._see_to_timer(now_s)
        self._log.log(level if known is None else logging.DEBUG, "%s", text, image=image)

    def _key(self, kind: object, image: str | None, now_s: float) -> tuple[object, str | None]:
        key = kind, image
        known = self._kinds.get(key)
        if known is not None and not known.times and known.until_s <= now_s:
            del self._kinds[key]  # It is over since long: the next one is news.
        if key not in self._kinds and len(self._kinds) >= KINDS_MAX:
            for old in [k for k, v in self._kinds.items() if not v.times and v.until_s <= now_s]:
                del self._kinds[old]
            if len(self._kinds) >= KINDS_MAX:
                return None, None
        return key

    def _see_to_timer(self, now_s: float) -> None:
        due_s = min((kind.until_s for kind in self._kinds.values() if kind.times), default=None)
        if due_s is not None and not self._timer_runs:
            self._timer_runs = True
            self._later(max(due_s - now_s, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        with self._lock:
            self._timer_runs = False
        self.say(self._clock())

    def say(self, now_s: float = float("inf")) -> None:
        """Says what was counted and is due by `now_s`; by default everything."""
        due: list[_Kind] = []
        with self._lock:
            for key, kind in list(self._kinds.items()):
                if kind.until_s > now_s:
                    continue
                if not kind.times:
                    del self._kinds[key]
                    continue
                due.append(_Kind(kind.until_s, kind.level, kind.text, kind.image, kind.times))
                kind.times, kind.until_s = 0, self._clock() + self._every_s
            if now_s != float("inf"):
                self._see_to_timer(now_s)
        for kind in due:
            times = "once more" if kind.times == 1 else f"{kind.times} more times"
            self._log.log(kind.level, "%s (%s in %.0f s)", kind.text, times, self._every_s, image=kind.image)


_ALL: weakref.WeakSet[Repeats] = weakref.WeakSet()


def say_what_was_counted() -> None:
    """Before the end: what was counted and not said yet."""
    for repeats in list(_ALL):
        repeats.say()
