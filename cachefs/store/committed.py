"""What the last commit made durable, as the ledger asks for it. Rule: it only reads, and a record that cannot be
decoded fails nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cachefs import logs
from cachefs.errors import RecordCorrupt
from cachefs.store import format as f
from cachefs.store.format import SpanNo, Table, ViewNo
from cachefs.store.index import Index, Snapshot

log = logs.get(__name__)


class CommittedIndex:
    """The index as the ledger sees it: one short snapshot a look-up, or one for all look-ups of a batch. What
    cannot be decoded is not there: it will be fetched again."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._batch = threading.local()
        self._repeats = logs.Repeats(log)  # Whoever looks a record up says it.

    @contextmanager
    def batch(self) -> Iterator[None]:
        """All look-ups of this thread see one commit until the `with` ends."""
        with self._index.reading() as snapshot:
            self._batch.snapshot = snapshot
            try:
                yield
            finally:
                self._batch.snapshot = None

    @contextmanager
    def _reading(self) -> Iterator[Snapshot]:
        snapshot: Snapshot | None = getattr(self._batch, "snapshot", None)
        if snapshot is not None:
            yield snapshot
            return
        with self._index.reading() as own:
            yield own

    def recipe(self, view: ViewNo, span: SpanNo) -> f.Recipe | None:
        with self._reading() as snapshot:
            try:
                return snapshot.recipe(view, span)
            except RecordCorrupt as error:
                self._repeats.error("recipe", "%s: taken for absent", error)
                return None

    def chunk(self, chunk: f.ChunkId) -> f.Chunk | None:
        with self._reading() as snapshot:
            record = snapshot.get(Table.CHUNKS, f.chunk_key(chunk))
        return None if record is None else self.decode(chunk, record)

    def chunks(self, chunks: Sequence[f.ChunkId]) -> dict[f.ChunkId, f.Chunk]:
        return {
            chunk: found
            for chunk, record in self.chunk_records(chunks)
            if (found := self.decode(chunk, record)) is not None
        }

    def chunk_records(self, chunks: Sequence[f.ChunkId]) -> list[tuple[f.ChunkId, bytes]]:
        with self._reading() as snapshot:
            return snapshot.chunks(chunks)

    def decode(self, chunk: f.ChunkId, record: bytes) -> f.Chunk | None:
        try:
            return f.Chunk.decode(f.chunk_key(chunk), record)
        except RecordCorrupt as error:
            self._repeats.error("chunk", "%s: taken for lost", error)
            return None

    def candidates(self, digest: bytes, most: int) -> list[f.ChunkId]:
        with self._reading() as snapshot:
            return snapshot.candidates(digest, most)

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        with self._reading() as snapshot:
            return snapshot.known(digests)
