"""LMDB: everything of the store but the bytes. The only importer of lmdb. Rule: no transaction outlives the
call that began it, so none can live across an await.

What LMDB asks of its users is met here: one environment per process and never across a fork; read
transactions are short (a long one would keep freed pages from being used again); a full map grows, which LMDB
allows only while no transaction is open, so readers pass a gate.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lmdb

from cachefs.errors import StoreUnreadable, StoreUnusable
from cachefs.store import format as f
from cachefs.store.format import Chunk, ChunkId, Recipe, SpanNo, Table, ViewNo

TRIM_DIGESTS = 64
MAP_SIZE_FIRST = 256 << 20  # Address space, not disk: LMDB grows its file as it fills it.
_READERS_MAX = 512

# What LMDB says of a file that is not, or not any more, what it wrote. All else is trouble with the disk, with
# memory or with permissions, and passes.
_UNREADABLE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
    lmdb.BadValsizeError,
    lmdb.BadTxnError,
)


@contextmanager
def index_faults(path: Path) -> Iterator[None]:
    """Raises what LMDB raises inside as StoreUnreadable, when it says that the file is no index any more, and as
    StoreUnusable otherwise."""
    try:
        yield
    except lmdb.Error as error:
        kind = StoreUnreadable if isinstance(error, _UNREADABLE) else StoreUnusable
        raise kind(str(path), f"the index cannot be opened: {error}") from error


_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _mapping_of(path: Path) -> tuple[int, int]:
    """(address, length) of this process's map of `path`; (0, 0) when there is none."""
    inode = path.stat().st_ino
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and int(fields[4]) == inode and fields[5] == str(path.resolve()):
            start, _, end = fields[0].partition("-")
            return int(start, 16), int(end, 16) - int(start, 16)
    return 0, 0


@dataclass
class WriteSet:
    """One group's changes, as final values: `puts[table][key]` is the record, None where it is to go.
    `digests_added` and `digests_removed` are (digest, chunk) pairs of the one table with several values."""

    puts: dict[Table, dict[bytes, bytes | None]] = field(default_factory=dict)
    digests_added: list[tuple[bytes, ChunkId]] = field(default_factory=list)
    digests_removed: list[tuple[bytes, ChunkId]] = field(default_factory=list)
    prefixes_removed: list[tuple[Table, bytes]] = field(default_factory=list)  # All records whose keys begin so.

    def put(self, table: Table, key: bytes, record: bytes | None) -> None:
        self.puts.setdefault(table, {})[key] = record

    def __bool__(self) -> bool:
        return bool(self.puts or self.digests_added or self.digests_removed or self.prefixes_removed)


class Snapshot:
    """The committed state at one moment. Decodes what it reads; raises RecordCorrupt."""

    def __init__(self, txn: lmdb.Transaction, tables: dict[Table, lmdb._Database]) -> None:
        self._txn, self._tables = txn, tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        if table not in self._tables or not key:
            return None
        record = self._txn.get(key, db=self._tables[table])
        assert not isinstance(record, memoryview), "transactions here copy what they return"
        return record

    def recipe(self, view: ViewNo, span: SpanNo) -> Recipe | None:
        key = f.span_key(view, span)
        record = self.get(Table.SPANS, key)
        return None if record is None else f.decode_recipe(key, record)

    def chunk(self, chunk: ChunkId) -> Chunk | None:
        key = f.chunk_key(chunk)
        record = self.get(Table.CHUNKS, key)
        return None if record is None else Chunk.decode(key, record)

    def chunks(self, chunks: Iterable[ChunkId]) -> list[tuple[ChunkId, bytes]]:
        """Those of `chunks` that there are, with their records."""
        found = self._txn.cursor(self._tables[Table.CHUNKS]).getmulti([f.chunk_key(chunk) for chunk in chunks])
        return [(f.split_chunk_key(bytes(key)), bytes(record)) for key, record in found]

    def candidates(self, digest: bytes, most: int) -> list[ChunkId]:
        """The first `most` chunks that have this digest: usually none or one, more where it was forged."""
        cursor = self._txn.cursor(self._tables[Table.DIGESTS])
        if not cursor.set_key(digest):
            return []
        return [f.split_chunk_key(bytes(value)) for value in islice(cursor.iternext_dup(), most)]

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of `digests` that any chunk has."""
        cursor = self._txn.cursor(self._tables[Table.DIGESTS])
        return {bytes(digest) for digest, _ in cursor.getmulti(digests)}

    def items(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Every (key, record) of `table` in the order of the keys, those that begin with `prefix`."""
        if table not in self._tables:
            return
        cursor = self._txn.cursor(self._tables[table])
        if not (cursor.set_range(prefix) if prefix else cursor.first()):
            return
        for key, value in cursor:
            if not bytes(key).startswith(prefix):
                return
            yield bytes(key), bytes(value)

    def records(self, table: Table, after: bytes, most: int) -> list[tuple[bytes, bytes]]:
        """At most `most` (key, record) of `table`, in order, whose keys come after the key `after`."""
        cursor = self._txn.cursor(self._tables[table])
        if not cursor.set_range(after + b"\0"):
            return []
        return [(bytes(key), bytes(value)) for key, value in islice(cursor.iternext(), most)]

    def keys(self, table: Table, after: bytes, most: int) -> list[bytes]:
        """At most `most` keys of `table`, in order, that come after the key `after`."""
        cursor = self._txn.cursor(self._tables[table])
        if not cursor.set_range(after + b"\0"):
            return []
        return [bytes(key) for key in islice(cursor.iternext(keys=True, values=False), most)]


class Index:
    """One LMDB environment. Thread-safe; `commit` is to be called by one thread at a time."""

    _trimmed_at: tuple[int, int] | None = None  # Where the map lies in memory, once that was looked up.

    def __init__(self, path: Path, map_size: int = MAP_SIZE_FIRST, *, read_only: bool = False) -> None:
        self.path = path
        self._gate = threading.Condition()
        self._readers = 0
        self._closed = False
        with index_faults(path):
            self._open(map_size, read_only)

    def _open(self, map_size: int, read_only: bool = False) -> None:
        self._env = lmdb.open(
            str(self.path),
            map_size=map_size,
            max_dbs=len(Table),
            max_readers=_READERS_MAX,
            max_spare_txns=8,
            meminit=False,
            mode=0o600,
            readonly=read_only,
            create=not read_only,
            lock=not read_only,  # Only under the store's own lock, so there is no writer to tell.
        )
        if not read_only:
            self._env.reader_check()
        self._tables: dict[Table, lmdb._Database] = {}
        try:
            for table in Table:
                # What is only looked at may lack a table: an older cachefs made it, and there is nothing in it.
                with suppress(*(lmdb.NotFoundError,) * read_only):
                    self._tables[table] = self._env.open_db(
                        table.name.lower().encode(),
                        dupsort=table is Table.DIGESTS,
                        dupfixed=table is Table.DIGESTS,
                        create=not read_only,
                    )
        except BaseException:
            self._env.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Snapshot]:
        """A snapshot for the length of a `with`, in which nothing awaits and nothing waits for the disk."""
        with self._in_use(), self._env.begin() as txn:
            yield Snapshot(txn, self._tables)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._gate:
            while self._closed:
                self._gate.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._gate:
                self._readers -= 1
                if self._closed:
                    self._gate.notify_all()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for all readers to be gone: a long one gives up now, and begins again."""
        return self._closed

    def commit(self, writes: WriteSet) -> None:
        """Makes `writes` durable, all or nothing. Raises OSError when the disk does not take them."""
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    self._apply(txn, writes)
                return
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:
                self._open_again_if_given_up()
                raise OSError(f"the index could not be written: {error}") from error

    def rewrite(self, changes: Callable[[Snapshot], Iterable[WriteSet]], cleared: Iterable[Table] = ()) -> None:
        """Makes all that `changes` yields durable in one transaction of any size: no set is kept once it was
        yielded. `changes` reads the state before, and is asked again when the map has to grow. The `cleared`
        tables are emptied first. Raises OSError when the disk does not take it, and nothing is changed then."""
        while True:
            try:
                with self.reading() as snapshot, self._env.begin(write=True) as txn:
                    for table in cleared:
                        txn.drop(self._tables[table], delete=False)
                    for writes in changes(snapshot):
                        self._apply(txn, writes)
                return
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:
                self._open_again_if_given_up()
                raise OSError(f"the index could not be written: {error}") from error

    def _apply(self, txn: lmdb.Transaction, writes: WriteSet) -> None:
        for table, records in writes.puts.items():
            db = self._tables[table]
            for key in sorted(records):
                record = records[key]
                if record is None:
                    txn.delete(key, db=db)
                else:
                    txn.put(key, record, db=db)
        for table, prefix in writes.prefixes_removed:
            cursor = txn.cursor(self._tables[table])
            while cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix):
                cursor.delete()
        digests = self._tables[Table.DIGESTS]
        for digest, chunk in self._trimmed_between(writes.digests_removed):
            txn.delete(digest, f.chunk_key(chunk), db=digests)
        for digest, chunk in self._trimmed_between(writes.digests_added):
            txn.put(digest, f.chunk_key(chunk), db=digests)

    def _trimmed_between(self, pairs: Iterable[tuple[bytes, ChunkId]]) -> Iterator[tuple[bytes, ChunkId]]:
        """Each lies on another page of a large table, and touching one page maps sixteen."""
        for done, pair in enumerate(pairs, 1):
            yield pair
            if done % TRIM_DIGESTS == 0:
                self.trim()

    def _grow(self) -> None:
        with self._alone():
            try:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)
            except lmdb.Error as error:
                raise OSError(f"the index cannot grow: {error}") from error

    def _open_again_if_given_up(self) -> None:
        """A commit that fails at its last write leaves LMDB refusing everything, reads too, until the environment
        is opened anew: the commit before it stands then."""
        try:
            self._env.begin().abort()
        except lmdb.Error:
            with self._alone():
                map_size = self.map_size
                self._env.close()
                try:
                    self._open(map_size)
                except lmdb.Error as error:
                    raise OSError(f"the index cannot be opened again: {error}") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no transaction is open. For the one who commits."""
        with self._gate:
            self._closed = True
            while self._readers:
                self._gate.wait()
            try:
                yield
            finally:
                self._trimmed_at = None
                self._closed = False
                self._gate.notify_all()

    def trim(self) -> None:
        """Lets the process forget which pages of the map it has touched: they stay in the kernel's cache, and
        count as this process's memory again only when they are looked at. Otherwise the index of a large store
        would count whole, sooner or later. From any thread."""
        with self._in_use():  # So long the map stays where it is.
            if self._trimmed_at is None:
                self._trimmed_at = _mapping_of(self.path / "data.mdb")
            start, length = self._trimmed_at
            if length:
                _libc.madvise(start, length, _MADV_DONTNEED)

    def blocks_bytes(self) -> int:
        """What the index occupies on its filesystem."""
        return (self.path / "data.mdb").stat().st_blocks * 512

    @property
    def map_size(self) -> int:
        return int(self._env.info()["map_size"])

    def close(self) -> None:
        self._env.close()
