"""Opening a store after anything: what a crash leaves behind, and how it is put right. Rule: only what the
index does not vouch for is ever removed.

A crash can leave three things. Bytes beyond a segment's committed end: cut off. Files of segments that were
never committed: removed. Notes of punches that were not done, or not noted as done: done (again; a punch of
a hole is a hole). Nothing else needs repair, because every commit is whole or not there (design §5).
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from cachefs.errors import RecordCorrupt, StoreFormat, StoreLocked, StoreUnusable
from cachefs.store import format as f
from cachefs.store.format import (
    SEGMENT_SIZE,
    SPAN_SIZE_DEFAULT,
    SPAN_SIZE_MAX,
    SPAN_SIZE_MIN,
    Counters,
    Punch,
    SegmentNo,
    SegmentRecord,
    StoreRecord,
    Table,
    ViewNo,
    ViewRecord,
)
from cachefs.store.index import MAP_SIZE_FIRST, Index, WriteSet
from cachefs.store.segments import Segments

log = logging.getLogger(__name__)

LOCK, INDEX, SEGMENTS = "lock", "index", "segments"


class StoreLock:
    """Holds `<store>/lock` for this process: a second daemon is refused, a dead one's lock is gone with it."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(folder / LOCK, flags, 0o600)
        except OSError as error:
            raise StoreUnusable(str(folder), f"cannot be locked: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise StoreLocked(str(folder), f"in use by process {holder}") from None
        with suppress(OSError):  # A full disk: the number is only for who is refused.
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._file)


@dataclass
class Opened:
    """A store that is ready: what `Ledger` and `Store` start from."""

    folder: Path
    lock: StoreLock
    index: Index
    segments: Segments
    record: StoreRecord
    counters: Counters
    views: dict[ViewNo, ViewRecord]
    segment_records: dict[SegmentNo, SegmentRecord]
    append_to: SegmentNo | None
    cut_bytes: int = 0  # What a crash had left beyond the committed ends.
    punches_done: int = 0

    def close(self) -> None:
        self.segments.close()
        self.index.close()
        self.lock.release()


def open_store(folder: Path, span_size: int | None = None, map_size: int = MAP_SIZE_FIRST) -> Opened:
    """Opens the store in `folder`, or makes one where there is nothing. `span_size` (bytes) is what a new store
    gets, and what an old one must have. Raises StoreUnusable or one of its kinds."""
    make_folder(folder)
    # Before the lock, whose file a foreign folder may have too.
    names = set(os.listdir(folder))
    if INDEX not in names and names - {LOCK, SEGMENTS}:
        raise StoreFormat(str(folder), "the folder is not empty and holds no cachefs store")
    lock = StoreLock(folder)
    index: Index | None = None
    segments = Segments(folder / SEGMENTS)
    try:
        (folder / INDEX).mkdir(mode=0o700, exist_ok=True)
        (folder / SEGMENTS).mkdir(mode=0o700, exist_ok=True)
        index = Index(folder / INDEX, map_size)
        record = _store_record(index, folder, span_size)
        return _recover(folder, lock, index, segments, record)
    except BaseException as error:
        segments.close()
        if index is not None:
            index.close()
        lock.release()
        if isinstance(error, RecordCorrupt | OSError):
            raise StoreUnusable(str(folder), str(error)) from error
        raise


def make_folder(folder: Path) -> None:
    """Makes the store's folder, and refuses one that this user does not own or cannot use."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnusable(str(folder), f"cannot be made: {error.strerror}") from error
    require_own(folder)


def require_own(folder: Path) -> None:
    """Refuses a folder that this user does not own or cannot use."""
    try:
        owner = folder.stat().st_uid
    except OSError as error:
        raise StoreUnusable(str(folder), f"cannot be used: {error.strerror}") from error
    if owner != os.geteuid():
        raise StoreUnusable(str(folder), f"belongs to user {owner}, and this is user {os.geteuid()}")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StoreUnusable(str(folder), "cannot be read and written by this user")


def _store_record(index: Index, folder: Path, span_size: int | None) -> StoreRecord:
    with index.reading() as snapshot:
        found = snapshot.get(Table.META, f.STORE_KEY)
    if found is not None:
        record = StoreRecord.decode(found, str(folder))
        if span_size is not None and span_size != record.span_size:
            raise StoreUnusable(
                str(folder),
                f"was made with span_size {record.span_size} and is configured with {span_size}: "
                "the span size of a store cannot change",
            )
        return record
    size = SPAN_SIZE_DEFAULT if span_size is None else span_size
    assert SPAN_SIZE_MIN <= size <= SPAN_SIZE_MAX, "config refuses others"
    assert size & (size - 1) == 0, "config refuses others"
    record = StoreRecord(size, uuid4())
    writes = WriteSet()
    writes.put(Table.META, f.STORE_KEY, record.encode())
    writes.put(Table.META, f.COUNTERS_KEY, Counters().encode())
    index.commit(writes)
    return record


def _recover(folder: Path, lock: StoreLock, index: Index, segments: Segments, record: StoreRecord) -> Opened:
    with index.reading() as snapshot:
        counters = Counters.decode(snapshot.get(Table.META, f.COUNTERS_KEY) or b"")
        views = {
            ViewNo(int.from_bytes(key, "big")): ViewRecord.decode(key, value)
            for key, value in snapshot.items(Table.VIEWS)
        }
        records = {
            SegmentNo(int.from_bytes(key, "big")): SegmentRecord.decode(key, value)
            for key, value in snapshot.items(Table.SEGMENTS)
        }
        punches = [Punch.decode(key, value) for key, value in snapshot.items(Table.PUNCHES)]
    opened = Opened(folder, lock, index, segments, record, counters, views, records, None)
    _open_segments(opened)
    _punch(opened, punches)
    last = max(records, default=None)
    if last is not None and last in segments.files and segments.size(last) == records[last].end < SEGMENT_SIZE:
        opened.append_to = last
    return opened


def _punch(opened: Opened, punches: list[Punch]) -> None:
    """Does what is noted. A full disk may refuse it (a hole splits an extent): the note stays, for next time."""
    writes = WriteSet()
    try:
        for punch in punches:
            opened.segments.punch(punch)
            writes.put(Table.PUNCHES, punch.key, None)
            opened.punches_done += 1
    except OSError as error:
        log.error("freed bytes cannot be given back: %s", error)
    try:
        if writes:
            opened.index.commit(writes)
    except OSError as error:
        log.error("%s", error)


def _open_segments(opened: Opened) -> None:
    segments, records = opened.segments, opened.segment_records
    files = set(segments.stored())
    for stray in files - set(records):
        segments.remove_stray(stray)
    for segment, record in records.items():
        if segment not in files:
            log.error("segment %d is missing: what it held will be fetched again", segment)
            continue
        segments.open(segment)
        size = segments.size(segment)
        if size > record.end:
            opened.cut_bytes += size - record.end
            segments.truncate(segment, record.end)
        elif size < record.end:
            # Nothing is appended to it again: what is lost must stay unreadable, not become zeros.
            log.error(
                "segment %d ends at %d, not at %d: what it lost will be fetched again", segment, size, record.end
            )
