"""The folder of a store: what is in it by name, whose it is, and who has it. Rule: nothing here looks into the
index or a segment.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cachefs.errors import StoreFormat, StoreLocked, StoreUnusable
from cachefs.store.segments import sync_folder

LOCK, INDEX, SEGMENTS = "lock", "index", "segments"
SCRATCH = "nova"  # Beside the store: files of others (`cachefs.scratch`), which nothing here looks at or moves.
DATA, DATA_LOCK = "data.mdb", "lock.mdb"  # In INDEX, LMDB's own names.
ASIDE = "aside-"  # Before the time at which something was set aside.
LOST_FOUND = "lost+found"  # Of a filesystem's own: its root may be the store's folder.
NO_STORE = "there is no store there yet"
BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class StoreLock:
    """Holds `<store>/lock` for this process: a second daemon is refused, a dead one's lock is gone with it.

    The file's text tells who has it, and how many holders in a row came to no orderly end before: it is empty
    after one that did. `crashes` is that number, without this holder.
    """

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(folder / LOCK, flags, 0o600)
        except OSError as error:
            raise StoreUnusable(str(folder), f"cannot be locked: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (self._text() or ["another process"])[0]
            os.close(self._file)
            raise StoreLocked(str(folder), f"in use by process {holder}") from None
        self.crashes = _crashes(self._text())
        self._write()

    def begin_count_anew(self) -> None:
        """What made the others crash is known not to be here."""
        self.crashes = 0
        self._write()

    def release(self) -> None:
        """The orderly end."""
        with suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _write(self) -> None:
        with suppress(OSError):  # A full disk: it only tells.
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n{self.crashes}\n".encode(), 0)

    def _text(self) -> list[str]:
        try:
            return os.pread(self._file, 64, 0).decode(errors="replace").splitlines()
        except OSError:
            return []


def _crashes(text: list[str]) -> int:
    """By what the holder before left. Text of an older cachefs says nothing of its end."""
    return int(text[1]) + 1 if len(text) == 2 and text[1].isdecimal() and text[1].isascii() else 0


# ── Whose ─────────────────────────────────────────────────────────────────────────────────────────────


def make_folder(folder: Path) -> None:
    """Makes the store's folder, and refuses one that this user does not own or cannot use."""
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(OSError):  # A parent that this user may not read.
                sync_folder(folder.parent)
    except OSError as error:
        raise StoreUnusable(str(folder), f"cannot be made: {error.strerror}") from error
    require_own(folder)


def make_parts(folder: Path) -> None:
    """Makes the folders in the store's folder that are not there. Raises OSError."""
    missing = [part for part in (INDEX, SEGMENTS) if not (folder / part).exists()]
    for part in missing:
        (folder / part).mkdir(mode=0o700)
    if missing:
        sync_folder(folder)


def require_own(folder: Path) -> None:
    """Refuses a folder that this user does not own or cannot use, or that others may write into."""
    try:
        info = folder.stat()
    except FileNotFoundError:
        raise StoreUnusable(str(folder), NO_STORE) from None
    except OSError as error:
        raise StoreUnusable(str(folder), f"cannot be used: {error.strerror}") from error
    if info.st_uid != os.geteuid():
        raise StoreUnusable(str(folder), _not_own("", info.st_uid))
    if info.st_mode & BY_OTHERS:
        raise StoreUnusable(
            str(folder), f"others may write into it: look at what is there, then chmod 0700 {folder}"
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StoreUnusable(str(folder), "cannot be read and written by this user")


def _not_own(part: str, owner: int) -> str:
    said = f"{part}belongs to user {owner}, and this is user {os.geteuid()}"
    return f"{said}: run it as that user, or, if the daemon has another account now, chown -R the store to it"


def make_scratch(folder: Path) -> Path:
    """The folder of scratch files, made if it is not there. Raises OSError."""
    scratch = folder / SCRATCH
    if not scratch.exists():
        scratch.mkdir(mode=0o700)
        sync_folder(folder)
    return scratch


def _require_own_part(folder: Path, part: str, *, a_folder: bool) -> None:
    """Refuses a part of the store that somebody else may have put there, or can change: when it was made, the
    folder may have been open to others."""
    try:
        info = (folder / part).lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(info.st_mode):
        raise StoreUnusable(str(folder), f"{part} is a symbolic link: a store has its own files")
    if a_folder and not stat.S_ISDIR(info.st_mode):
        raise StoreFormat(str(folder), f"{part} is no folder: this is not a cachefs store")
    if not a_folder and not stat.S_ISREG(info.st_mode):
        raise StoreUnusable(str(folder), f"{part} is no regular file: a store has its own files")
    if info.st_uid != os.geteuid():
        raise StoreUnusable(str(folder), _not_own(f"{part} ", info.st_uid))
    if info.st_mode & BY_OTHERS:
        raise StoreUnusable(str(folder), f"others may write into {part}: chmod go-w {folder / part}")
    if not a_folder and info.st_nlink > 1:
        raise StoreUnusable(
            str(folder), f"{part} has another name elsewhere (a hard link): a store has its own files"
        )


def foreign(names: Iterable[str]) -> list[str]:
    """What no store has in its folder."""
    own = (LOCK, INDEX, SEGMENTS, SCRATCH, LOST_FOUND)
    return sorted(n for n in names if n not in own and not n.startswith(ASIDE))


def require_store(folder: Path, *, empty_will_do: bool) -> None:
    """Refuses a folder that holds something else, before anything of it is touched. It is a store when it has an
    index and holds nothing foreign, or holds segments. With `empty_will_do`, one that is yet to be made is too."""
    try:
        strangers = foreign(os.listdir(folder))
        for part in (INDEX, SEGMENTS, SCRATCH):
            _require_own_part(folder, part, a_folder=True)
        segments = [f"{SEGMENTS}/{path.name}" for path in (folder / SEGMENTS).glob("*.seg")]
        for part in (LOCK, f"{INDEX}/{DATA}", f"{INDEX}/{DATA_LOCK}", *sorted(segments)):
            _require_own_part(folder, part, a_folder=False)
        has_index = (folder / INDEX / DATA).exists()
        has_segments = bool(segments)
        strays = _names(folder / INDEX) - {DATA, DATA_LOCK} if not has_index else set()
        strays |= _names(folder / SEGMENTS) if not has_segments else set()
    except OSError as error:
        raise StoreUnusable(str(folder), f"cannot be used: {error.strerror}") from error
    if has_segments or (has_index and not strays):
        return
    if strangers or strays:
        raise StoreFormat(str(folder), "the folder is not empty and holds no cachefs store")
    if not empty_will_do and not any(folder.glob(f"{ASIDE}*")):
        raise StoreFormat(str(folder), NO_STORE)


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()
