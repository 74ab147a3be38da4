"""A store whose index is lost or unreadable: how that is seen before LMDB sees it, and where the store goes then.
Rule: renames, and never removes anything.

What sets a store aside is what the file says, never that it could not be read: an I/O error, a missing permission
or another format is refused by whoever opens the store, and everything stays where it is.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from cachefs import logs
from cachefs.errors import IndexCorrupt, StoreFormat, StoreUnusable
from cachefs.store import pages
from cachefs.store.folder import ASIDE, DATA, INDEX, SEGMENTS
from cachefs.store.format import Table
from cachefs.store.segments import sync_folder

log = logs.get(__name__)

TABLES = {t.name.lower(): pages.DUPSORT | pages.DUPFIXED if t is Table.DIGESTS else 0 for t in Table}
# Those that every store has had.
_LATER = (Table.USES, Table.LEASES, Table.PRECACHE, Table.TRACES, Table.BLOCK_DIGESTS)
FIRST = set(TABLES) - {t.name.lower() for t in _LATER}
# Read whole by every start anyway. The others are looked at where a start may take its time.
SMALL = {t.name.lower() for t in (Table.META, Table.IMAGES, Table.VIEWS, Table.SEGMENTS, Table.PUNCHES)}


def why_unreadable(folder: Path, *, thorough: bool) -> str | None:
    """Why LMDB must not open the index of the store in `folder`; None when it may, or when there is neither index
    nor segment yet. `thorough` looks at every page, else those of the small tables. Raises StoreFormat for what
    another LMDB or program made, StoreUnusable when the disk does not give it."""
    lost = "there is no index" if any((folder / SEGMENTS).glob("*.seg")) else None
    try:
        file = os.open(folder / INDEX / DATA, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return lost
    except OSError as error:
        raise StoreUnusable(str(folder), f"the index cannot be read: {error.strerror}") from error
    try:
        size = os.fstat(file).st_size
        return _why(file, size, folder, thorough) if size else lost
    except OSError as error:
        raise StoreUnusable(str(folder), f"the index cannot be read: {error.strerror}") from error
    finally:
        os.close(file)


def _why(file: int, size: int, folder: Path, thorough: bool) -> str | None:
    def read(offset: int, length: int) -> bytes:
        return os.pread(file, length, offset)

    try:
        meta = pages.newest_meta(read)
        if meta.version != pages.VERSION:
            raise StoreFormat(str(folder), f"its index is of LMDB's version {meta.version}, not {pages.VERSION}")
        thorough |= size < meta.file_bytes
        found = pages.verify(read, meta, TABLES, None if thorough else SMALL)
    except IndexCorrupt as error:
        return str(error)
    if found and not found & set(TABLES):
        raise StoreFormat(str(folder), "its index is another program's")
    missing = sorted(FIRST - found)
    # A crash while the store is made leaves such an index, and no segment yet.
    if missing and any((folder / SEGMENTS).glob("*.seg")):
        return f"table {missing[0]} is missing"
    return None


def set_aside(folder: Path, reason: str) -> Path:
    """Renames index and segments into a new folder beside them, which it returns. Raises OSError. A crash in
    between leaves segments without an index, which the next start sets aside too."""
    aside = _new_folder(folder)
    for part in (INDEX, SEGMENTS):
        if (folder / part).exists():
            (folder / part).rename(aside / part)
    sync_folder(aside)
    sync_folder(folder)
    log.error(
        "store %s: its index is lost or unreadable (%s). Index and segments are set aside in %s, where they "
        "occupy the disk until you remove them, and a new store is begun",
        folder, reason, aside,
    )  # fmt: skip
    return aside


def _new_folder(folder: Path) -> Path:
    name = f"{ASIDE}{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for n in count(1):
        aside = folder / (name if n == 1 else f"{name}-{n}")
        try:
            aside.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return aside
    raise AssertionError
