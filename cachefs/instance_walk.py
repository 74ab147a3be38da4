"""Looks at the files of a folder, piece by piece, for qcow2 disks that stand on this mount. Rule: what lies there
may be anybody's: nothing is followed, nothing but regular files is opened, of each no more than its head is read,
and everything that cannot be looked at is said.

For a thread: `step` does some milliseconds of work. What it comes to is a `plan.instances.Walk`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from cachefs.errors import FormatError
from cachefs.formats.qcow2_backing import HEAD_BYTES, backing_extent
from cachefs.plan.instances import Base, BaseNames, Walk, base_of

# Nova's disks lie one folder deep, those of libvirt's pools none.
DEPTH_MAX = 6
ENTRIES_MAX = 1_000_000
DISKS_MAX = 100_000
UNREAD_MAX = 10_000
STEP_S, STEP_ENTRIES = 0.01, 256

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# It went while it was looked at, or is something else by now than it was a moment ago.
_PASSED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})


class _Level(NamedTuple):
    """A folder that is open. `path` as from the configuration."""

    fd: int
    path: bytes
    entries: Any  # What os.scandir gives: an iterator that is to be closed.

    def close(self) -> None:
        self.entries.close()
        os.close(self.fd)


class Walker:
    """One walk over `folder`. `mountpoints`: every spelling of this mount's; `own_device`: its device number,
    where it is known; `names`: what those in `nova/` mean, and where it is bound to. None of these is walked
    into."""

    def __init__(
        self,
        folder: bytes,
        mountpoints: Sequence[bytes],
        own_device: Callable[[], int | None] = lambda: None,
        names: Callable[[], BaseNames | None] = lambda: None,
    ) -> None:
        self.folder, self._mountpoints, self._own_device = folder, mountpoints, own_device
        self._names_now = names
        self._names: BaseNames | None = None
        self.done = False
        self.trouble: str | None = None  # Why it does not count that something was not met.
        self.first_error: str | None = None
        self.entries = self.looked_at = self.place = 0
        self.busy = self.given_up = False
        self._levels: list[_Level] = []
        self._found: dict[bytes, Base] = {}
        self._unread: set[bytes] = set()
        self._device: int | None = None

    # ── for the loop ──

    @property
    def walk(self) -> Walk:
        """What it came to."""
        whole = self.done and self.trouble is None and not self.given_up
        return Walk(self.folder, self.place, whole, self._found, frozenset(self._unread))

    @property
    def found(self) -> int:
        """How many disks name this mount."""
        return len(self._found)

    @property
    def unread(self) -> int:
        """How many folders and files could not be looked at."""
        return len(self._unread)

    # ── in a thread ──

    def step(self) -> list[tuple[bytes, Base]]:
        """Goes on for some milliseconds. Returns the disks that were found in them, and what they name."""
        self.busy = True
        try:
            return self._step()
        finally:
            self.busy = False
            if self.done or self.given_up:
                self.close()

    def close(self) -> None:
        """Where nobody is at work on it."""
        while self._levels:
            self._levels.pop().close()

    def _step(self) -> list[tuple[bytes, Base]]:
        if not self.entries and not self._levels and not self._begin():
            self.done = True
            return []
        found: list[tuple[bytes, Base]] = []
        until_s = time.monotonic() + STEP_S
        for _ in range(STEP_ENTRIES):
            if not self._levels or self.given_up:
                self.done = True
                if not self.entries:
                    self.trouble = "it is empty"  # Or what should be mounted there is not.
                break
            disk = self._next(self._levels[-1])
            if disk is not None:
                found.append(disk)
            if time.monotonic() >= until_s:
                break
        return found

    def _begin(self) -> bool:
        """Opens the folder itself: the only one that may be a link, because an operator named it."""
        self._device, self._names = self._own_device(), self._names_now()
        try:
            fd = os.open(self.folder, _FOLDER)
            self._enter(fd, self.folder)
            self.place = _place_of(fd)
            if self._names is not None and self._levels:
                self._names = self._names.below(self.folder, os.readlink(b"/proc/self/fd/%d" % fd))
        except OSError as error:
            self.trouble = "it is not there" if error.errno == errno.ENOENT else error.strerror or str(error)
            self.close()
            return False
        return True

    def _next(self, level: _Level) -> tuple[bytes, Base] | None:
        try:
            entry = next(level.entries, None)
        except OSError as error:
            self._cannot(level.path, error)
            entry = None
        if entry is None:
            self._levels.pop().close()
            return None
        self.entries += 1
        if self.entries > ENTRIES_MAX or len(self._found) >= DISKS_MAX:
            self.trouble = f"there is more than is looked at ({ENTRIES_MAX} entries, {DISKS_MAX} disks)"
            self.close()
            return None
        name = os.fsencode(entry.name)
        path = os.path.join(level.path, name)
        try:
            if entry.is_dir(follow_symlinks=False):
                self._go_into(level, name, path)
            elif entry.is_file(follow_symlinks=False):
                return self._look_at(level, name, path)
        except OSError as error:
            if error.errno not in _PASSED:
                self._cannot(path, error)
        except FormatError as error:  # Or it is being written at this moment.
            self._note_unread(path, error.reason)
        return None

    def _go_into(self, level: _Level, name: bytes, path: bytes) -> None:
        binds = () if self._names is None else self._names.binds
        if len(self._levels) <= DEPTH_MAX and path not in self._mountpoints and path not in binds:
            self._enter(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=level.fd), path)

    def _enter(self, fd: int, path: bytes) -> None:
        """Takes over `fd`."""
        try:
            if os.fstat(fd).st_dev == self._device:
                os.close(fd)
                return
            self._levels.append(_Level(fd, path, os.scandir(fd)))
        except BaseException:
            os.close(fd)
            raise

    def _look_at(self, level: _Level, entry: bytes, path: bytes) -> tuple[bytes, Base] | None:
        fd = os.open(entry, _FILE, dir_fd=level.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            self.looked_at += 1
            head = os.pread(fd, HEAD_BYTES, 0)
            extent = backing_extent(head)
            if extent is None:
                return None
            backing = head[extent.start : extent.end]
            if len(backing) < extent.length:
                backing = os.pread(fd, extent.length, extent.start)
        finally:
            os.close(fd)
        if len(backing) < extent.length:
            raise FormatError("it ends before the name of its backing file does")
        name = backing.partition(b"\0")[0]  # To qemu it ends there.
        base = base_of(name, level.path, self._mountpoints, self._names)
        if base is None:
            return None
        self._found[path] = base
        return path, base

    # ── what could not be looked at ──

    def _cannot(self, path: bytes, error: OSError) -> None:
        self._note_unread(path, error.strerror or str(error))

    def _note_unread(self, path: bytes, why: str) -> None:
        if self.first_error is None:
            self.first_error = f"{shown(path)}: {why}"
        if len(self._unread) < UNREAD_MAX:
            self._unread.add(path)
        else:
            self.trouble = f"more than {UNREAD_MAX} files and folders cannot be read"


def shown(path: bytes) -> str:
    """For people, whatever bytes it has."""
    return path.decode(errors="backslashreplace")


def _place_of(fd: int) -> int:
    """Which filesystem this is, as a number that stays over mounts and restarts; 0 where that cannot be said."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
            mount = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split()
                if mount is not None and fields[0] == mount[1].encode():
                    kind, source = fields[fields.index(b"-") + 1 :][:2]
                    return xxh3_64_intdigest(b"\0".join((fields[3], kind, source))) or 1
    except (OSError, ValueError):
        pass
    return 0
