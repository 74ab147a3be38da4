"""Opening a store after anything: what a crash leaves behind, and how it is put right. Rule: only what the
index does not vouch for is ever removed.

A record that every start needs and that has rotted is repaired, by what the other records say (`repair`). An index
that cannot be read as such is set aside with its segments (`aside`), and a new store begun.

A crash can leave three things. Bytes beyond a segment's committed end: cut off. Files of segments that were
never committed: removed. Notes of punches that were not done, or not noted as done: done (again; a punch of
a hole is a hole). Nothing else needs repair, because every commit is whole or not there (design §5).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from cachefs import logs
from cachefs.errors import StoreUnreadable, StoreUnusable
from cachefs.store import format as f
from cachefs.store.aside import set_aside, why_unreadable
from cachefs.store.check import Report, is_unmade, look, read_store_record
from cachefs.store.folder import INDEX, SEGMENTS, StoreLock, make_folder, make_parts, require_own, require_store
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
from cachefs.store.index import MAP_SIZE_FIRST, Index, WriteSet, index_faults
from cachefs.store.repair import Repaired, repair
from cachefs.store.segments import Segments, sync_folder
from cachefs.store.survey import UNDECODABLE, Survey, decode_segment, decode_view

log = logs.get(__name__)

# So many holders in a row that came to no orderly end, and the next start looks at every page of the index.
CRASHES_MAX = 2


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
    require_store(folder, empty_will_do=True)
    lock = StoreLock(folder)
    try:
        with _refusing(folder):
            return _open_or_set_aside(folder, lock, span_size, map_size)
    except BaseException:
        lock.release()
        raise


def repair_store(folder: Path) -> tuple[Report, Repaired, bool]:
    """Verifies the store in `folder` and repairs what is wrong: what was found, what was done, and whether the
    store is sound now. Raises StoreUnusable or one of its kinds for what cannot be looked at."""
    require_own(folder)
    require_store(folder, empty_will_do=False)
    lock = StoreLock(folder)
    try:
        with _refusing(folder):
            report, survey = look(folder)
            if survey is None and report.sound:
                return report, Repaired(), True
            if survey is None:  # The daemon begins the new store: it knows the size of its spans.
                return report, Repaired(aside=str(set_aside(folder, report.findings[0].what))), True
            done = _repair(folder, survey, MAP_SIZE_FIRST)
            return report, done, not done or look(folder, bytes_too=False)[0].sound
    finally:
        lock.release()


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """What the disk and the records raise, as one clear line."""
    try:
        with index_faults(folder):
            yield
    except (OSError, *UNDECODABLE) as error:
        raise StoreUnusable(str(folder), str(error)) from error


def _open_or_set_aside(folder: Path, lock: StoreLock, span_size: int | None, map_size: int) -> Opened:
    # Whatever killed the last holders may lie in a page that they all came to.
    thorough = lock.crashes >= CRASHES_MAX
    reason = why_unreadable(folder, thorough=thorough)
    if reason is None:
        if thorough:
            lock.begin_count_anew()
        try:
            return _open_or_repair(folder, lock, span_size, map_size)
        except StoreUnreadable as error:
            reason = error.reason
    set_aside(folder, reason)
    return _open(folder, lock, span_size, map_size)


def _open_or_repair(folder: Path, lock: StoreLock, span_size: int | None, map_size: int) -> Opened:
    try:
        return _open(folder, lock, span_size, map_size)
    except UNDECODABLE as error:
        trouble = error
    log.error("store %s: %s: the index is repaired, without a look at the bytes", folder, trouble)
    report, survey = look(folder, bytes_too=False)
    if survey is None:
        raise StoreUnreadable(str(folder), report.findings[0].what)
    done = _repair(folder, survey, map_size)
    log.warning("store %s is repaired: %s", folder, done)
    return _open(folder, lock, span_size, map_size)


def _repair(folder: Path, survey: Survey, map_size: int) -> Repaired:
    with closing(Index(folder / INDEX, map_size)) as index:
        return repair(folder, index, survey)


def _open(folder: Path, lock: StoreLock, span_size: int | None, map_size: int) -> Opened:
    """Raises one of UNDECODABLE for a record that every start needs, and StoreUnreadable."""
    index: Index | None = None
    segments = Segments(folder / SEGMENTS)
    try:
        make_parts(folder)
        with index_faults(folder):
            index = Index(folder / INDEX, map_size)
            record = _store_record(index, folder, span_size)
            return _recover(folder, lock, index, segments, record)
    except BaseException:
        segments.close()
        if index is not None:
            index.close()
        raise


def _store_record(index: Index, folder: Path, span_size: int | None) -> StoreRecord:
    with index.reading() as snapshot:
        record = None if is_unmade(folder, snapshot) else read_store_record(snapshot, folder)
    if record is not None:
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
    sync_folder(folder / INDEX)  # LMDB syncs its file, and not the name.
    return record


def _recover(folder: Path, lock: StoreLock, index: Index, segments: Segments, record: StoreRecord) -> Opened:
    with index.reading() as snapshot:
        counters = Counters.decode(snapshot.get(Table.META, f.COUNTERS_KEY) or b"")
        views = {
            ViewNo(int.from_bytes(key, "big")): decode_view(key, value)
            for key, value in snapshot.items(Table.VIEWS)
        }
        records = {
            SegmentNo(int.from_bytes(key, "big")): decode_segment(key, value)
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
