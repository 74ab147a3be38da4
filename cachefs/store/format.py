"""What is on disk: every key and record of format 1, encoded and decoded. Rule: nothing here opens anything.

`docs/format.md` is this module in prose, and `tests/test_format.py` holds both to golden bytes: a change of
any of them is a new FORMAT. Keys are big-endian, so that LMDB keeps them in the order of their numbers;
records are little-endian. Every record ends with a seal, the xxh3_64 of its table, its key and its payload,
because LMDB 0.9 checks none of its pages: a rotten or misplaced record is found when it is read.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, NewType
from uuid import UUID

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from cachefs.errors import RecordCorrupt, StoreFormat
from cachefs.plan.extents import PAGE

FORMAT = 1
MAGIC = b"cachefs\0"

SPAN_SIZE_DEFAULT = 4 << 20
SPAN_SIZE_MIN, SPAN_SIZE_MAX = 1 << 20, 64 << 20

# One file of a store: small enough that a filesystem deletes or copies one in no time, large enough that a
# store of 10 TiB has 10,000 of them open.
SEGMENT_SIZE = 1 << 30

ViewNo = NewType("ViewNo", int)
SpanNo = NewType("SpanNo", int)
ChunkId = NewType("ChunkId", int)
SegmentNo = NewType("SegmentNo", int)  # From 1; 0 is no segment.


class Table(IntEnum):
    """The named databases of the index; the number is what a seal covers."""

    META = 1
    IMAGES = 2
    VIEWS = 3
    SPANS = 4
    CHUNKS = 5
    DIGESTS = 6
    SEGMENTS = 7
    PUNCHES = 8
    USES = 9
    LEASES = 10


# ── Seals ─────────────────────────────────────────────────────────────────────────────────────────────

SEAL_BYTES = 8


def seal(table: Table, key: bytes, payload: bytes) -> bytes:
    """`payload` with its seal behind it."""
    return payload + xxh3_64_intdigest(bytes((table,)) + key + payload).to_bytes(SEAL_BYTES, "little")


def unseal(table: Table, key: bytes, record: bytes) -> bytes:
    """The payload of `record`. Raises RecordCorrupt when the seal is not its own."""
    payload = record[:-SEAL_BYTES]
    if seal(table, key, payload) != record:
        raise RecordCorrupt(table.name.lower(), key)
    return payload


# ── meta ──────────────────────────────────────────────────────────────────────────────────────────────

STORE_KEY = b"store"
COUNTERS_KEY = b"counters"
# Magic and format stand first in every format there will ever be, so that any version can refuse any other.
_STORE_HEAD = struct.Struct("<8sI")
_STORE = struct.Struct("<8sII16s")
_COUNTERS = struct.Struct("<QII")


class StoreRecord(NamedTuple):
    """What a store is, written once when it is made. `span_size` in bytes, a power of two."""

    span_size: int
    uuid: UUID

    def encode(self) -> bytes:
        return seal(Table.META, STORE_KEY, _STORE.pack(MAGIC, FORMAT, self.span_size, self.uuid.bytes))

    @classmethod
    def decode(cls, record: bytes, path: str) -> StoreRecord:
        """Raises StoreFormat for what is no store of this format (`path` is only named in the error)."""
        if len(record) < _STORE_HEAD.size or record[: len(MAGIC)] != MAGIC:
            raise StoreFormat(path, "this is not a cachefs store")
        found = _STORE_HEAD.unpack_from(record)[1]
        if found != FORMAT:
            advice = "upgrade cachefs, or use another path" if found > FORMAT else "use another path"
            raise StoreFormat(path, f"it has format {found}; this cachefs reads format {FORMAT}: {advice}")
        _, _, span_size, uuid = _STORE.unpack(unseal(Table.META, STORE_KEY, record))
        return cls(span_size, UUID(bytes=uuid))


class Counters(NamedTuple):
    """The next number that was never given: numbers are not given twice in the life of a store."""

    chunk: int = 1
    view: int = 1
    image: int = 1

    def encode(self) -> bytes:
        return seal(Table.META, COUNTERS_KEY, _COUNTERS.pack(*self))

    @classmethod
    def decode(cls, record: bytes) -> Counters:
        return cls(*_COUNTERS.unpack(unseal(Table.META, COUNTERS_KEY, record)))


# ── scrub ─────────────────────────────────────────────────────────────────────────────────────────────

SCRUB_KEY = b"scrub"
_SCRUB = struct.Struct("<QQddQQQQ")


class ScrubRecord(NamedTuple):
    """How far the scrubber is. A run goes over the chunks with `next_chunk` <= id < `end_chunk`; both 0 when
    none is under way. Times are seconds since 1970, 0 for never; counts are those of the run that is under
    way, or of the last one."""

    next_chunk: int = 0
    end_chunk: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    verified_bytes: int = 0
    rotten: int = 0
    healed: int = 0
    lost: int = 0

    def encode(self) -> bytes:
        return seal(Table.META, SCRUB_KEY, _SCRUB.pack(*self))

    @classmethod
    def decode(cls, record: bytes) -> ScrubRecord:
        return cls(*_SCRUB.unpack(unseal(Table.META, SCRUB_KEY, record)))


# ── images ────────────────────────────────────────────────────────────────────────────────────────────


def image_key(image: str) -> bytes:
    return UUID(image).bytes


def encode_image(image: str, fields: dict[str, Any]) -> bytes:
    """`fields` is what `catalog` knows of the image, as JSON: read whole, never searched."""
    payload = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
    return seal(Table.IMAGES, image_key(image), payload)


def decode_image(key: bytes, record: bytes) -> tuple[str, dict[str, Any]]:
    try:
        return str(UUID(bytes=key)), dict(json.loads(unseal(Table.IMAGES, key, record)))
    except ValueError:
        raise RecordCorrupt("images", key) from None


# ── views ─────────────────────────────────────────────────────────────────────────────────────────────


class ViewKind(IntEnum):
    """0: the image is gone, and its id is not this view's any more. 1 is Glance's bytes; 2 (the guest disk inside)
    and 3 (resized) are kept for their own views."""

    ENDED = 0
    ORIGINAL = 1
    RAW = 2
    RESIZED = 3


class OriginMode(IntEnum):
    """How the origin gives an image's bytes; found out by asking, and remembered."""

    UNKNOWN = 0
    RANGES = 1
    STREAM = 2


_VIEW = struct.Struct("<16sBBHQQ")


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One presentation of an image. `size` and `cached` in bytes; `cached` counts the whole pages that are
    present, cut at `size`, and equals what the view's recipes say."""

    image: str
    kind: ViewKind
    size: int
    cached: int = 0
    origin: OriginMode = OriginMode.UNKNOWN

    def with_cached(self, cached: int) -> ViewRecord:
        return replace(self, cached=cached)

    def encode(self, view: ViewNo) -> bytes:
        return seal(
            Table.VIEWS,
            view_key(view),
            _VIEW.pack(UUID(self.image).bytes, self.kind, self.origin, 0, self.size, self.cached),
        )

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> ViewRecord:
        image, kind, origin, _, size, cached = _VIEW.unpack(unseal(Table.VIEWS, key, record))
        return cls(str(UUID(bytes=image)), ViewKind(kind), size, cached, OriginMode(origin))


def view_key(view: ViewNo) -> bytes:
    return view.to_bytes(4, "big")


# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────

_SPAN_KEY = struct.Struct(">II")


class Kind(IntEnum):
    """What a recipe's entry stands for."""

    ABSENT = 0
    HOLE = 1
    CHUNK = 2


class Entry(NamedTuple):
    """`pages` pages of a span. `chunk` is 0 unless `kind` is CHUNK."""

    kind: Kind
    pages: int
    chunk: ChunkId


Recipe = tuple[Entry, ...]
"""The entries of one span, in order; they cover it without a gap. Neighbours that are both ABSENT or both
HOLE are one entry."""

_ENTRY_ID_BITS, _ENTRY_PAGE_BITS = 46, 16
_ID_MASK, _PAGES_MASK = (1 << _ENTRY_ID_BITS) - 1, (1 << _ENTRY_PAGE_BITS) - 1


def span_key(view: ViewNo, span: SpanNo) -> bytes:
    return _SPAN_KEY.pack(view, span)


def split_span_key(key: bytes) -> tuple[ViewNo, SpanNo]:
    view, span = _SPAN_KEY.unpack(key)
    return ViewNo(view), SpanNo(span)


def encode_recipe(key: bytes, recipe: Recipe) -> bytes:
    words = [(e.kind << 62) | (e.pages << _ENTRY_ID_BITS) | e.chunk for e in recipe]
    return seal(Table.SPANS, key, struct.pack(f"<{len(words)}Q", *words))


def decode_recipe(key: bytes, record: bytes) -> Recipe:
    payload = unseal(Table.SPANS, key, record)
    words = struct.unpack(f"<{len(payload) // 8}Q", payload)
    return tuple(Entry(Kind(w >> 62), (w >> _ENTRY_ID_BITS) & _PAGES_MASK, ChunkId(w & _ID_MASK)) for w in words)


# ── chunks and digests ────────────────────────────────────────────────────────────────────────────────

_CHUNK = struct.Struct("<IIHHI16s")
_CHUNK_KEY = struct.Struct(">Q")
ROTTEN = 1  # Flag: the stored bytes were seen not to have the digest. Never read or shared again.


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk's bytes are, and what they hash to. `page` and `pages` count 4 KiB pages of the segment.
    `refs` is the number of recipe entries that name it, and at least 1 in a committed record."""

    segment: SegmentNo
    page: int
    pages: int
    digest: bytes
    refs: int
    flags: int = 0

    @property
    def offset(self) -> int:
        return self.page * PAGE

    @property
    def length(self) -> int:
        return self.pages * PAGE

    @property
    def rotten(self) -> bool:
        return bool(self.flags & ROTTEN)

    def with_refs(self, refs: int) -> Chunk:
        return replace(self, refs=refs)

    def encode(self, chunk: ChunkId) -> bytes:
        payload = _CHUNK.pack(self.segment, self.page, self.pages, self.flags, self.refs, self.digest)
        return seal(Table.CHUNKS, chunk_key(chunk), payload)

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> Chunk:
        segment, page, pages, flags, refs, digest = _CHUNK.unpack(unseal(Table.CHUNKS, key, record))
        return cls(SegmentNo(segment), page, pages, digest, refs, flags)


def segment_of(record: bytes) -> SegmentNo:
    """Where a chunk's record says that it lies. Unsealed: for looking over very many; decode what is believed."""
    return SegmentNo(int.from_bytes(record[:4], "little"))


def chunk_key(chunk: ChunkId) -> bytes:
    return _CHUNK_KEY.pack(chunk)


def split_chunk_key(key: bytes) -> ChunkId:
    return ChunkId(_CHUNK_KEY.unpack(key)[0])


def digest_of(data: memoryview | bytes | bytearray) -> bytes:
    """Finds candidates for sharing and detects rot; proves nothing (design §5): 16 bytes."""
    return xxh3_128_digest(data)


# ── segments and punches ──────────────────────────────────────────────────────────────────────────────

_SEGMENT = struct.Struct("<QQ")
_PUNCH_KEY = struct.Struct(">IQ")
_PUNCH = struct.Struct("<Q")


class SegmentRecord(NamedTuple):
    """`end`: what lies beyond was never committed. `live`: bytes of the chunks in it. Both in bytes."""

    end: int = 0
    live: int = 0

    def encode(self, segment: SegmentNo) -> bytes:
        return seal(Table.SEGMENTS, segment_key(segment), _SEGMENT.pack(*self))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> SegmentRecord:
        return cls(*_SEGMENT.unpack(unseal(Table.SEGMENTS, key, record)))


def segment_key(segment: SegmentNo) -> bytes:
    return segment.to_bytes(4, "big")


def segment_name(segment: SegmentNo) -> str:
    return f"{segment:010d}.seg"


class Punch(NamedTuple):
    """A note that these bytes of a segment are no chunk's any more and are to become a hole."""

    segment: SegmentNo
    offset: int
    length: int

    @property
    def key(self) -> bytes:
        return _PUNCH_KEY.pack(self.segment, self.offset)

    def encode(self) -> bytes:
        return seal(Table.PUNCHES, self.key, _PUNCH.pack(self.length))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> Punch:
        segment, offset = _PUNCH_KEY.unpack(key)
        return cls(SegmentNo(segment), offset, _PUNCH.unpack(unseal(Table.PUNCHES, key, record))[0])


# ── uses and leases ───────────────────────────────────────────────────────────────────────────────────

USES_SPANS = 256  # Spans in one record of uses.
_USES_KEY = struct.Struct(">II")
_USES = struct.Struct(f"<{USES_SPANS}I{USES_SPANS}B")


class UseFlag(IntFlag):
    """What is known of a span besides when it was last read."""

    TWICE = 1  # Read again some time after it came: not just passed over once.
    BOOT = 2  # Among the first that were read at random after the image was opened.


class UsesRecord(NamedTuple):
    """Of `USES_SPANS` neighbouring spans of a view: when each was last read (seconds since 1970, 0 when it is
    not here), and its `UseFlag`s. A hint for eviction, and no more: it may lag behind, or be lost."""

    last_s: tuple[int, ...]
    flags: tuple[int, ...]

    def encode(self, key: bytes) -> bytes:
        return seal(Table.USES, key, _USES.pack(*self.last_s, *self.flags))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> UsesRecord:
        values = _USES.unpack(unseal(Table.USES, key, record))
        return cls(values[:USES_SPANS], values[USES_SPANS:])


def uses_key(view: ViewNo, group: int) -> bytes:
    """`group` is the number of the first span divided by USES_SPANS."""
    return _USES_KEY.pack(view, group)


def split_uses_key(key: bytes) -> tuple[ViewNo, int]:
    view, group = _USES_KEY.unpack(key)
    return ViewNo(view), group


class LeaseReason(IntEnum):
    """Why an image may not be evicted, where that outlives the daemon. (An open handle does not.) 2 and 3 are kept
    for a recent touch and for a disk that names the image."""

    PIN = 1


_LEASE = struct.Struct("<dd")


class LeaseRecord(NamedTuple):
    """A lease that outlives the daemon: seconds since 1970; `until_s` 0 for no end."""

    since_s: float
    until_s: float = 0.0

    def encode(self, key: bytes) -> bytes:
        return seal(Table.LEASES, key, _LEASE.pack(*self))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> LeaseRecord:
        return cls(*_LEASE.unpack(unseal(Table.LEASES, key, record)))


def lease_key(image: str, reason: LeaseReason) -> bytes:
    return UUID(image).bytes + bytes((reason,))


def split_lease_key(key: bytes) -> tuple[str, LeaseReason]:
    """Raises ValueError for a reason of a later cachefs: to be left alone."""
    return str(UUID(bytes=key[:16])), LeaseReason(key[16])
