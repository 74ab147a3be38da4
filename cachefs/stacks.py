"""Where every task and every thread stands, for SIGUSR1 and `cachefs debug tasks`. Rule: it looks and changes
nothing, in small pieces, so that readers do not wait for it.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.control import Handler

log = logs.get("cachefs.daemon")

READS_SHOWN = 200
TASKS_SHOWN = 5000
FRAMES_SHOWN = 50
AT_ONCE = 10


class Reads(Protocol):
    """Knows the reads that wait; each has `view`, `wanted`, and `since_s` by trio's clock."""

    @property
    def reading(self) -> Iterable[Any]: ...


class Stacks:
    """Answers `debug-tasks`."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def handlers(self) -> dict[str, Handler]:
        return {"debug-tasks": self.tasks}

    async def tasks(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`reads` that wait (bytes and seconds), `tasks` as a tree by their `depth`, `threads`; a stack is a list
        of lines, its innermost call last. Tasks that stand at the same place are one, with how many `times`."""
        reads = waiting_reads(self._reads)[:READS_SHOWN]
        threads = _threads()
        root = trio.lowlevel.current_root_task()
        known = list(_tasks(root, 0)) if root is not None else []
        # A thousand reads that wait are a thousand tasks at one place.
        times: dict[tuple[int, str, tuple[str, ...]], int] = {}
        for at, (depth, task) in enumerate(known[:TASKS_SHOWN]):
            if at % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            place = depth, task.name, tuple(_line(frame, line) for frame, line in _frames_of(task))
            times[place] = times.get(place, 0) + 1
        shown = [
            {"name": name, "depth": depth, "stack": list(stack), "times": count}
            for (depth, name, stack), count in times.items()
        ]
        return {"reads": reads, "tasks": shown, "tasks_in_all": len(known), "threads": threads}


def waiting_reads(reads: Reads) -> list[dict[str, Any]]:
    """The reads that wait at this moment, the longest first."""
    now_s = trio.current_time()
    found = [
        {
            "image": reading.view.record.image,
            "offset": reading.wanted.start,
            "length": reading.wanted.length,
            "waiting": round(now_s - reading.since_s, 3),
        }
        for reading in reads.reading
    ]
    return sorted(found, key=lambda row: -row["waiting"])


def _frames_of(task: trio.lowlevel.Task) -> Iterator[tuple[FrameType, int]]:
    if getattr(task.coro, "cr_frame", None) is None:
        return  # It has ended meanwhile.
    for at, found in enumerate(task.iter_await_frames()):
        if at == FRAMES_SHOWN:
            return
        yield found


def _line(frame: FrameType, line: int) -> str:
    # No source line: reading files is nothing for the loop.
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"


def _threads() -> list[dict[str, Any]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, innermost in sys._current_frames().items():
        stack: list[str] = []
        frame: FrameType | None = innermost
        while frame is not None and len(stack) < FRAMES_SHOWN:
            stack.append(_line(frame, frame.f_lineno or 0))
            frame = frame.f_back
        found.append({"name": names.get(ident, str(ident)), "stack": stack[::-1]})
    return found


def log_stacks(reads: Reads) -> None:
    """Logs which reads wait, where every task stands, and every thread on stderr: what SIGUSR1 is for. (A task
    that serves the kernel shows pyfuse3's frame only: it is compiled.)"""
    now_s = trio.current_time()
    for reading in reads.reading:
        log.warning(
            "a read of %d bytes at %d waits since %.1f s",
            reading.wanted.length, reading.wanted.start, now_s - reading.since_s, image=reading.view.record.image,
        )  # fmt: skip
    root = trio.lowlevel.current_root_task()
    for depth, task in _tasks(root, 0) if root is not None else ():
        frames = traceback.StackSummary.extract(task.iter_await_frames())
        log.warning("task %s%s\n%s", "  " * depth, task.name, "".join(frames.format()).rstrip())
    faulthandler.dump_traceback(all_threads=True)


def _tasks(task: trio.lowlevel.Task, depth: int) -> Iterator[tuple[int, trio.lowlevel.Task]]:
    yield depth, task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child, depth + 1)
