"""The tests' daemon as an operator would run it, and what benchmarks ask of it. Rule: nothing here starts
or stops anything in another way than the tests do.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests import node

IDLE_MAX_S = 120.0

# What the tests set to see more, or sooner.
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "mount": {"read_deadline": None},
    "store": {"min_free": None, "commit_interval": None},
}


class Node(node.Node):
    """A daemon with the defaults of its options."""

    def __init__(self, folder: Path, *endpoints: str, **sections: Mapping[str, object]) -> None:
        super().__init__(folder, *endpoints)
        self.configure(**_DEFAULTS)
        self.configure(**sections)

    def restart(self) -> None:
        """Keeps the store; what the kernel remembers of the mount is gone."""
        self.stop()
        self.start()

    def known_images(self) -> int:
        return int(self.status()["images"]["known"])

    def wait_idle(self) -> dict[str, Any]:
        """Until nothing is under way and everything that came has landed."""
        deadline_s = time.monotonic() + IDLE_MAX_S
        while True:
            status = self.status()
            if not status["fetcher"]["flights"] and not status["fetcher"]["bytes_in_memory"]:
                return status
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the daemon is busy after {IDLE_MAX_S} s: {status['fetcher']}")
            time.sleep(0.05)

    def wait_verified(self) -> None:
        """Until an image that is here whole was compared with Glance's hash, which takes a processor a while."""
        deadline_s = time.monotonic() + IDLE_MAX_S
        while not self.status()["verification"]["verified"]:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nothing was verified in {IDLE_MAX_S} s")
            time.sleep(0.1)

    def segments(self) -> list[Path]:
        """The files of its chunks."""
        return sorted((self.store / "segments").glob("*.seg"))

    def segments_bytes(self) -> int:
        """What they really occupy."""
        return sum(path.stat().st_blocks * 512 for path in self.segments())

    def memory_peak(self) -> int:
        """Bytes: the largest resident set since the start."""
        return self._memory("VmHWM")

    def memory(self) -> int:
        """Bytes: the resident set now."""
        return self._memory("VmRSS")

    def memory_of_files(self) -> int:
        """Bytes: what of the resident set are pages of files, LMDB's map above all. The kernel takes them back
        when it needs memory."""
        return self._memory("RssFile")

    def cpu_s(self) -> float:
        """The processor's time that it has taken, seconds."""
        return cpu_s(self.pid)

    def _memory(self, field: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
        raise KeyError(field)


def cpu_s(pid: int) -> float:
    """User and system time so far, of all threads that it has and had; in steps of a clock tick, 10 ms."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def read_all(path: Path) -> None:
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], check=True)


def drop_cache(paths: Iterable[Path]) -> None:
    """Has the kernel forget the pages of these files: whoever reads them next waits for the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)  # A page that is to be written cannot be forgotten.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
