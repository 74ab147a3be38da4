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
from hashlib import blake2b
from typing import Any, NamedTuple, NewType
from uuid import UUID

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from cachefs.errors import RecordCorrupt, StoreFormat
from cachefs.plan.extents import BLOCK, PAGE

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
    PRECACHE = 11
    TRACES = 12
    BLOCK_DIGESTS = 13


# ── Seals ─────────────────────────────────────────────────────────────────────────────────────────────

SEAL_BYTES = 8


_TABLE_BYTES = {table: bytes((table,)) for table in Table}


def seal(table: Table, key: bytes, payload: bytes) -> bytes:
    """`payload` with its seal behind it."""
    return payload + xxh3_64_intdigest(_TABLE_BYTES[table] + key + payload).to_bytes(SEAL_BYTES, "little")


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


_KINDS = {int(kind): kind for kind in Kind}  # Asking the class takes ten times as long.


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
    """Raises RecordCorrupt; ValueError or struct.error for a sealed record that makes no sense."""
    payload = unseal(Table.SPANS, key, record)
    words = struct.unpack(f"<{len(payload) // 8}Q", payload)
    try:
        return tuple(
            Entry(_KINDS[w >> 62], (w >> _ENTRY_ID_BITS) & _PAGES_MASK, ChunkId(w & _ID_MASK)) for w in words
        )
    except KeyError as error:
        raise ValueError(f"a recipe's entry of kind {error}") from None


# ── chunks and digests ────────────────────────────────────────────────────────────────────────────────

_CHUNK = struct.Struct("<IIHHI16s")
_CHUNK_KEY = struct.Struct(">Q")
ROTTEN = 1  # Flag: the stored bytes were seen not to have the digest. Never read or shared again.


class Chunk(NamedTuple):
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
        return self._replace(refs=refs)

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
    BOOT = 2  # Holds blocks of the image's boot trace.


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
    """Why an image may not be evicted, where that outlives the daemon. (An open handle does not.)"""

    PIN = 1
    TOUCH = 2  # Of one file of the image: behind the UUID and this, which one.
    DISK = 3


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


_TOUCH_LEASE = struct.Struct("<qqd")
_TOUCH_FILE = struct.Struct(">BQ")


class TouchRecord(NamedTuple):
    """The times that somebody gave one file of an image, in nanoseconds since 1970, and for how many more seconds
    of a running daemon that is a lease: no clock can end it by being wrong."""

    atime_ns: int
    mtime_ns: int
    left_s: float

    def encode(self, key: bytes) -> bytes:
        return seal(Table.LEASES, key, _TOUCH_LEASE.pack(*self))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> TouchRecord:
        return cls(*_TOUCH_LEASE.unpack(unseal(Table.LEASES, key, record)))


_DISKS_LEASE = struct.Struct("<ddI")
_DISK = struct.Struct("<BQH")


class DiskEntry(NamedTuple):
    """An instance disk: its `path`; by which file of the image it names it; on which filesystem it was seen, as a
    number (0: not known)."""

    path: bytes
    kind: ViewKind
    place: int


class DisksRecord(NamedTuple):
    """Instance disks that name an image: `total` of them, since `since_s` (seconds since 1970); some of these are
    `disks`. For `left_s` more seconds of a running daemon this is a lease after the last of them is gone."""

    since_s: float
    left_s: float
    total: int
    disks: tuple[DiskEntry, ...]

    def encode(self, key: bytes) -> bytes:
        head = _DISKS_LEASE.pack(self.since_s, self.left_s, self.total)
        disks = (_DISK.pack(disk.kind, disk.place, len(disk.path)) + disk.path for disk in self.disks)
        return seal(Table.LEASES, key, head + b"".join(disks))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> DisksRecord:
        """Raises RecordCorrupt."""
        payload = unseal(Table.LEASES, key, record)
        try:
            since_s, left_s, total = _DISKS_LEASE.unpack_from(payload)
            at, disks = _DISKS_LEASE.size, []
            while at < len(payload):
                kind, place, length = _DISK.unpack_from(payload, at)
                at += _DISK.size + length
                disks.append(DiskEntry(payload[at - length : at], ViewKind(kind), place))
            if at != len(payload):
                raise ValueError
        except (ValueError, struct.error):
            raise RecordCorrupt("leases", key) from None
        return cls(since_s, left_s, total, tuple(disks))


def lease_key(image: str, reason: LeaseReason) -> bytes:
    return UUID(image).bytes + bytes((reason,))


def touch_key(image: str, kind: ViewKind, size: int) -> bytes:
    """`kind` is the folder of the file: ORIGINAL, RAW or RESIZED. `size` is 0 but for the last."""
    return lease_key(image, LeaseReason.TOUCH) + _TOUCH_FILE.pack(kind, size)


def split_touch_key(key: bytes) -> tuple[str, ViewKind, int]:
    """Raises ValueError or struct.error for what is none."""
    kind, size = _TOUCH_FILE.unpack(key[17:])
    return str(UUID(bytes=key[:16])), ViewKind(kind), size


def split_lease_key(key: bytes) -> tuple[str, LeaseReason]:
    """Raises ValueError for a reason of a later cachefs: to be left alone."""
    return str(UUID(bytes=key[:16])), LeaseReason(key[16])


# ── pre-caching ───────────────────────────────────────────────────────────────────────────────────────

_OPENS = struct.Struct("<dd")
_HOLD = struct.Struct("<BBd")


class PrecacheKind(IntEnum):
    """What a record of `precache` is: the first byte of its key, before the image's UUID."""

    OPENS = 1
    HOLD = 2  # And behind the UUID the name of a policy.


class OpensRecord(NamedTuple):
    """How often an image was opened here, as it was at `at_s` (seconds since 1970): `opens` halves in each
    week."""

    opens: float
    at_s: float

    def encode(self, key: bytes) -> bytes:
        return seal(Table.PRECACHE, key, _OPENS.pack(*self))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> OpensRecord:
        return cls(*_OPENS.unpack(unseal(Table.PRECACHE, key, record)))


class HoldRecord(NamedTuple):
    """What a policy decided of an image, and was done: `pinned` or only held; whether the reason was the word of
    the image's owner; since when (seconds since 1970), and why in words."""

    pinned: bool
    owners_word: bool
    since_s: float
    reason: str

    def encode(self, key: bytes) -> bytes:
        head = _HOLD.pack(self.pinned, self.owners_word, self.since_s)
        return seal(Table.PRECACHE, key, head + self.reason.encode(errors="replace"))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> HoldRecord:
        payload = unseal(Table.PRECACHE, key, record)
        pinned, owners_word, since_s = _HOLD.unpack_from(payload)
        return cls(bool(pinned), bool(owners_word), since_s, payload[_HOLD.size :].decode())


def opens_key(image: str) -> bytes:
    return bytes((PrecacheKind.OPENS,)) + UUID(image).bytes


def hold_key(image: str, policy: str) -> bytes:
    return bytes((PrecacheKind.HOLD,)) + UUID(image).bytes + policy.encode()


def split_precache_key(key: bytes) -> tuple[PrecacheKind, str, str]:
    """Kind, image, and policy ("" of an open). Raises ValueError for a kind of a later cachefs."""
    return PrecacheKind(key[0]), str(UUID(bytes=key[1:17])), key[17:].decode()


# ── traces ────────────────────────────────────────────────────────────────────────────────────────────

_TRACE = struct.Struct("<QddI")
_TRACE_RUN = struct.Struct("<IHHB")


class TraceRun(NamedTuple):
    """`blocks` blocks of a view from block `first` on, which were first touched one after the other, `at` tenths
    of a second after the image was opened. `age`: how many recordings since did not touch them."""

    first: int
    blocks: int
    at: int
    age: int = 0


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """A boot trace: what is read first of a view of `size` bytes, in the order of need. Times are seconds since
    1970: when it was last recorded, and last used. `recordings` went into it; 0: it was imported."""

    size: int
    recorded_s: float
    used_s: float
    recordings: int
    runs: tuple[TraceRun, ...]

    def encode(self, key: bytes) -> bytes:
        head = _TRACE.pack(self.size, self.recorded_s, self.used_s, self.recordings)
        return seal(Table.TRACES, key, head + b"".join(_TRACE_RUN.pack(*run) for run in self.runs))

    @classmethod
    def decode(cls, key: bytes, record: bytes) -> TraceRecord:
        payload = unseal(Table.TRACES, key, record)
        runs = tuple(TraceRun(*values) for values in _TRACE_RUN.iter_unpack(payload[_TRACE.size :]))
        size, recorded_s, used_s, recordings = _TRACE.unpack(payload[: _TRACE.size])
        return cls(size, recorded_s, used_s, recordings, runs)


def trace_key(content: str, kind: ViewKind) -> bytes:
    """`content` names the bytes of an image: by their hash, or by its id where that is not known."""
    return bytes((kind,)) + content.encode("ascii")


def split_trace_key(key: bytes) -> tuple[str, ViewKind]:
    """Raises ValueError for what is none."""
    if not key:
        raise ValueError("an empty key")
    return key[1:].decode("ascii"), ViewKind(key[0])


# ── digests of blocks ─────────────────────────────────────────────────────────────────────────────────

BLOCK_DIGEST_BYTES = 16
_MARK = struct.Struct("<Q")


def block_digests(data: memoryview | bytes | bytearray) -> bytes:
    """One digest after the other of the blocks of `data`, the last of which may be cut short: BLAKE2b, because an
    image must not be able to have another one's bytes taken for its own. A millisecond for a MiB: for a thread."""
    blocks = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
    return b"".join(blake2b(block, digest_size=BLOCK_DIGEST_BYTES).digest() for block in blocks)


_ZERO_BLOCK = block_digests(bytes(BLOCK))


def encode_block_digests(key: bytes, digests: bytes) -> bytes:
    """The digests of a span's blocks, in order; nothing where all of them are whole blocks of zeros. `key` is the
    span's."""
    zeros = digests == _ZERO_BLOCK * (len(digests) // BLOCK_DIGEST_BYTES)
    return seal(Table.BLOCK_DIGESTS, key, b"" if zeros else digests)


def decode_block_digests(key: bytes, record: bytes, blocks: int) -> bytes:
    """Of a span of so many blocks. Raises RecordCorrupt also for those of another number."""
    digests = unseal(Table.BLOCK_DIGESTS, key, record) or _ZERO_BLOCK * blocks
    if len(digests) != blocks * BLOCK_DIGEST_BYTES:
        raise RecordCorrupt(Table.BLOCK_DIGESTS.name.lower(), key)
    return digests


def encode_digests_mark(view: ViewNo, size: int) -> bytes:
    """Under the view's own key: all of its `size` bytes were compared with Glance's hash when the digests of its
    spans were made. Without it none of them is believed."""
    return seal(Table.BLOCK_DIGESTS, view_key(view), _MARK.pack(size))


def decode_digests_mark(key: bytes, record: bytes) -> int:
    """The view's size. Raises RecordCorrupt."""
    payload = unseal(Table.BLOCK_DIGESTS, key, record)
    if len(payload) != _MARK.size:
        raise RecordCorrupt(Table.BLOCK_DIGESTS.name.lower(), key)
    return int(_MARK.unpack(payload)[0])
