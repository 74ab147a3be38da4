"""The files that hold chunks. Rule: knows segments, offsets and bytes, and nothing of what they mean.

What is assumed of the filesystem: what was written before `fdatasync` returned is there after a power loss;
`fallocate(PUNCH_HOLE)` gives zeros and frees blocks (where it is not supported, space comes back only with
the whole segment); a new file is found after its directory was synced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cachefs import logs
from cachefs.plan.extents import PAGE
from cachefs.store.format import Punch, SegmentNo, segment_name

log = logs.get(__name__)

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# linux/fiemap.h: start, length, flags, extents mapped, room for extents (0: only count them), reserved.
_FS_IOC_FIEMAP, _FIEMAP = 0xC020660B, struct.Struct("=QQIIII")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

RWF_NOWAIT = os.RWF_NOWAIT

# A longer write makes the kernel look for pages of its own size (up to 2 MiB). In a guest whose host takes free
# memory back those are the ones that must be faulted in again: measured 2 to 4 s for a GiB, and 0.3 s like this.
WRITE_BYTES = 256 << 10


class CutShort(OSError):
    """A read that failed after `got` bytes had come."""

    def __init__(self, got: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.got = got


class _Refused(OSError):
    """The kernel does not go past its cache here."""


class Segments:
    """All segment files of one store, open from the start: a lookup of a descriptor is one dict access.

    `files` maps a segment to its descriptor. Whoever reads in a thread counts itself in, and a segment that is
    removed is closed by the last one who reads it; so a descriptor cannot come to mean another file under a
    reader's hand. `last` is the greatest number that there ever was: none is given twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[SegmentNo, int] = {}
        self.last = SegmentNo(0)
        self._lock = threading.Lock()
        self._reading: Counter[int] = Counter()  # Threads, by descriptor.
        self._retired: set[int] = set()  # Descriptors of removed files: their space may not be back yet.
        self._direct_refused = False  # By the filesystem.

    # ── opening ──

    def stored(self) -> Iterator[SegmentNo]:
        """The segments that there are files for."""
        for path in sorted(self.folder.glob("*.seg")):
            if path.stem.isdigit() and path.name == segment_name(SegmentNo(int(path.stem))):
                yield SegmentNo(int(path.stem))

    def open(self, segment: SegmentNo, *, create: bool = False) -> None:
        """Opens a file that is there, or, with `create`, makes one that is not."""
        # Without O_NOATIME a read that has all it needs in memory may wait for the journal of a disk that hangs.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOATIME
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        self.files[segment] = os.open(self.folder / segment_name(segment), flags, 0o600)
        self.last = max(self.last, segment)

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])

    def retire(self, segment: SegmentNo) -> None:
        """Nobody finds the segment from now on. On the loop, where hits look descriptors up."""
        file = self.files.pop(segment, None)
        if file is not None:
            with self._lock:
                self._retired.add(file)

    def remove_retired(self, segments: Iterable[SegmentNo]) -> None:
        """Removes the files of retired segments, and closes those that no thread reads. Raises OSError."""
        for segment in segments:
            assert segment not in self.files, "retire comes first"
            (self.folder / segment_name(segment)).unlink(missing_ok=True)
        with self._lock:
            unread = [file for file in self._retired if not self._reading[file]]
            self._retired.difference_update(unread)
        for file in unread:
            os.close(file)

    @contextmanager
    def _held(self, segment: SegmentNo) -> Iterator[int | None]:
        """The segment's descriptor, which stays what it is inside the `with`."""
        with self._lock:
            file = self.files.get(segment)
            if file is not None:
                self._reading[file] += 1
        try:
            yield file
        finally:
            if file is not None:
                with self._lock:
                    self._reading[file] -= 1
                    closing = not self._reading[file] and file in self._retired
                    if not self._reading[file]:
                        del self._reading[file]
                    if closing:
                        self._retired.remove(file)
                if closing:
                    os.close(file)

    def remove_stray(self, segment: SegmentNo) -> None:
        """Removes a file that was never opened here."""
        assert segment not in self.files
        (self.folder / segment_name(segment)).unlink()

    # ── bytes ──

    def append(
        self, segment: SegmentNo, offset: int, parts: Sequence[memoryview], *, past_cache: bool = False
    ) -> None:
        """Writes `parts` one behind the other from `offset`. Raises OSError; a part of it may be written.

        `past_cache`: nobody is expected to read them soon. Then they go to the disk from where they lie, if they
        begin on pages of memory and the filesystem takes that: the kernel's cache keeps what guests read, and
        is not filled with a second copy of what passes by (measured: a fifth of the processor's time of a cold
        read from one end to the other, and more where each new page of the cache is a fault in a host)."""
        if past_cache:
            with suppress(_Refused), self._direct(segment, os.O_WRONLY) as file:
                _write(file, list(parts), offset)
                return
        for some in _batches(parts):
            offset = _write(self.files[segment], some, offset)

    def read(self, segment: SegmentNo, offset: int, length: int) -> bytes:
        """May return less than `length` where the file ends early; may wait for the disk. Raises OSError when that
        fails, also where some bytes came before."""
        with self._held(segment) as file:
            found = b"" if file is None else os.pread(file, length, offset)
            while file is not None and 0 < len(found) < length:
                more = os.pread(file, length - len(found), offset + len(found))
                if not more:
                    break
                found += more
            return found

    def read_into(self, segment: SegmentNo, offset: int, buffer: memoryview, *, past_cache: bool = False) -> int:
        """Fills `buffer`; returns how many bytes it got, which is less where the file ends. May wait for the disk.
        Raises OSError when that fails: CutShort where some bytes came before. `past_cache`: what the kernel's
        cache does not have is not put there, if `buffer` begins on a page of memory."""
        got = self._read_past_cache(segment, offset, buffer) if past_cache else 0
        with self._held(segment) as file:
            while file is not None and got < len(buffer):
                try:
                    n = os.preadv(file, (buffer[got:],), offset + got)
                except OSError as error:
                    raise CutShort(got, error) from error
                if n == 0:
                    break
                got += n
        return got

    def _read_past_cache(self, segment: SegmentNo, offset: int, buffer: memoryview) -> int:
        """How many bytes of `buffer` that gave; the ordinary way says why it was not all. (Asking the cache first,
        with RWF_NOWAIT, would have the kernel read ahead into it.)"""
        pages = len(buffer) & -PAGE
        if not pages or offset % PAGE:
            return 0
        with suppress(OSError), self._held(segment) as file:
            if file is not None:
                with self._direct(segment, os.O_RDONLY) as direct:
                    return os.preadv(direct, (buffer[:pages],), offset) & -PAGE
        return 0

    @contextmanager
    def _direct(self, segment: SegmentNo, access: int) -> Iterator[int]:
        """A descriptor that goes past the kernel's cache. Raises _Refused where that cannot be done, also from
        within the `with`."""
        if self._direct_refused:
            raise _Refused
        try:
            flags = access | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOATIME
            file = os.open(self.folder / segment_name(segment), flags)
        except OSError as error:  # tmpfs before Linux 6.6, for one.
            self._direct_refused = error.errno == errno.EINVAL
            raise _Refused from error
        try:
            yield file
        except OSError as error:
            if error.errno == errno.EINVAL:  # It does not begin on a page.
                raise _Refused from error
            raise
        finally:
            os.close(file)

    # ── durability and space ──

    def sync(self, appended: Iterable[SegmentNo], *, created: bool) -> None:
        """What was appended to these segments before this call is durable after it; with `created`, the
        files' names too. Raises OSError, after which nothing may be assumed of what they held unsynced."""
        for segment in appended:
            os.fdatasync(self.files[segment])
        if created:
            sync_folder(self.folder)

    def punch(self, punch: Punch) -> None:
        """Gives the bytes back to the filesystem; they read as zeros from now on."""
        file = self.files.get(punch.segment)
        if file is None:
            return
        if _libc.fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, punch.offset, punch.length):
            code = ctypes.get_errno()
            if code != errno.EOPNOTSUPP:
                raise OSError(code, os.strerror(code), segment_name(punch.segment))

    def truncate(self, segment: SegmentNo, end: int) -> None:
        os.ftruncate(self.files[segment], end)

    def size(self, segment: SegmentNo) -> int:
        return os.fstat(self.files[segment]).st_size

    def extents(self, segment: SegmentNo) -> int:
        """In how many pieces the file lies on the disk; 0 where the filesystem does not say."""
        request = bytearray(_FIEMAP.pack(0, (1 << 64) - 1, 0, 0, 0, 0))
        with self._held(segment) as file:
            try:
                if file is not None:
                    fcntl.ioctl(file, _FS_IOC_FIEMAP, request)
            except OSError:
                return 0
        return int(_FIEMAP.unpack(request)[3])

    def blocks_bytes(self) -> int:
        """What the segments really occupy, by the filesystem's own count; those that were removed count until
        their space is back."""
        with self._lock:  # Copies: the writer's thread may add a segment meanwhile.
            files = [*self.files.values(), *self._retired]
        return sum(_blocks_bytes(file) for file in files)

    def free_bytes(self) -> int:
        """What the filesystem has left for this process."""
        stat = os.statvfs(self.folder)
        return stat.f_bavail * stat.f_frsize


def _blocks_bytes(file: int) -> int:
    try:
        return os.fstat(file).st_blocks * 512
    except OSError:  # Closed since: it was retired, and is gone.
        return 0


def _write(file: int, parts: list[memoryview], offset: int) -> int:
    """Writes `parts`, which is empty afterwards, from `offset`; returns where they end."""
    while parts:
        written = os.pwritev(file, parts, offset)
        offset += written
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = parts[0][written:]
    return offset


def _batches(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """`parts` in lists of at most WRITE_BYTES."""
    some: list[memoryview] = []
    size = 0
    for part in parts:
        if some and size + len(part) > WRITE_BYTES:
            yield some
            some, size = [], 0
        some.append(part)
        size += len(part)
    if some:
        yield some


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
