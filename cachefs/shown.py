"""How answers look: tables and progress on a terminal, plain lines in a pipe. Rule: what is shown is never asked
for here; colour and movement are for terminals only, and never with NO_COLOR.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TextIO

from cachefs.words import cut, duration, padded, rate, size, width

# Of everything that --json prints: it changes when a field goes or changes its meaning, not when one comes.
JSON_FORMAT: Final = 1

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
STATE_COLOURS: Final = {
    "verified": GREEN, "complete": GREEN, "partial": CYAN, "refused": RED, "condemned": RED, "gone": YELLOW,
    "ok": GREEN, "warning": YELLOW, "problem": RED, "healthy": GREEN, "ready": GREEN, "degraded": YELLOW,
    "unready": RED, "pinned": CYAN, "at risk": RED,
}  # fmt: skip

COLUMNS_MIN: Final = 20
NAME_MIN: Final = 8
BAR_MAX: Final = 30
# Nothing came for so long: that is no slow link any more.
STALL_S: Final = 5.0
PACE_S: Final = 10.0


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at it, on something that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def has_colours(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def coloured(text: str, code: str | None, stream: TextIO) -> str:
    return f"\033[{code}m{text}\033[0m" if code and has_colours(stream) else text


def columns_of(stream: TextIO) -> int:
    """Of a terminal; 80 where it does not say."""
    try:
        return max(os.get_terminal_size(stream.fileno()).columns or 80, COLUMNS_MIN)
    except (OSError, ValueError):
        return 80


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────


def as_json(value: Any, name: str = "") -> str:
    """An object with its format; a list is in it as `name`."""
    fields: Mapping[str, Any] = value if isinstance(value, Mapping) else {name: value}
    return json.dumps({"json_format": JSON_FORMAT, **fields}, indent=2, sort_keys=True)


def print_json(value: Any, name: str = "") -> None:
    print(as_json(value, name))


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """`right`: the columns of numbers. On a terminal the widest column gives way where a line would not fit."""
    for line in table(header, rows, right, columns_of(sys.stdout) if is_terminal(sys.stdout) else None):
        print(line)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), columns: int | None = None
) -> list[str]:
    """Lines; for a terminal of `columns` also with colours."""
    widths = [max(width(row[at]) for row in [header, *rows]) for at in range(len(header))]
    if columns is not None:
        _narrow(widths, columns)
        while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > columns:
            widths.pop()  # A line that is cut on the right is read; one that goes on in the next is not.
        widths[0] = min(widths[0], columns)
    lines = []
    for number, row in enumerate([header, *rows]):
        cells = [
            padded(cell if columns is None else cut(cell, room), room, right=header[at] in right)
            for at, (cell, room) in enumerate(zip(row, widths, strict=False))
        ]
        cells[-1] = cells[-1].rstrip()
        if columns is not None:
            codes = [BOLD if number == 0 else STATE_COLOURS.get(cell.strip()) for cell in cells]
            cells = [coloured(cell, code, sys.stdout) for cell, code in zip(cells, codes, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _narrow(widths: list[int], columns: int) -> None:
    """The widest column but the first, which is what one copies, gives way."""
    for _ in range(len(widths)):
        over = sum(widths) + 2 * (len(widths) - 1) - columns
        if over <= 0 or len(widths) < 2:
            return
        at = max(range(1, len(widths)), key=widths.__getitem__)
        if widths[at] <= NAME_MIN:
            return
        widths[at] = max(widths[at] - over, NAME_MIN)


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line; a name that comes again is said once."""
    longest = max((width(name) for name, _ in rows), default=0) + 1
    before = None
    for name, value in rows:
        head = padded(f"{name}:" if name != before else "", longest)
        code = STATE_COLOURS.get(value)
        print(f"{coloured(head, DIM, sys.stdout)} {coloured(value, code, sys.stdout)}".rstrip())
        before = name


# ── Progress ──────────────────────────────────────────────────────────────────────────────────────────


class Pace:
    """How fast something comes, over the last seconds; `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._moved_s = clock()

    def note(self, done: int) -> None:
        """How many bytes are there now."""
        now_s = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # It begins anew: what was before says nothing.
        if not self._seen or done > self._seen[-1][1]:
            self._moved_s = now_s
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - PACE_S:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Bytes per second; 0 while nothing is known."""
        if len(self._seen) < 2:
            return 0.0
        (began_s, first), (now_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now_s - began_s) if now_s > began_s else 0.0

    @property
    def stalled_s(self) -> float:
        """Since when nothing came, if that is a stall; else 0."""
        waited_s = self._clock() - self._moved_s
        return waited_s if waited_s >= STALL_S else 0.0

    def words(self, left: int | None, why: str = "") -> str:
        """Rate and time left of `left` bytes; or since when nothing comes, and why."""
        if self.stalled_s:
            return f"stalled for {duration(self.stalled_s)}" + (f": {why}" if why else "")
        if not self.rate:
            return "…"
        return rate(self.rate) + ("" if left is None else f", {duration(left / self.rate)} left")


class Progress:
    """One line that moves, on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.shows = is_terminal(self._stream) and not quiet
        self._drawn = False

    def show(self, share: float | None, words: str, *, stalled: bool = False) -> None:
        """`share` of 1 that is done; None where nobody knows."""
        if not self.shows:
            return
        columns = columns_of(self._stream) - 1
        bar = ""
        if share is not None:
            room = min(columns - width(words) - 12, BAR_MAX)
            if room >= 5:
                full = int(room * share)
                bar = f"[{'#' * full}{'.' * (room - full)}] "
            bar += f"{int(share * 1000) / 10:5.1f}%  "
        line = cut(bar + words, columns)
        self._stream.write("\r\033[K" + coloured(line, YELLOW if stalled else None, self._stream))
        self._stream.flush()
        self._drawn = True

    def end(self) -> None:
        """Takes the line away."""
        if self._drawn:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._drawn = False


def of_total(done: int, total: int) -> str:
    return f"{size(done)} of {size(total)}"
