"""How long reads took while something else went on: one fio, which writes down each of its reads, and asking for
any moments of it afterwards. Rule: one process reads from the first moment to the last, so that what is compared
differs in nothing but the moment.
"""

from __future__ import annotations

import signal
import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STARTING_MAX_S = 20
READING_MAX_S = 600


@dataclass(frozen=True)
class Latencies:
    """Of reads in the order in which they ended: when (seconds since 1970), and how long each took (seconds)."""

    ended_s: Sequence[float]
    took_s: Sequence[float]

    def between(self, begin_s: float, end_s: float) -> Latencies:
        first, last = bisect_left(self.ended_s, begin_s), bisect_left(self.ended_s, end_s)
        return Latencies(self.ended_s[first:last], self.took_s[first:last])

    def percentile(self, share: float) -> float:
        """Seconds; `share` of the reads took no longer. Raises ValueError where there are none."""
        if not self.took_s:
            raise ValueError("no reads in that time")
        ordered = sorted(self.took_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def __len__(self) -> int:
        return len(self.took_s)


class Reader:
    """A reader that is under way; `latencies` once it has ended."""

    latencies: Latencies


@contextmanager
def reading(path: Path, folder: Path) -> Iterator[Reader]:
    """Random 4 KiB O_DIRECT reads of `path`, one at a time, for the length of a `with`. They are logged in
    `folder`."""
    log = folder / "reads"
    command = ["fio", "--name=reads", f"--filename={path}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1"]
    command += [
        "--ioengine=psync",
        "--norandommap",
        "--randrepeat=0",
        "--time_based",
        f"--runtime={READING_MAX_S}",
    ]
    command += [f"--write_lat_log={log}", "--log_unix_epoch=1", "--log_entries=1048576", "--output=/dev/null"]
    process = subprocess.Popen(command, cwd=folder)
    reader = Reader()
    try:
        _wait_until_it_reads(process)
        yield reader
    finally:
        process.send_signal(signal.SIGINT)  # It writes its log, and ends with a status that says so.
        process.wait()
    reader.latencies = _parsed(Path(f"{log}_lat.1.log"))


def _wait_until_it_reads(process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + STARTING_MAX_S
    while _reads_of(process.pid) < 100:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError("fio did not begin to read")
        time.sleep(0.05)


def _reads_of(pid: int) -> int:
    """Read calls of the process and its job."""
    counted = 0
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for process in (pid, *map(int, children.read_text().split())):
        for line in Path(f"/proc/{process}/io").read_text().splitlines():
            name, _, value = line.partition(":")
            counted += int(value) if name == "rchar" else 0
    return counted // 4096


def _parsed(log: Path) -> Latencies:
    """Of lines `milliseconds, nanoseconds, direction, size, ...`."""
    ended, took = [], []
    with log.open() as lines:
        for line in lines:
            ended_ms, took_ns = line.split(",", 2)[:2]
            ended.append(int(ended_ms) / 1e3)
            took.append(int(took_ns) / 1e9)
    return Latencies(ended, took)
