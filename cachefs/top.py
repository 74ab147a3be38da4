"""`cachefs top`: what moves, again and again. Rule: whatever ends it, the terminal is as it was before; no key
waits for a daemon that does not answer.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from cachefs.answers import at_once, distinct, without
from cachefs.errors import CachefsError
from cachefs.shown import BOLD, DIM, RED, YELLOW, coloured, columns_of, is_terminal, table
from cachefs.words import counted, cut, duration, printable, rate, size, width, wrapped

if TYPE_CHECKING:
    from cachefs.trace_cli import Ask

# On less, what says the same of each image goes.
WIDE = 110
# On a screen of less lines none goes on in the next.
TALL = 20
# Of images that guests wait for, in the head.
WAITED_FOR = 3
# Longer than a daemon that is well ever takes.
ANSWER_S = 5.0

_ENTER = b"\033[?1049h\033[?25l"  # The other screen, without a cursor.
_LEAVE = b"\033[?25h\033[?1049l"
_INDENT = " " * 9  # Of what goes on from the line before.
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"


@dataclass(frozen=True)
class Look:
    """What was answered at one moment, by a clock of seconds; or what went wrong."""

    at_s: float
    status: Mapping[str, Any] | None = None
    moving: Mapping[str, Any] | None = None
    error: str | None = None


def look(ask: Ask) -> Look:
    """Asks once."""
    try:
        return Look(time.monotonic(), ask("status", wait_s=ANSWER_S), ask("flights", wait_s=ANSWER_S))
    except CachefsError as error:
        return Look(time.monotonic(), error=str(error))


def run(ask: Ask, interval_s: float) -> None:
    """Until q or Ctrl-C; one frame where nobody looks. Raises ControlError when that one cannot be had."""
    if not (is_terminal(sys.stdout) and sys.stdin.isatty()):
        first = Look(time.monotonic(), ask("status", wait_s=ANSWER_S), ask("flights", wait_s=ANSWER_S))
        print("\n".join(frame(first, None, None, None)))
        return
    with _screen(sys.stdin.fileno(), sys.stdout.fileno()):
        _watch(ask, interval_s)


def _watch(ask: Ask, interval_s: float) -> None:
    looks: queue.SimpleQueue[Look] = queue.SimpleQueue()
    ours, theirs = os.pipe()
    go_on = threading.Event()

    def look_again() -> None:
        while True:
            looks.put(look(ask))
            os.write(theirs, b".")
            if go_on.wait(interval_s):
                return

    threading.Thread(target=look_again, daemon=True, name="look").start()
    before: Look | None = None
    now = Look(time.monotonic(), error="asking the daemon …")
    try:
        while True:
            _draw(now, before)
            ready, _, _ = select.select([sys.stdin.fileno(), ours], [], [])
            if sys.stdin.fileno() in ready:
                keys = os.read(sys.stdin.fileno(), 64)
                if not keys or b"q" in keys.lower() or b"\x03" in keys:
                    return
            if ours in ready:
                os.read(ours, 64)
                while not looks.empty():
                    if now.status is not None:
                        before = now
                    now = looks.get()
    except (KeyboardInterrupt, OSError):  # The latter: the terminal itself has gone.
        return
    finally:
        go_on.set()


def _draw(now: Look, before: Look | None) -> None:
    columns = columns_of(sys.stdout)
    try:
        height = os.get_terminal_size(sys.stdout.fileno()).lines or 24
    except OSError:
        height = 24
    lines = frame(now, before, columns, height)
    body = "".join(f"{line}{_CLEAR_LINE}\r\n" for line in lines[: height - 1])
    data = (_HOME + body + _CLEAR_BELOW).encode(errors="replace")
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


@contextmanager
def _screen(keys: int, screen: int) -> Iterator[None]:
    """The other screen, keys as they are pressed; as it was before at the end, and while it is stopped."""
    kept = termios.tcgetattr(keys)

    def enter() -> None:
        tty.setcbreak(keys, termios.TCSANOW)
        os.write(screen, _ENTER)

    def leave() -> None:
        os.write(screen, _LEAVE)
        termios.tcsetattr(keys, termios.TCSANOW, kept)

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def stop(number: int, frame: FrameType | None) -> None:
        leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, stop)
        enter()

    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGTSTP: stop}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        enter()
        yield
    finally:
        try:
            leave()
        except OSError:
            pass  # The terminal itself has gone.
        for number, handler in before.items():
            signal.signal(number, handler)


# ── One frame ─────────────────────────────────────────────────────────────────────────────────────────


def frame(now: Look, before: Look | None, columns: int | None, height: int | None) -> list[str]:
    """Lines. `columns` None: for a pipe, as long as they are."""
    if now.status is None or now.moving is None:
        said = [f"cachefs: {printable(now.error or '')}", "q ends this"]
        last = frame(before, None, columns, height) if before is not None else []
        return [_marked(cut(line, columns or 1000), RED, columns) for line in said[:1]] + said[1:] + last
    first, *lines = _head(now, before)
    is_tall = height is None or height >= TALL

    def fitted(line: str) -> list[str]:
        if columns is None:
            return [line]
        return wrapped(line, columns, _INDENT) if is_tall else [cut(line, columns)]

    shown = [_marked(first if columns is None else cut(first, columns), BOLD, columns)]
    shown += [part for line in lines for part in fitted(line)]
    shown += [_marked(part, YELLOW, columns) for line in _doubts(now) for part in fitted(line)]
    left = None if height is None else max(height - len(shown) - 5, 2)
    if columns is not None:
        shown[0] += _marked("   q ends this", DIM, columns) if width(first) + 14 <= columns else ""
    for part in (_flights(now, columns, left and left // 2), _images(now, columns, left and left - left // 2)):
        shown += ["", *part]
    return shown


def _marked(line: str, code: str, columns: int | None) -> str:
    return line if columns is None else coloured(line, code, sys.stdout)


def _head(now: Look, before: Look | None) -> list[str]:
    status = now.status
    assert status is not None
    reads, store, fetcher = status["reads"], status["store"], status["fetcher"]
    hydration, evictor = status["hydration"], status["evictor"]
    words = [
        f"cachefs {status['version']}: {status['ready']['state']}, up {duration(status['uptime'])}, "
        f"on {status['mountpoint']}"
    ]
    longest = f", the longest {reads['waiting_longest']:.1f} s" if reads["waiting"] else ""
    waiting, opened = counted(reads["waiting"], "read"), counted(status["images"]["open"], "image")
    words.append(f"guests   {waiting} waiting{longest}; {opened} open")
    words += _waited_for(now)
    per_s = _per_s(now, before)
    ways = reads["by_outcome"]
    asked = sum(ways.values())
    recent = "" if per_s is None else f"; now {per_s.reads:.0f}/s"
    recent += f", {_share(per_s.at_once, per_s.reads)} at once" if per_s is not None and per_s.reads else ""
    words.append(
        f"reads    {asked}: {_share(at_once(ways), asked)} at once, {_share(ways['disk'], asked)} from disk, "
        f"{_share(ways['miss'], asked)} from Glance{recent}"
    )
    speed = rate(per_s.fetched) if per_s is not None else size(fetcher["bytes_fetched"]) + " in all"
    kinds = ", ".join(f"{n} {kind}" for kind, n in fetcher["flights_by_priority"].items() if n) or "none"
    failures = counted(fetcher["failures"], "failure")
    words.append(f"Glance   {speed}; flights: {kinds}; {fetcher['queued']} queued; {failures}")
    used = f"{size(store['bytes_on_disk'])} of {size(store['bytes_limit'])}"
    words.append(f"store    {size(store['bytes_cached'])} of images in {used}; {evictor['pinned_images']} pinned")
    if hydration["images"]:
        words.append(
            f"whole    {counted(hydration['images'], 'image')} to come, {size(hydration['bytes_to_fetch'])} left"
        )
    return words


def _waited_for(now: Look) -> list[str]:
    """The images that guests wait for, by name."""
    assert now.moving is not None
    found = now.moving.get("waiting")  # None of a daemon that was not restarted since this command was installed.
    if not found:
        return []
    some = [
        f"{printable(one['name'] or 'an image without a name')} ({one['image'][:8]}): "
        f"{counted(one['reads'], 'read')}, {one['longest']:.1f} s"
        for one in found[:WAITED_FOR]
    ]
    more = f"; and {len(found) - WAITED_FOR} more" if len(found) > WAITED_FOR else ""
    return [f"for      {'; '.join(some)}{more}"]


@dataclass(frozen=True)
class _PerSecond:
    reads: float
    at_once: float
    fetched: float


def _per_s(now: Look, before: Look | None) -> _PerSecond | None:
    if before is None or before.status is None or now.status is None or now.at_s <= before.at_s:
        return None
    then, seconds = before.status, now.at_s - before.at_s
    if then["pid"] != now.status["pid"]:
        return None  # Another daemon: it counts anew.
    ways, ways_then = now.status["reads"]["by_outcome"], then["reads"]["by_outcome"]
    reads = sum(ways.values()) - sum(ways_then.values())
    soon = at_once(ways) - at_once(ways_then)
    fetched = now.status["fetcher"]["bytes_fetched"] - then["fetcher"]["bytes_fetched"]
    return _PerSecond(reads / seconds, soon / seconds, fetched / seconds)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "no"


def _doubts(now: Look) -> list[str]:
    assert now.status is not None
    return [f"! {printable(reason)}" for reason in now.status["ready"]["reasons"]]


def _flights(now: Look, columns: int | None, most: int | None) -> list[str]:
    assert now.moving is not None
    names = {row["id"]: row["name"] for row in now.moving["images"]}
    flights = now.moving["flights"]
    length = distinct([flight["image"] for flight in flights])
    rows = [
        (
            flight["image"] if columns is None else flight["image"][:length],
            printable(names.get(flight["image"]) or ""),
            flight["priority"],
            size(flight["start"]), size(flight["arrived"]), size(flight["length"]), str(flight["readers"]),
        )
        for flight in flights[:most]
    ]  # fmt: skip
    header = ("FLIGHT", "NAME", "FOR", "FROM", "ARRIVED", "OF", "READERS")
    return table(header, rows, ("FROM", "ARRIVED", "OF", "READERS"), columns, ("FROM", "FOR", "READERS"))


def _images(now: Look, columns: int | None, most: int | None) -> list[str]:
    assert now.moving is not None
    length = distinct([row["id"] for row in now.moving["images"]])
    shown = now.moving["images"][:most]
    rows: list[Sequence[str]] = [
        (
            row["id"] if columns is None else row["id"][:length], printable(row["name"] or ""),
            size(row["size"]), f"{row['cached'] / row['size']:.0%}" if row["size"] else "",
            str(row["handles"]), str(row["waiting"]), row["priority"],
            "at risk" if row["at_risk"] else row["state"],
        )
        for row in shown
    ]  # fmt: skip
    header: Sequence[str] = ("IMAGE", "NAME", "SIZE", "HERE", "OPEN", "WAITING", "PRIORITY", "STATE")
    if columns is not None and columns < WIDE and all(row["priority"] == "normal" for row in shown):
        header, rows = without(header, 6), [without(row, 6) for row in rows]
    return table(header, rows, ("SIZE", "HERE", "OPEN", "WAITING"), columns, ("SIZE", "OPEN", "PRIORITY", "HERE"))
