"""A store with millions of chunks, made in minutes: every record as cachefs writes it, and segments that are
sparse from end to end. Rule: what is packed here by itself, to be fast, is compared with `cachefs.store.format`.

Nothing is shared: chunks of 16 pages on average, 64 in a span, 1024 spans in an image. No two that follow each
other in an image do so in a segment, so no map is smaller than it could be. One span in 16, chosen at random, can
be read: its chunks are zeros, as the holes are that they lie in (cachefs itself never stores zeros). The digests
of all others are random, as real ones are.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from uuid import UUID

import lmdb
from xxhash import xxh3_64_digest, xxh3_128_digest

from cachefs.catalog import Image, from_glance
from cachefs.plan.extents import PAGE
from cachefs.store import format as f
from cachefs.store.format import Chunk, ChunkId, Entry, Kind, SegmentNo, SpanNo, Table, ViewNo
from cachefs.store.recover import open_store
from tests.origin import OriginImage, pattern

# Pages of the eight chunks of a group; 128 in all.
GROUP = (4, 28, 8, 24, 16, 16, 12, 20)
GROUP_PAGES = sum(GROUP)
STARTS = tuple(accumulate(GROUP, initial=0))[:-1]
SPAN_SIZE = 4 << 20
SPAN_PAGES = SPAN_SIZE // PAGE
SPAN_CHUNKS = SPAN_PAGES // GROUP_PAGES * len(GROUP)
IMAGE_SPANS = 1024
IMAGE_SIZE = IMAGE_SPANS * SPAN_SIZE
IMAGE_CHUNKS = IMAGE_SPANS * SPAN_CHUNKS
SEGMENT_GROUPS = f.SEGMENT_SIZE // PAGE // GROUP_PAGES
SEGMENT_CHUNKS = SEGMENT_GROUPS * len(GROUP)
READABLE_ONE_IN = 16
# Coprime to every number of chunks that there can be: the order of digests has nothing to do with that of chunks.
STRIDE = 2654435761
BATCH = 1 << 16
MAP_SIZE = 16 << 30
_CHUNK = struct.Struct("<IIHHI16s")


@dataclass(frozen=True)
class BigStore:
    """What is to be in it: `images` whole ones."""

    images: int
    seed: int = 1

    @property
    def chunks(self) -> int:
        return self.images * IMAGE_CHUNKS

    @property
    def segments(self) -> int:
        return self.chunks // SEGMENT_CHUNKS

    def image_id(self, number: int) -> str:
        return str(UUID(int=number << 64 | 1))

    @cached_property
    def origin_images(self) -> list[OriginImage]:
        """What Glance has."""
        content = pattern(IMAGE_SIZE)
        return [
            OriginImage(self.image_id(n), f"image-{n}", IMAGE_SIZE, content) for n in range(1, self.images + 1)
        ]

    @cached_property
    def readable(self) -> list[tuple[str, int]]:
        """(image, span) of what can be read, in no order; one of every 16 neighbours."""
        found = [(self.image_id(n // IMAGE_SPANS + 1), n % IMAGE_SPANS) for n in sorted(self._readable)]
        random.Random(self.seed).shuffle(found)
        return found

    @cached_property
    def _readable(self) -> frozenset[int]:
        rng = random.Random(self.seed)
        spans = self.images * IMAGE_SPANS
        return frozenset(first + rng.randrange(READABLE_ONE_IN) for first in range(0, spans, READABLE_ONE_IN))

    # ── making it ──

    def make(self, folder: Path, say: Callable[[str], None]) -> None:
        open_store(folder, SPAN_SIZE).close()
        self._make_segments(folder / "segments")
        env = lmdb.open(str(folder / "index"), map_size=MAP_SIZE, max_dbs=len(Table), sync=False, metasync=False)
        try:
            for table, records in (
                (Table.CHUNKS, self._chunks()),
                (Table.DIGESTS, self._digests()),
                (Table.SPANS, self._spans()),
                (Table.USES, self._uses()),
                (Table.VIEWS, self._views()),
                (Table.SEGMENTS, self._segments()),
            ):
                began_s = time.monotonic()
                self._append(env, table, records)
                say(f"big store: {table.name.lower()} in {time.monotonic() - began_s:.0f} s")
            self._put_rest(env)
            env.sync(True)
        finally:
            env.close()

    def _append(self, env: lmdb.Environment, table: Table, records: Iterator[tuple[bytes, bytes]]) -> None:
        """The records in the order of their keys."""
        db = _open_table(env, table)
        while batch := list(islice(records, BATCH)):
            with env.begin(write=True) as txn:
                txn.cursor(db).putmulti(batch, append=True)

    def _put_rest(self, env: lmdb.Environment) -> None:
        """What has few records, or none that are in order."""
        with env.begin(write=True) as txn:
            db = _open_table(env, Table.IMAGES, txn)
            for number, origin in enumerate(self.origin_images, start=1):
                known = from_glance(origin.shown(), number)
                assert isinstance(known, Image)
                fields = asdict(known)
                del fields["id"]
                txn.put(f.image_key(origin.id), f.encode_image(origin.id, fields), db=db)
            counters = f.Counters(self.chunks + 1, self.images + 1, self.images + 1)
            txn.put(f.COUNTERS_KEY, counters.encode(), db=_open_table(env, Table.META, txn))
            digests = _open_table(env, Table.DIGESTS, txn)
            for chunk in self._readable_chunks():
                txn.put(self._digest(chunk), f.chunk_key(chunk), db=digests)

    def _make_segments(self, folder: Path) -> None:
        for number in range(1, self.segments + 1):
            path = folder / f.segment_name(SegmentNo(number))
            path.touch(0o600)
            os.truncate(path, f.SEGMENT_SIZE)

    # ── what a chunk is ──

    def _readable_chunks(self) -> Iterator[ChunkId]:
        for span in sorted(self._readable):
            yield from map(ChunkId, range(span * SPAN_CHUNKS + 1, (span + 1) * SPAN_CHUNKS + 1))

    def _digest(self, chunk: ChunkId) -> bytes:
        number = chunk - 1
        if number // SPAN_CHUNKS in self._readable:
            return _ZEROS[number % len(GROUP)]
        return self._ranked(number * STRIDE % self.chunks, number)

    def _ranked(self, rank: int, number: int) -> bytes:
        return (rank * (1 << 32) // self.chunks).to_bytes(4, "big") + xxh3_128_digest(number.to_bytes(8, "big"))[
            :12
        ]

    # ── tables, in the order of their keys ──

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        table, pack, places = bytes((Table.CHUNKS,)), _CHUNK.pack, _places()
        for segment in range(1, self.segments + 1):
            first = (segment - 1) * SEGMENT_CHUNKS + 1
            for chunk, (page, pages) in enumerate(places, start=first):
                key = chunk.to_bytes(8, "big")
                payload = pack(segment, page, pages, 0, 1, self._digest(ChunkId(chunk)))
                yield key, payload + xxh3_64_digest(table + key + payload)[::-1]
            record = Chunk(SegmentNo(segment), page, pages, self._digest(ChunkId(chunk)), 1).encode(ChunkId(chunk))
            assert record == payload + xxh3_64_digest(table + key + payload)[::-1], "the format has changed"

    def _digests(self) -> Iterator[tuple[bytes, bytes]]:
        """Those that are no zeros'."""
        back = pow(STRIDE, -1, self.chunks)
        readable = self._readable
        for rank in range(self.chunks):
            number = rank * back % self.chunks
            if number // SPAN_CHUNKS not in readable:
                yield self._ranked(rank, number), (number + 1).to_bytes(8, "big")

    def _spans(self) -> Iterator[tuple[bytes, bytes]]:
        chunk = 1
        for view in range(1, self.images + 1):
            for span in range(IMAGE_SPANS):
                key = f.span_key(ViewNo(view), SpanNo(span))
                pages = GROUP * (SPAN_CHUNKS // len(GROUP))
                recipe = tuple(Entry(Kind.CHUNK, n, ChunkId(chunk + i)) for i, n in enumerate(pages))
                chunk += SPAN_CHUNKS
                yield key, f.encode_recipe(key, recipe)

    def _uses(self) -> Iterator[tuple[bytes, bytes]]:
        rng, now_s = random.Random(self.seed), int(time.time())
        for view in range(1, self.images + 1):
            for group in range(IMAGE_SPANS // f.USES_SPANS):
                key = f.uses_key(ViewNo(view), group)
                last_s = tuple(now_s - rng.randrange(90 * 86400) for _ in range(f.USES_SPANS))
                flags = tuple(rng.randrange(4) for _ in range(f.USES_SPANS))
                yield key, f.UsesRecord(last_s, flags).encode(key)

    def _views(self) -> Iterator[tuple[bytes, bytes]]:
        for number in map(ViewNo, range(1, self.images + 1)):
            record = f.ViewRecord(
                self.image_id(number), f.ViewKind.ORIGINAL, IMAGE_SIZE, IMAGE_SIZE, f.OriginMode.RANGES
            )
            yield f.view_key(number), record.encode(number)

    def _segments(self) -> Iterator[tuple[bytes, bytes]]:
        for number in map(SegmentNo, range(1, self.segments + 1)):
            record = f.SegmentRecord(end=f.SEGMENT_SIZE, live=f.SEGMENT_SIZE)
            yield f.segment_key(number), record.encode(number)


_ZEROS = tuple(f.digest_of(bytes(pages * PAGE)) for pages in GROUP)


def _places() -> Sequence[tuple[int, int]]:
    """(page, pages) of the chunks of a segment: every one in its own place of another group."""
    return [
        ((group * 5 + place * 211) % SEGMENT_GROUPS * GROUP_PAGES + STARTS[place], GROUP[place])
        for group in range(SEGMENT_GROUPS)
        for place in range(len(GROUP))
    ]


def _open_table(env: lmdb.Environment, table: Table, txn: lmdb.Transaction | None = None) -> lmdb._Database:
    pairs = table is Table.DIGESTS
    return env.open_db(table.name.lower().encode(), txn=txn, dupsort=pairs, dupfixed=pairs)
