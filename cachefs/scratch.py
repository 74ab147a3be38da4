"""Scratch files: what others write into `nova/`, each an ordinary file in a folder of its own beside the store.
Rule: nothing but plain files of that folder is opened, and no disk is asked on the loop.

The kernel opens a file by its number, and may do so a moment after the file was removed. A filesystem gives the
inode of what was removed to what is made next: a number is more than that, or somebody would get another file.

A name never becomes a path: it is looked up in the folder's own descriptor, and no link is followed. What lies
there and is no plain file, or has another name elsewhere, was put there by somebody else: it is not shown, not
opened and not replaced. The daemon alone changes the folder, so what is in it is known in memory from the start.

Files belong to the daemon on the disk, with mode 0600. Whose they seem to be, and with which mode, is an extended
attribute of each: the daemon needs no right to give files away. Where the filesystem has no such attributes, they
belong to whom the folder belongs to.

All work is done in threads, `THREADS` of them at most: a disk that hangs holds up scratch files, and no image.
Each handle is a descriptor of the daemon's, and whoever may read a file can ask for any number: they have a share
of all, and the rest is for the store and for Glance.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple

import trio

from cachefs import logs
from cachefs.errors import ScratchFailed
from cachefs.namespace import NAME_BYTES_MAX
from cachefs.store.folder import make_scratch

log = logs.get(__name__)
repeats = logs.Repeats(log)

Answer = TypeVar("Answer")
Args = TypeVarTuple("Args")

THREADS = 8
FILES_MAX = 100_000
HANDLES_SHARE = 4  # One in so many of the descriptors that the daemon may have.
# So often room is asked for, for one write: others may take what was made.
ROOM_TRIES = 3
TOTALS_WAIT_S = 2.0
# A number is a file's inode on the disk, and above that how often there was another file of that inode before.
INODES = 1 << 48
TURNS = 1 << 14
OWNER = "user.cachefs.owner"
MODE = 0o644

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SYNC = os.O_SYNC | os.O_DSYNC
# What a caller may do about it: no news for the log.
_EXPECTED = frozenset({errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL})
_EXPECTED |= {errno.EFBIG, errno.ENOTSUP}


class Owner(NamedTuple):
    """Whose a file seems to be, and with which permissions."""

    uid: int
    gid: int
    mode: int

    def encode(self) -> bytes:
        return f"{self.uid} {self.gid} {self.mode:o}".encode()

    @classmethod
    def decode(cls, value: bytes) -> Owner:
        """Raises ValueError."""
        uid, gid, mode = value.split(b" ")
        return cls(int(uid), int(gid), int(mode, 8) & 0o777)


@dataclass(frozen=True, slots=True)
class Attributes:
    """Of a file. `number` follows from its inode on the disk, `generation` tells it from one that had the same
    before; times in nanoseconds since 1970, `blocks` of 512 bytes."""

    number: int
    generation: int
    owner: Owner
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be another; None stays."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Totals(NamedTuple):
    """How many files there are, what they take on the disk in bytes, and how many things there are none."""

    files: int
    bytes: int
    strangers: int


class ScratchFile:
    """One opened file, read as any view is."""

    __slots__ = ("_scratch", "fd", "number", "size")

    def __init__(self, scratch: Scratch, fd: int, number: int, size: int) -> None:
        self._scratch, self.fd, self.number, self.size = scratch, fd, number, size

    def read_now(self, offset: int, length: int) -> None:
        """Never: see the module."""

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes, fewer at the end of the file. Raises ScratchFailed."""
        return await self._scratch.work(_read, self.fd, length, offset)

    async def write(self, offset: int, data: bytes) -> int:
        """How many bytes were written: fewer where the disk is full. Raises ScratchFailed where none were, and
        nobody could make room."""
        for _ in range(ROOM_TRIES):
            try:
                return await self._scratch.work(_write, self.fd, data, offset)
            except ScratchFailed as error:
                if error.code != errno.ENOSPC or not await self._scratch.make_room(len(data)):
                    raise
        return await self._scratch.work(_write, self.fd, data, offset)

    async def sync(self, *, only_data: bool) -> None:
        """Raises ScratchFailed."""
        await self._scratch.work(os.fdatasync if only_data else os.fsync, self.fd)


class Scratch:
    """The folder. `owner`: whose files are of which nothing else is known. Made before anything runs, it asks the
    disk at once; then all is on the loop."""

    def __init__(self, store: Path, owner: Owner) -> None:
        self._owner = owner
        self._threads = trio.CapacityLimiter(THREADS)
        self.make_room: Callable[[int], Awaitable[bool]] = _no_room
        self._counting, self._known = trio.CapacityLimiter(1), Totals(0, 0, 0)
        self._handles, self._handles_max = 0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // HANDLES_SHARE
        self._changing = trio.Lock()  # Who changes names waits for the disk in between.
        self._names: dict[bytes, int] = {}
        self._by_number: dict[int, bytes] = {}
        self._open: dict[int, list[ScratchFile]] = {}
        self._generations: dict[int, int] = {}  # How often there was another file of this inode before.
        try:
            path = make_scratch(store)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    if _is_plain(info):
                        self._generations[info.st_ino] = 0
                        self._know(os.fsencode(entry.name), info.st_ino)
        except OSError as error:
            raise ScratchFailed(store, error) from error

    def close(self) -> None:
        """The last: whoever has a file open has it no more."""
        for file in [file for files in self._open.values() for file in files]:
            os.close(file.fd)
        self._open.clear()
        os.close(self._folder)

    # ── names ──

    def number_of(self, name: bytes) -> int | None:
        """The file of this name, if there is one. From any thread."""
        return self._names.get(name)

    def names(self) -> list[tuple[bytes, int]]:
        return list(self._names.items())

    async def create(self, name: bytes, owner: Owner, flags: int) -> tuple[ScratchFile, Attributes]:
        """Makes the file, or opens it where it is there and `flags` have no O_EXCL. Raises ScratchFailed."""
        while True:
            async with self._changing:
                number = self._names.get(name)
                if number is None:
                    return await self._made(name, owner, flags)
            if flags & os.O_EXCL:
                raise ScratchFailed(name, OSError(errno.EEXIST, os.strerror(errno.EEXIST)))
            try:
                file = await self.open(number, flags)
                return file, await self.attributes(number)
            except ScratchFailed as error:
                if error.code not in (errno.ENOENT, errno.ESTALE) or self._names.get(name) == number:
                    raise

    async def _made(self, name: bytes, owner: Owner, flags: int) -> tuple[ScratchFile, Attributes]:
        if len(self._names) >= FILES_MAX:
            raise ScratchFailed(name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with self._one_more(name):
            file, attributes = await self.work(self._make, name, owner, flags)
        self._know(name, file.number)
        self._note_open(file)
        return file, attributes

    async def unlink(self, name: bytes) -> None:
        """Raises ScratchFailed."""
        async with self._changing:
            self._number(name)
            with self._unless_gone(name):
                await self.work(self._unlink, name)
            self._forget(name)

    async def rename(self, old: bytes, new: bytes, *, may_replace: bool) -> None:
        """Raises ScratchFailed: what is there and is no plain file is not replaced."""
        async with self._changing:
            number, replaced = self._number(old), self._names.get(new)
            if replaced is not None and not may_replace:
                raise ScratchFailed(new, OSError(errno.EEXIST, os.strerror(errno.EEXIST)))
            with self._unless_gone(old):
                await self.work(self._rename, old, new)
            del self._names[old]
            if replaced is not None:
                self._by_number.pop(replaced, None)
            self._know(new, number)

    async def sync(self) -> None:
        """Names that were changed are on the disk when it returns. Raises ScratchFailed."""
        await self.work(os.fsync, self._folder)

    def _know(self, name: bytes, number: int) -> None:
        self._names[name] = number
        self._by_number[number] = name

    def _forget(self, name: bytes) -> None:
        self._by_number.pop(self._names.pop(name), None)

    @contextmanager
    def _unless_gone(self, name: bytes) -> Iterator[None]:
        """Around what needs the file of this name to be there, while nobody changes names: who removes it from the
        folder himself, to have room, has removed it."""
        try:
            yield
        except ScratchFailed as error:
            if error.code == errno.ENOENT:
                log.warning("a scratch file in nova/ is gone, and was not removed there: %s", error)
                self._forget(name)
            raise

    def _number(self, name: bytes) -> int:
        number = self._names.get(name)
        if number is None:
            raise ScratchFailed(name, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        return number

    # ── one file ──

    async def open(self, number: int, flags: int) -> ScratchFile:
        """Raises ScratchFailed."""
        with self._one_more(""):
            file = await self._on_file(number, self._open_file, flags)
        self._note_open(file)
        return file

    @contextmanager
    def _one_more(self, name: bytes | str) -> Iterator[None]:
        """Around the opening of a handle, which counts unless that fails. Raises ScratchFailed."""
        if self._handles >= self._handles_max:
            repeats.log(
                logging.WARNING, errno.ENFILE, "scratch files in nova/: %d are open, no more may be", self._handles
            )
            raise ScratchFailed(name, OSError(errno.ENFILE, os.strerror(errno.ENFILE)))
        self._handles += 1
        try:
            yield
        except BaseException:
            self._handles -= 1
            raise

    def _note_open(self, file: ScratchFile) -> None:
        self._open.setdefault(file.number, []).append(file)

    async def release(self, file: ScratchFile) -> None:
        others = self._open[file.number]
        others.remove(file)
        if not others:
            del self._open[file.number]
        try:
            await self.work(os.close, file.fd)
        finally:
            self._handles -= 1

    async def attributes(self, number: int) -> Attributes:
        """Raises ScratchFailed."""
        return await self._on_file(number, self._with_file, os.O_RDONLY, self._attributes)

    async def change(self, number: int, changes: Changes) -> Attributes:
        """Raises ScratchFailed."""

        def work(fd: int) -> Attributes:
            self._change(fd, changes)
            return self._attributes(fd)

        return await self._on_file(number, self._with_file, os.O_RDWR, work)

    async def _on_file(self, number: int, work: Callable[[int, *Args], Answer], *args: *Args) -> Answer:
        """Once more where the file was not found by its name: somebody may have been about to give it another."""
        try:
            return await self.work(work, number, *args)
        except ScratchFailed as error:
            if error.code not in (errno.ENOENT, errno.ESTALE):
                raise
        async with self._changing:
            name = self._by_number.get(number)
            if name is None:
                return await self.work(work, number, *args)
            with self._unless_gone(name):
                return await self.work(work, number, *args)

    async def totals(self) -> Totals:
        """As they were last known where the disk does not say soon."""
        with trio.move_on_after(TOTALS_WAIT_S):
            try:
                self._known = await trio.to_thread.run_sync(
                    self._totals, limiter=self._counting, abandon_on_cancel=True
                )
            except OSError as error:
                log.debug("scratch files cannot be counted: %s", error)
        return self._known

    async def work(self, work: Callable[[*Args], Answer], *args: *Args) -> Answer:
        """Does it in a thread. Raises ScratchFailed."""
        try:
            return await trio.to_thread.run_sync(work, *args, limiter=self._threads)
        except OSError as error:
            if error.errno not in _EXPECTED:
                repeats.log(logging.WARNING, error.errno, "a scratch file in nova/: %s", error.strerror)
            raise ScratchFailed(args[0] if args and isinstance(args[0], bytes) else "", error) from error

    # ── in a thread ──

    def _make(self, name: bytes, owner: Owner, flags: int) -> tuple[ScratchFile, Attributes]:
        kept = os.O_RDWR | os.O_CREAT | os.O_EXCL | (flags & _SYNC)
        fd = os.open(_checked(name), kept | _OPEN, 0o600, dir_fd=self._folder)
        try:
            info = os.fstat(fd)
            if not _is_plain(info):  # It was made a moment ago: what it lacks is a number that can be shown.
                raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
            self._generations[info.st_ino] = self._generations.get(info.st_ino, -1) + 1
            self._give(fd, owner._replace(mode=owner.mode & 0o777))
            attributes = self._attributes(fd)
        except BaseException:
            os.unlink(name, dir_fd=self._folder)
            os.close(fd)
            raise
        return ScratchFile(self, fd, attributes.number, attributes.size), attributes

    def _unlink(self, name: bytes) -> None:
        os.unlink(name, dir_fd=self._folder)

    def _rename(self, old: bytes, new: bytes) -> None:
        try:
            there = os.stat(_checked(new), dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if not _is_plain(there):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(old, new, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _open_file(self, number: int, flags: int) -> ScratchFile:
        # Who only reads may empty it all the same, by the kernel's rules.
        only_reads = flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY
        access = os.O_RDONLY if only_reads else os.O_RDWR
        fd = self._fd_of(number, access | (flags & _SYNC))
        try:
            if flags & os.O_TRUNC:
                os.ftruncate(fd, 0)
            return ScratchFile(self, fd, number, os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise

    def _fd_of(self, number: int, access: int) -> int:
        """A new descriptor of the file. Raises OSError: ESTALE where there is none of this number any more, or
        something else has its name."""
        name, files = self._by_number.get(number), self._open.get(number, ())
        if name is not None:
            where, flags = name, access | _OPEN
        elif files:  # Unlinked, and open: by its descriptor it can still be reached.
            where, flags = os.fsencode(f"/proc/self/fd/{files[0].fd}"), access | os.O_CLOEXEC
        else:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # The kernel looks the name up again.
        try:
            fd = os.open(where, flags, dir_fd=self._folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # A link, a pipe, a folder: not ours.
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from error
            raise
        info = os.fstat(fd)
        # If it was removed while we opened it, its name, descriptor and inode may be another's already.
        there = self._by_number.get(number) == name if name is not None else self._open.get(number) is files
        if info.st_ino != number % INODES or not _is_plain(info) or not there:
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _with_file(self, number: int, access: int, work: Callable[[int], Attributes]) -> Attributes:
        fd = self._fd_of(number, access)
        try:
            return work(fd)
        finally:
            os.close(fd)

    def _attributes(self, fd: int) -> Attributes:
        info = os.fstat(fd)
        generation = self._generations.get(info.st_ino, 0)
        number = generation % TURNS * INODES + info.st_ino
        return Attributes(
            number, generation, self._owner_of(fd), info.st_size, info.st_blocks,
            info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns,
        )  # fmt: skip

    def _owner_of(self, fd: int) -> Owner:
        try:
            return Owner.decode(os.getxattr(fd, OWNER))
        except (OSError, ValueError):
            return self._owner

    def _give(self, fd: int, owner: Owner) -> None:
        try:
            os.setxattr(fd, OWNER, owner.encode())
        except OSError as error:
            if error.errno != errno.ENOTSUP or self._owner.mode & ~owner.mode:
                raise  # It would seem to be for more than it is for.

    def _change(self, fd: int, changes: Changes) -> None:
        if changes.size is not None:
            os.ftruncate(fd, changes.size)
        before = self._owner_of(fd)
        after = Owner(
            before.uid if changes.uid is None else changes.uid,
            before.gid if changes.gid is None else changes.gid,
            before.mode if changes.mode is None else changes.mode & 0o777,
        )
        if after != before:
            os.setxattr(fd, OWNER, after.encode())
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            info = os.fstat(fd)
            atime_ns = info.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime_ns = info.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(fd, ns=(atime_ns, mtime_ns))

    def _totals(self) -> Totals:
        files = taken = strangers = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if _is_plain(info):
                    files, taken = files + 1, taken + info.st_blocks * 512
                else:
                    strangers += 1
        return Totals(files, taken, strangers)


async def _no_room(wanted: int) -> bool:
    """Nobody has any to give."""
    return False


def _is_plain(info: os.stat_result) -> bool:
    return stat.S_ISREG(info.st_mode) and info.st_nlink <= 1 and info.st_ino < INODES


def _checked(name: bytes) -> bytes:
    """The kernel gives no other names; this is where one would do harm. Raises OSError."""
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if len(name) > NAME_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return name


def _read(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def _write(fd: int, data: bytes, offset: int) -> int:
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done:], offset + done)
            except OSError:
                if not done:
                    raise
                break
    return done
