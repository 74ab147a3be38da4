"""Format 1, byte for byte. A test here that fails says: this is another format, give it another number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from cachefs.catalog import Image
from cachefs.errors import RecordCorrupt, StoreFormat
from cachefs.plan.extents import BLOCK
from cachefs.store import format as f
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Counters,
    DiskEntry,
    DisksRecord,
    Entry,
    HoldRecord,
    Kind,
    LeaseReason,
    LeaseRecord,
    OpensRecord,
    OriginMode,
    PrecacheKind,
    Punch,
    ScrubRecord,
    SegmentNo,
    SegmentRecord,
    SpanNo,
    StoreRecord,
    Table,
    TouchRecord,
    TraceRecord,
    TraceRun,
    UseFlag,
    UsesRecord,
    ViewKind,
    ViewNo,
    ViewRecord,
)

IMAGE = "00112233-4455-6677-8899-aabbccddeeff"
STORE = StoreRecord(4 << 20, UUID(IMAGE))
COUNTERS = Counters(0x0102030405060708, 0x090A0B0C, 0x0D0E0F10)
FIELDS: dict[str, Any] = {"number": 3, "name": "Débian"}
DESCRIBED = {
    k: v
    for k, v in Image(
        IMAGE, 3, 0, "", "x", created_s=5, hidden=True, tags=("a", "b"),
        properties=(("cachefs_precache", "pin"), ("os_distro", "ubuntu")),
    ).to_fields().items()
    if v and k != "disk"
}  # fmt: skip
VIEW_NO = ViewNo(0x01020304)
VIEW = ViewRecord(IMAGE, ViewKind.RAW, 0x0102030405060708, 0x1112, OriginMode.STREAM)
SPAN_KEY = f.span_key(VIEW_NO, SpanNo(0x05060708))
RECIPE = (
    Entry(Kind.ABSENT, 3, ChunkId(0)),
    Entry(Kind.HOLE, 0x1234, ChunkId(0)),
    Entry(Kind.CHUNK, 64, ChunkId(0x2ABBCCDDEEFF)),
)
CHUNK_ID = ChunkId(0x0102030405060708)
CHUNK = Chunk(SegmentNo(0x01020304), 0x05060708, 0x40, bytes(range(16)), 0x090A0B0C, f.ROTTEN)
SEGMENT_NO = SegmentNo(0x01020304)
SEGMENT = SegmentRecord(0x0102030405060708, 0x1112131415161718)
PUNCH = Punch(SegmentNo(0x01020304), 0x05060708090A0B0C, 0x1000)
SCRUB = ScrubRecord(0x0102030405060708, 0x1112131415161718, 1.5, -2.25, 3, 4, 5, 6)
USES_KEY = f.uses_key(VIEW_NO, 0x05060708)
USES = UsesRecord((0x01020304, *[0] * (f.USES_SPANS - 1)), (*[0] * (f.USES_SPANS - 1), 3))
LEASE_KEY = f.lease_key(IMAGE, LeaseReason.PIN)
LEASE = LeaseRecord(1.5, 0.0)
TOUCH_KEY = f.touch_key(IMAGE, ViewKind.RESIZED, 0x0102030405060708)
TOUCH = TouchRecord(0x0102030405060708, -2, 1.5)
DISKS_KEY = f.lease_key(IMAGE, LeaseReason.DISK)
DISKS = DisksRecord(
    1.5,
    -2.25,
    0x01020304,
    (DiskEntry(b"/a/\xff", ViewKind.RAW, 0x1112131415161718), DiskEntry(b"/b", ViewKind.ORIGINAL, 0)),
)
OPENS_KEY = f.opens_key(IMAGE)
OPENS = OpensRecord(2.5, 1.5)
BLOCKS = f.block_digests(b"a" * BLOCK + b"b" * 100)
ZEROS = f.block_digests(bytes(2 * BLOCK))
HOLD_KEY = f.hold_key(IMAGE, "most-used")
HOLD = HoldRecord(True, False, 1.5, "the néwest")
TRACE_KEY = f.trace_key("sha256:" + "ab" * 32, ViewKind.RAW)
TRACE = TraceRecord(
    0x0102030405060708, 1.5, -2.25, 3, (TraceRun(0x01020304, 0x0506, 0x0708, 9), TraceRun(1, 2, 3))
)

Golden = tuple[Table, str, str, bytes, bytes]

# Table, key, record, and what the code makes of the sample.
RECORDS: dict[str, Golden] = {
    "store": (
        Table.META,
        b"store".hex(),
        "6361636865667300010000000000400000112233445566778899aabbccddeefffdd17ce8587ec612",
        f.STORE_KEY,
        STORE.encode(),
    ),
    "counters": (
        Table.META,
        b"counters".hex(),
        "08070605040302010c0b0a09100f0e0d1076bdeca099be80",
        f.COUNTERS_KEY,
        COUNTERS.encode(),
    ),
    "image": (
        Table.IMAGES,
        "00112233445566778899aabbccddeeff",
        b'{"name":"D\\u00e9bian","number":3}'.hex() + "4fadb5807141a702",
        f.image_key(IMAGE),
        f.encode_image(IMAGE, FIELDS),
    ),
    "described image": (
        Table.IMAGES,
        "00112233445566778899aabbccddeeff",
        (
            b'{"created_s":5,"hidden":true,"name":"x","number":3,'
            b'"properties":{"cachefs_precache":"pin","os_distro":"ubuntu"},"tags":["a","b"]}'
        ).hex()
        + "ec36d61e34605273",
        f.image_key(IMAGE),
        f.encode_image(IMAGE, DESCRIBED),
    ),
    "view": (
        Table.VIEWS,
        "01020304",
        "00112233445566778899aabbccddeeff0202000008070605040302011211000000000000d957bd60798d0faf",
        f.view_key(VIEW_NO),
        VIEW.encode(VIEW_NO),
    ),
    "recipe": (
        Table.SPANS,
        "0102030405060708",
        "0000000000c000000000000000008d44ffeeddccbb2a1080269d3a0ae397e991",
        SPAN_KEY,
        f.encode_recipe(SPAN_KEY, RECIPE),
    ),
    "chunk": (
        Table.CHUNKS,
        "0102030405060708",
        "0403020108070605400001000c0b0a09000102030405060708090a0b0c0d0e0f5e20ea71b48abf2f",
        f.chunk_key(CHUNK_ID),
        CHUNK.encode(CHUNK_ID),
    ),
    "segment": (
        Table.SEGMENTS,
        "01020304",
        "08070605040302011817161514131211f032f99f67ab82d0",
        f.segment_key(SEGMENT_NO),
        SEGMENT.encode(SEGMENT_NO),
    ),
    "punch": (
        Table.PUNCHES,
        "0102030405060708090a0b0c",
        "00100000000000005d747cc80be931ed",
        PUNCH.key,
        PUNCH.encode(),
    ),
    "scrub": (
        Table.META,
        b"scrub".hex(),
        "08070605040302011817161514131211000000000000f83f00000000000002c0030000000000000004000000000000000500000000000000060000000000000023247bccf8e33af6",
        f.SCRUB_KEY,
        SCRUB.encode(),
    ),
    "uses": (
        Table.USES,
        "0102030405060708",
        "04030201" + "00" * 1275 + "03" + "1b3c09c97366ab6c",
        USES_KEY,
        USES.encode(USES_KEY),
    ),
    "lease": (
        Table.LEASES,
        "00112233445566778899aabbccddeeff01",
        "000000000000f83f0000000000000000efc0a72b72e673ae",
        LEASE_KEY,
        LEASE.encode(LEASE_KEY),
    ),
    "touch": (
        Table.LEASES,
        "00112233445566778899aabbccddeeff02030102030405060708",
        "0807060504030201feffffffffffffff000000000000f83f" + "ff78850eb857c5e5",
        TOUCH_KEY,
        TOUCH.encode(TOUCH_KEY),
    ),
    "disks": (
        Table.LEASES,
        "00112233445566778899aabbccddeeff03",
        "000000000000f83f00000000000002c004030201"
        "02181716151413121104002f612fff"
        "01000000000000000002002f62" + "ac1efbb7009983a6",
        DISKS_KEY,
        DISKS.encode(DISKS_KEY),
    ),
    "opens": (
        Table.PRECACHE,
        "0100112233445566778899aabbccddeeff",
        "0000000000000440000000000000f83f" + "6f9b3a0af2400bd6",
        OPENS_KEY,
        OPENS.encode(OPENS_KEY),
    ),
    "hold": (
        Table.PRECACHE,
        "0200112233445566778899aabbccddeeff" + b"most-used".hex(),
        "0100000000000000f83f" + "the néwest".encode().hex() + "d27250263ce92f0d",
        HOLD_KEY,
        HOLD.encode(HOLD_KEY),
    ),
    "trace": (
        Table.TRACES,
        "02" + ("sha256:" + "ab" * 32).encode().hex(),
        "0807060504030201000000000000f83f00000000000002c003000000"
        "040302010605080709" + "010000000200030000" + "9d221623473d870d",
        TRACE_KEY,
        TRACE.encode(TRACE_KEY),
    ),
    "block digests": (
        Table.BLOCK_DIGESTS,
        "0102030405060708",
        "a2a8c6f44ec1e64616901686ab4bac03f16cb5d986cb70070dc612d2efe8efce" + "37e46d3700d6e58d",
        SPAN_KEY,
        f.encode_block_digests(SPAN_KEY, BLOCKS),
    ),
    "block digests of zeros": (
        Table.BLOCK_DIGESTS,
        "0102030405060708",
        "be02b03982ac84cc",
        SPAN_KEY,
        f.encode_block_digests(SPAN_KEY, ZEROS),
    ),
    "digests mark": (
        Table.BLOCK_DIGESTS,
        "01020304",
        "0807060504030201" + "c219a2d11a8d485b",
        f.view_key(VIEW_NO),
        f.encode_digests_mark(VIEW_NO, 0x0102030405060708),
    ),
}

DECODERS: dict[str, tuple[Callable[[bytes, bytes], object], object]] = {
    "store": (lambda _, record: StoreRecord.decode(record, "here"), STORE),
    "counters": (lambda _, record: Counters.decode(record), COUNTERS),
    "image": (f.decode_image, (IMAGE, FIELDS)),
    "described image": (f.decode_image, (IMAGE, DESCRIBED)),
    "view": (ViewRecord.decode, VIEW),
    "recipe": (f.decode_recipe, RECIPE),
    "chunk": (Chunk.decode, CHUNK),
    "segment": (SegmentRecord.decode, SEGMENT),
    "punch": (Punch.decode, PUNCH),
    "scrub": (lambda _, record: ScrubRecord.decode(record), SCRUB),
    "uses": (UsesRecord.decode, USES),
    "lease": (LeaseRecord.decode, LEASE),
    "touch": (TouchRecord.decode, TOUCH),
    "disks": (DisksRecord.decode, DISKS),
    "opens": (OpensRecord.decode, OPENS),
    "hold": (HoldRecord.decode, HOLD),
    "trace": (TraceRecord.decode, TRACE),
    "block digests": (lambda key, record: f.decode_block_digests(key, record, 2), BLOCKS),
    "block digests of zeros": (lambda key, record: f.decode_block_digests(key, record, 2), ZEROS),
    "digests mark": (f.decode_digests_mark, 0x0102030405060708),
}


@pytest.mark.parametrize("name", RECORDS)
def test_golden_bytes(name: str) -> None:
    _, key, record, made_key, made_record = RECORDS[name]
    assert made_key.hex() == key, "bump FORMAT"
    assert made_record.hex() == record, "bump FORMAT"


def test_golden_names_and_numbers() -> None:
    assert f.FORMAT == 1
    assert {table.name.lower(): table.value for table in Table} == {
        "meta": 1,
        "images": 2,
        "views": 3,
        "spans": 4,
        "chunks": 5,
        "digests": 6,
        "segments": 7,
        "punches": 8,
        "uses": 9,
        "leases": 10,
        "precache": 11,
        "traces": 12,
        "block_digests": 13,
    }
    assert {kind.name: kind.value for kind in PrecacheKind} == {"OPENS": 1, "HOLD": 2}
    assert {flag.name: flag.value for flag in UseFlag} == {"TWICE": 1, "BOOT": 2}
    assert {reason.name: reason.value for reason in LeaseReason} == {"PIN": 1, "TOUCH": 2, "DISK": 3}
    assert {kind.name: kind.value for kind in Kind} == {"ABSENT": 0, "HOLE": 1, "CHUNK": 2}
    assert {kind.name: kind.value for kind in ViewKind} == {"ENDED": 0, "ORIGINAL": 1, "RAW": 2, "RESIZED": 3}
    assert {mode.name: mode.value for mode in OriginMode} == {"UNKNOWN": 0, "RANGES": 1, "STREAM": 2}
    assert f.segment_name(SegmentNo(7)) == "0000000007.seg"
    assert f.SEGMENT_SIZE == 1 << 30
    assert f.digest_of(b"cachefs").hex() == "397aa7359a7850b799428b32f90042a7"
    assert f.digest_of(memoryview(b"cachefs")) == f.digest_of(b"cachefs")
    assert f.block_digests(b"cachefs").hex() == "553c384d9e1140c862c47b92cfbc1b21"


@pytest.mark.parametrize("name", RECORDS)
def test_what_was_encoded_is_decoded(name: str) -> None:
    _, _, _, key, record = RECORDS[name]
    decode, sample = DECODERS[name]
    assert decode(key, record) == sample


def test_digests_of_another_number_of_blocks_are_none() -> None:
    key, record = SPAN_KEY, f.encode_block_digests(SPAN_KEY, BLOCKS)
    for blocks in (1, 3):
        with pytest.raises(RecordCorrupt):
            f.decode_block_digests(key, record, blocks)


def test_keys_are_split_as_they_were_made() -> None:
    assert f.split_span_key(SPAN_KEY) == (VIEW_NO, 0x05060708)
    assert f.split_chunk_key(f.chunk_key(CHUNK_ID)) == CHUNK_ID
    assert f.split_trace_key(TRACE_KEY) == ("sha256:" + "ab" * 32, ViewKind.RAW)


@pytest.mark.parametrize("name", RECORDS)
def test_a_flipped_bit_is_found_wherever_it_is(name: str) -> None:
    _, _, _, key, record = RECORDS[name]
    decode, _ = DECODERS[name]
    begin = 12 if name == "store" else 0  # Before that it is another format, or none.
    for at in range(begin, len(record)):
        rotten = bytearray(record)
        rotten[at] ^= 0x10
        with pytest.raises(RecordCorrupt):
            decode(key, bytes(rotten))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_cut_short_is_found(name: str) -> None:
    _, _, _, key, record = RECORDS[name]
    decode, _ = DECODERS[name]
    for end in range(len(record)):
        with pytest.raises((RecordCorrupt, StoreFormat)):
            decode(key, record[:end])


@pytest.mark.parametrize("name", [name for name in RECORDS if RECORDS[name][0] is not Table.META])
def test_a_record_in_the_wrong_place_is_found(name: str) -> None:
    _, _, _, key, record = RECORDS[name]
    decode, _ = DECODERS[name]
    other = bytes([key[0] ^ 1]) + key[1:]
    with pytest.raises(RecordCorrupt) as failure:
        decode(other, record)
    assert failure.value.key == other


@pytest.mark.parametrize("table", Table)
def test_a_record_of_another_table_is_found(table: Table) -> None:
    payload = b"payload of some length"
    record = f.seal(table, b"key", payload)
    assert f.unseal(table, b"key", record) == payload
    for other in Table:
        if other is not table:
            with pytest.raises(RecordCorrupt, match=other.name.lower()):
                f.unseal(other, b"key", record)


def test_the_seal_covers_table_key_and_payload() -> None:
    assert f.seal(Table.CHUNKS, b"k", b"p") == b"p" + xxh3_64_intdigest(b"\x05kp").to_bytes(8, "little")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"", "not a cachefs store"),
        (b"cachefs", "not a cachefs store"),
        (b"cachefs\0\1\0\0", "not a cachefs store"),
        (b"another\0" + bytes(40), "not a cachefs store"),
        (b"cachefs\0" + (2).to_bytes(4, "little"), "format 2; this cachefs reads format 1: upgrade cachefs"),
        (b"cachefs\0" + (9).to_bytes(4, "little") + bytes(99), "format 9"),
        (b"cachefs\0" + (0).to_bytes(4, "little"), "format 0; this cachefs reads format 1: use another path"),
    ],
)
def test_other_formats_are_refused_whatever_follows(record: bytes, says: str) -> None:
    with pytest.raises(StoreFormat, match=says) as failure:
        StoreRecord.decode(record, "/var/lib/cachefs")
    assert str(failure.value).startswith("store /var/lib/cachefs: ")
    assert "\n" not in str(failure.value)


def test_an_image_of_no_fields_object_is_corrupt() -> None:
    key = f.image_key(IMAGE)
    with pytest.raises(RecordCorrupt):
        f.decode_image(key, f.seal(Table.IMAGES, key, b"no json"))


entries = st.builds(
    Entry, st.sampled_from(Kind), st.integers(0, 0xFFFF), st.integers(0, (1 << 46) - 1).map(ChunkId)
)


@given(st.lists(entries).map(tuple))
def test_every_recipe_survives(recipe: f.Recipe) -> None:
    assert f.decode_recipe(SPAN_KEY, f.encode_recipe(SPAN_KEY, recipe)) == recipe


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=2))
def test_keys_sort_as_their_numbers_do(numbers: list[tuple[int, int]]) -> None:
    keys = {f.span_key(ViewNo(view), SpanNo(span)): (view, span) for view, span in numbers}
    assert [keys[key] for key in sorted(keys)] == sorted(keys.values())
