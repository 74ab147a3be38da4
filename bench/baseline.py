"""The least that a pyfuse3 filesystem can do: one file, `file`, whose read is one `os.pread`. Rule: nothing of
cachefs is used here; it is what cachefs is measured against.

    python -m bench.baseline FILE MOUNTPOINT
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, ModeT, RequestContext

NAME = b"file"
FILE = InodeT(2)
STARTING_MAX_S = 20
BACKGROUND_MAX = 65535
_PR_SET_PDEATHSIG = 1


class OneFile(pyfuse3.Operations):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._fd, size, off)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=FileHandleT(1), keep_cache=True)

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name != NAME:
            raise FUSEError(errno.ENOENT)
        return await self.getattr(FILE, ctx)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(inode)
        entry.st_mode = ModeT(stat.S_IFREG | 0o444 if inode == FILE else stat.S_IFDIR | 0o555)
        entry.st_size = os.fstat(self._fd).st_size if inode == FILE else 0
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry


@contextmanager
def mounted(source: Path, mountpoint: Path) -> Iterator[tuple[Path, int]]:
    """The one file, as the process with this id serves it."""
    mountpoint.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.baseline", str(source), str(mountpoint)], preexec_fn=_end_with_parent
    )
    try:
        deadline_s = time.monotonic() + STARTING_MAX_S
        while not os.path.ismount(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the baseline did not start")
            time.sleep(0.02)
        # As cachefs does, and for the same reason: otherwise a depth of 16 is one of 12.
        folder = Path(f"/sys/fs/fuse/connections/{os.minor(mountpoint.stat().st_dev)}")
        for name in ("max_background", "congestion_threshold"):
            (folder / name).write_text(str(BACKGROUND_MAX))
        yield mountpoint / os.fsdecode(NAME), process.pid
    finally:
        subprocess.run(["umount", str(mountpoint)], check=False)
        process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(path: str, mountpoint: str) -> None:
    pyfuse3.init(OneFile(path), mountpoint, {"fsname=baseline", "ro", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
