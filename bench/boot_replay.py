"""Reads a file as a recorded boot did. Rule: it waits for what the guest waited for, and for nothing else.

    python -m bench.boot_replay LIST FILE       seconds, and a checksum of all that was read, as JSON

O_DIRECT, so that every read reaches the filesystem, as a hypervisor's do. A process of its own: four guests are
four processes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import boot_list
from bench.boot_list import Read

_PR_SET_TIMERSLACK = 29
_ROOM = threading.local()


class Replayed:
    """How it went: `took_s`, the `checksum` of the bytes, and what each read took."""

    def __init__(self, took_s: float, checksum: int, reads_s: list[float]) -> None:
        self.took_s, self.checksum, self.reads_s = took_s, checksum, reads_s


class Replaying:
    """One replay by a guest in another process."""

    def __init__(self, path: Path, reads: Path = boot_list.DEBIAN) -> None:
        command = [sys.executable, "-m", "bench.boot_replay", str(reads), str(path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def finish(self) -> Replayed:
        said, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the replay failed with {self._process.returncode}")
        return Replayed(**json.loads(said))


def replay(path: Path) -> Replayed:
    """Starts one and waits for it. The time begins with the open, which waits for the look-up."""
    return Replaying(path).finish()


def run(reads: Sequence[Read], file: int) -> Replayed:
    """In this process: one thread for what comes alone, others for what comes beside something else."""
    _sleep_exactly()
    overtaken = {number - back for number, read in enumerate(reads) for back in read.beside}
    ended_s = [0.0] * len(reads)
    began_at_s = [0.0] * len(reads)
    sums = [0] * len(reads)
    over = [threading.Event() for _ in reads]

    def perform(number: int) -> None:
        read = reads[number]
        began_at_s[number] = time.monotonic()
        try:
            data = _read(file, read)
        finally:
            ended_s[number] = time.monotonic()
            over[number].set()
        sums[number] = zlib.crc32(data)

    began_s = answered_s = time.monotonic()
    under_way: list[int] = []
    with ThreadPoolExecutor(max((len(read.beside) for read in reads), default=0) + 1) as pool:
        futures = []
        for number, read in enumerate(reads):
            beside = {number - back for back in read.beside}
            for other in under_way:
                if other not in beside:
                    over[other].wait()
                    answered_s = max(answered_s, ended_s[other])
            under_way = [*(other for other in under_way if other in beside), number]
            pause_s = answered_s + read.think_s - time.monotonic()
            if pause_s > 0:
                time.sleep(pause_s)
            if number in overtaken:
                futures.append(pool.submit(perform, number))
            else:
                perform(number)
        for future in futures:
            future.result()
    took = [end - begin for begin, end in zip(began_at_s, ended_s, strict=True)]
    return Replayed(max(ended_s, default=began_s) - began_s, zlib.crc32(repr(sums).encode()), took)


def _read(file: int, read: Read) -> memoryview:
    """Good until this thread's next one."""
    room: mmap.mmap | None = getattr(_ROOM, "pages", None)
    if room is None or len(room) < read.length:
        room = _ROOM.pages = mmap.mmap(-1, max(read.length, 1 << 20))
    data = memoryview(room)[: read.length]
    n = os.preadv(file, [data], read.offset)
    if n != read.length:
        raise RuntimeError(f"{n} of {read.length} bytes at {read.offset}")
    return data


def _sleep_exactly() -> None:
    """Linux may add 50 µs to a sleep, which is as long as most think times; threads inherit this."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def main(reads: str, path: str) -> None:
    recorded = boot_list.load(Path(reads)).reads
    began_s = time.monotonic()
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    opened_s = time.monotonic()
    done = run(recorded, file)
    done.took_s += opened_s - began_s
    json.dump(vars(done), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
