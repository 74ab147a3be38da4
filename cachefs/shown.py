"""How answers look: tables and progress on a terminal, plain lines in a pipe. Rule: what is shown is never asked
for here; colour and movement are for terminals only, and never with NO_COLOR.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, TextIO

from cachefs.words import cut, duration, folded, in_pieces, padded, rate, size, width

# Of everything that --json prints: it changes when a field goes or changes its meaning, not when one comes.
JSON_FORMAT: Final = 1

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
STATE_COLOURS: Final = {
    "verified": GREEN, "complete": GREEN, "partial": CYAN, "refused": RED, "condemned": RED, "gone": YELLOW,
    "ok": GREEN, "warning": YELLOW, "problem": RED, "healthy": GREEN, "ready": GREEN, "degraded": YELLOW,
    "unready": RED, "pinned": CYAN, "at risk": RED,
}  # fmt: skip

_COMMAND: Final = re.compile("`[^`]+`")
_NO_BREAK: Final = "\0"  # In no text that is printable.
COLUMNS_MIN: Final = 20
# A name that is cut: so much of it at least, and so much before columns go for it.
NAME_MIN: Final = 8
NAME_GOOD: Final = 20
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


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """`right`: the columns of numbers; `drop`: those that go first on a terminal on which a line would not fit."""
    for line in table(header, rows, right, columns_of(sys.stdout) if is_terminal(sys.stdout) else None, drop):
        print(line)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    columns: int | None = None,
    drop: Sequence[str] = (),
) -> list[str]:
    """Lines; for a terminal of `columns` also with colours. There the first column, which is what one copies, and
    numbers are never cut: columns of `drop` go, then the others are cut, then columns go from the right."""
    widths = [max(width(row[at]) for row in [header, *rows]) for at in range(len(header))]
    shown = list(range(len(header)))
    if columns is not None:
        whole = {0, *(at for at, name in enumerate(header) if name in right)}
        shown = _fitting(header, widths, whole, columns, drop)
        _narrow(widths, shown, whole, columns)
        widths[0] = min(widths[0], columns)
    lines = []
    for number, row in enumerate([header, *rows]):
        cells = [
            padded(row[at] if columns is None else cut(row[at], widths[at]), widths[at], right=header[at] in right)
            for at in shown
        ]
        cells[-1] = cells[-1].rstrip()
        if columns is not None:
            codes = [BOLD if number == 0 else STATE_COLOURS.get(cell.strip()) for cell in cells]
            cells = [coloured(cell, code, sys.stdout) for cell, code in zip(cells, codes, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _fitting(
    header: Sequence[str], widths: Sequence[int], whole: set[int], columns: int, drop: Sequence[str]
) -> list[int]:
    """Which columns are shown."""
    shown = list(range(len(header)))

    def least(cut_to: int) -> int:
        return _line(widths[at] if at in whole else min(widths[at], cut_to) for at in shown)

    for at in [header.index(name) for name in drop if name in header]:
        if least(NAME_GOOD) > columns:
            shown.remove(at)
    while len(shown) > 1 and least(NAME_MIN) > columns:
        shown.pop()  # A line that is cut on the right is read; one that goes on in the next is not.
    return shown


def _narrow(widths: list[int], shown: Sequence[int], whole: set[int], columns: int) -> None:
    """The widest of the columns that may be cut gives way, and then the next."""
    words = [at for at in shown if at not in whole]
    for _ in words:
        over = _line(widths[at] for at in shown) - columns
        at = max(words, key=widths.__getitem__)
        if over <= 0 or widths[at] <= NAME_MIN:
            return
        widths[at] = max(widths[at] - over, NAME_MIN)


def _line(widths: Iterable[int]) -> int:
    """The width of a line with these columns."""
    return sum(at + 2 for at in widths) - 2


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line; a name that comes again is said once. On a terminal values go on in the
    next line between words. A word is not taken apart, so that ids and paths can be copied; but for hashes, which
    are longer than any line."""
    columns = columns_of(sys.stdout) if is_terminal(sys.stdout) else None
    longest = max((width(name) for name, _ in rows), default=0) + 1
    for name, same in groupby(rows, lambda row: row[0]):
        values, indent = [value for _, value in same], " " * (longest + 1)
        lines = list(values)
        if columns is not None:
            room = max(columns - len(indent), NAME_MIN)
            values = [in_pieces(value, room) for value in values]
            if max(width(word) for value in values for word in value.split(" ")) > room:
                indent = "  "  # Below its name there is more room.
            lines = [line for value in values for line in folded(value, columns - len(indent))]
        code = STATE_COLOURS.get(values[0]) if len(values) == 1 else None
        lines = [coloured(line, code, sys.stdout) for line in lines]
        first = lines.pop(0) if indent != "  " else ""
        print(f"{coloured(padded(f'{name}:', longest), DIM, sys.stdout)} {first}".rstrip())
        for line in lines:
            print(f"{indent}{line}")


def print_sentence(text: str, stream: TextIO | None = None) -> None:
    """One line; on a terminal it goes on in the next one between words, but not within `a command`, which people
    copy. To standard output by default."""
    stream = sys.stdout if stream is None else stream
    whole = _COMMAND.sub(lambda found: found[0].replace(" ", _NO_BREAK), text)
    for line in folded(whole, columns_of(stream)) if is_terminal(stream) else [text]:
        print(line.replace(_NO_BREAK, " "), file=stream)


def print_note(text: str) -> None:
    """A sentence below a table; folded and grey on a terminal."""
    columns = columns_of(sys.stdout) if is_terminal(sys.stdout) else None
    for line in [text] if columns is None else folded(text, columns):
        print(coloured(line, DIM, sys.stdout))


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
