"""What of a report nobody would read: taken out, and counted where it was many. Rule: pure; what stays is as it
was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

from cachefs.words import counted

# Of each list and each map of what the daemon says.
ENTRIES_SHOWN = 20
# Of lines of the log that say the same of something else: of more than `ALIKE_MIN` the first and the last ones.
ALIKE_MIN, ALIKE_FIRST, ALIKE_LAST = 6, 2, 1

_VARIES = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")
_ROOT = f"{PurePath(__file__).parent.parent}/"
_LIBRARIES = re.compile(r"^.*/(?:(?:site|dist)-packages|lib/python3\.\d+)/")
# How a thread gets to its work.
_BEGINNINGS = ("threading.py:", "trio/", "outcome/", "<frozen runpy>:")
_NUMBER = re.compile(r"-\d+$")


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────


def value(found: Any) -> Any:
    """The same, with the first entries of each list, and of each map whose keys are not known beforehand."""
    if isinstance(found, Mapping):
        some = list(found.items())
        are_named = not any(_VARIES.search(str(key)) for key in found)
        if len(some) > ENTRIES_SHOWN and not are_named:
            some = [*some[:ENTRIES_SHOWN], ("and more", len(some) - ENTRIES_SHOWN)]
        return {key: value(inner) for key, inner in some}
    if isinstance(found, list):
        some_inner = [value(inner) for inner in found[:ENTRIES_SHOWN]]
        return some_inner + ([f"and {len(found) - ENTRIES_SHOWN} more"] if len(found) > ENTRIES_SHOWN else [])
    return found


def status(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `status` answers, each thing once."""
    store = dict(found["store"])
    if store.get("disk") == found.get("disk"):
        store.pop("disk", None)
    for name, counts in found.get("writer", {}).items():
        if name in store and store[name] == counts:
            store.pop(name)
    return dict(value({**found, "store": store}))


def flights(found: Mapping[str, Any]) -> Iterator[str]:
    """What `flights` answers: a line for each thing, of what says something."""
    for kind, rows in found.items():
        yield f"# {kind}: {len(rows)}"
        yield from (
            json.dumps({k: v for k, v in row.items() if v is not None and v is not False})
            for row in rows[:ENTRIES_SHOWN]
        )
        if len(rows) > ENTRIES_SHOWN:
            yield f"(and {len(rows) - ENTRIES_SHOWN} more)"


# ── Lines ─────────────────────────────────────────────────────────────────────────────────────────────


def log(lines: Iterable[str]) -> Iterator[str]:
    """Of lines in a row that differ in ids and numbers only, the first and the last ones, and how many more."""
    for _, alike in groupby(lines, lambda line: _VARIES.sub("0", line)):
        some = list(alike)
        if len(some) <= ALIKE_MIN or not some[0].strip():
            yield from some
            continue
        yield from some[:ALIKE_FIRST]
        yield f"({len(some) - ALIKE_FIRST - ALIKE_LAST} more lines like these)"
        yield from some[-ALIKE_LAST:]


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def only(text: str, names: Sequence[str]) -> str:
    """The lines that begin with one of these."""
    return "\n".join(line for line in text.splitlines() if line.startswith(tuple(names)))


# ── Stacks ────────────────────────────────────────────────────────────────────────────────────────────


def tasks(found: Mapping[str, Any]) -> Iterator[str]:
    """What `debug-tasks` answers, for people."""
    waiting = found["reads"]
    yield "1 read waits" if len(waiting) == 1 else f"{len(waiting)} reads wait"
    for read in waiting[:ENTRIES_SHOWN]:
        yield f"  {read['waiting']:8.1f} s  image {read['image']}, {read['length']} bytes at {read['offset']}"
    if len(waiting) > ENTRIES_SHOWN:
        yield f"  and {len(waiting) - ENTRIES_SHOWN} more, for less long"
    yield f"\n{counted(found['tasks_in_all'], 'task')}"
    for name, depth, stack, times in _places(found["tasks"]):
        indent = "  " * (depth + 1)
        yield f"{indent}{name}" + (f" ({times} times)" if times > 1 else "")
        yield from (f"{indent}    {line}" for line in stack)
    yield f"\n{counted(len(found['threads']), 'thread')}"
    for thread in found["threads"]:
        yield f"  {thread['name']}"
        yield from (f"      {line}" for line in _of_thread(thread["stack"]))


def _places(found: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int, tuple[str, ...], int]]:
    """Neighbours at one place that differ in a number only are one: what serves the kernel's requests is so."""
    placed = [
        (_NUMBER.sub("-…", task["name"]), task["depth"], _of_task(task["stack"]), task["times"]) for task in found
    ]
    for (name, depth, stack), some in groupby(placed, lambda one: one[:3]):
        yield name, depth, stack, sum(times for *_, times in some)


def _of_task(stack: Sequence[str]) -> tuple[str, ...]:
    """Down to the first call of trio in which it waits: below that all waits look alike."""
    lines = [_short(line) for line in stack]
    end = len(lines)
    while end > 1 and lines[end - 1].startswith("trio/") and lines[end - 2].startswith("trio/"):
        end -= 1
    return tuple(lines[:end])


def _of_thread(stack: Sequence[str]) -> list[str]:
    lines = [_short(line) for line in stack]
    while len(lines) > 1 and lines[0].startswith(_BEGINNINGS):
        lines.pop(0)
    return lines


def _short(line: str) -> str:
    """Without the folder in which a library lies."""
    found = _LIBRARIES.sub("", line)
    return found if found != line else line.removeprefix(_ROOT)
