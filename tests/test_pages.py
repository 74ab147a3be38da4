"""The form of LMDB's file: golden bytes, files that LMDB wrote, and what it could not follow without harm."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from cachefs.errors import IndexCorrupt
from cachefs.store import format as f
from cachefs.store import pages
from cachefs.store.aside import TABLES
from cachefs.store.format import ChunkId, Table
from cachefs.store.index import Index, WriteSet
from tests.stores import HUNT

PAGE = 4096
# The first page of an index that LMDB 0.9.36 wrote.
GOLDEN = bytes.fromhex(
    "00000000000000000000080000000000"  # The page's number and flags.
    "dec0efbe01000000"  # Magic, version.
    "00000000000000000000001000000000"  # Address and size of the map.
    "001000000800010000000000000000000100000000000000000000000000000002000000000000001100000000000000"
    "00000000000001000000000000000000010000000000000000000000000000000a000000000000000e00000000000000"
    "11000000000000000c00000000000000"  # Last page, transaction.
)


def test_a_meta_page_in_golden_bytes() -> None:
    assert len(GOLDEN) == pages.META_BYTES
    meta = pages.decode_meta(GOLDEN, 0)
    assert meta == pages.Meta(
        version=1,
        free=pages.Tree(4096, 8, 1, 0, 1, 0, 2, 17),
        main=pages.Tree(0, 0, 1, 0, 1, 0, 10, 14),
        last_page=17,
        txn=12,
    )
    assert meta.page_bytes == PAGE
    assert meta.file_bytes == 18 * PAGE


def reader(data: bytes | bytearray) -> pages.Read:
    return lambda offset, length: bytes(data[offset : offset + length])


def look(data: bytes | bytearray) -> set[str]:
    meta = pages.newest_meta(reader(data))
    assert meta.version == pages.VERSION
    return pages.verify(reader(data), meta, TABLES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Every kind of page: branches, leaves, large values, few and many duplicates, and lists of free pages."""
    folder = tmp_path_factory.mktemp("index")
    index = Index(folder)
    rng = random.Random(1)
    for _ in range(3):
        writes = WriteSet()
        for n in range(2500):
            key = f.chunk_key(ChunkId(rng.randrange(1 << 20)))
            writes.put(Table.CHUNKS, key, rng.randbytes(44))
            digest = bytes(16) if n % 3 == 0 else (n % 40).to_bytes(16, "big") if n % 3 == 1 else rng.randbytes(16)
            writes.digests_added.append((digest, ChunkId(rng.randrange(1 << 40))))
        for n in range(40):
            writes.put(Table.SPANS, f.span_key(f.ViewNo(1), f.SpanNo(rng.randrange(99))), rng.randbytes(300 * n))
        index.commit(writes)
        with index.reading() as snapshot:
            keys = [key for key, _ in snapshot.items(Table.CHUNKS)]
        writes = WriteSet()
        for key in keys[: len(keys) // 2]:
            writes.put(Table.CHUNKS, key, None)
        index.commit(writes)
    index.close()
    return (folder / "data.mdb").read_bytes()


def kinds(data: bytes) -> set[int]:
    return {struct.unpack_from("<H", data, at + 10)[0] for at in range(0, len(data), PAGE)}


def test_what_lmdb_wrote_is_sound(data: bytes) -> None:
    assert kinds(data) >= {1, 2, 4, 8, 0x22}, "branch, leaf, overflow, meta, packed duplicates"
    assert look(data) == {table.name.lower() for table in Table}


def test_an_empty_index_is_sound(tmp_path: Path) -> None:
    Index(tmp_path).close()
    assert look((tmp_path / "data.mdb").read_bytes()) == {table.name.lower() for table in Table}


def test_a_file_that_ends_early_is_found_at_every_length(data: bytes) -> None:
    last = last_used(data)
    for length in [*range(0, 9000, 500), *range(9000, last, 9973), last]:
        with pytest.raises(IndexCorrupt):
            look(data[:length])
    look(data[: last + PAGE])


def last_used(data: bytes) -> int:
    """Where the last page begins that LMDB would look at. What lies behind it is free, and may be missing."""
    for page in range(len(data) // PAGE - 1, 0, -1):
        try:
            look(data[: page * PAGE])
        except IndexCorrupt:
            return page * PAGE
    raise AssertionError


def test_a_file_may_lack_pages_that_were_never_written(tmp_path: Path) -> None:
    """LMDB does not write a page that the transaction which took it gave back."""
    index = Index(tmp_path)
    key, table = f.chunk_key(ChunkId(1)), index._tables[Table.CHUNKS]
    with index._env.begin(write=True) as txn:
        txn.put(key, bytes(1 << 20), db=table)
        txn.delete(key, db=table)
    index.close()
    data = (tmp_path / "data.mdb").read_bytes()
    meta = pages.newest_meta(reader(data))
    assert meta.file_bytes > len(data)
    assert look(data) == {table.name.lower() for table in Table}
    assert survives(tmp_path)


def test_another_lmdb_is_told_from_rot(data: bytes) -> None:
    other = bytearray(data)
    for at in (16, PAGE + 16):
        struct.pack_into("<I", other, at + 4, 2)
    assert pages.newest_meta(reader(other)).version == 2
    struct.pack_into("<I", other, 20, 1)
    with pytest.raises(IndexCorrupt, match="contradict"):
        pages.newest_meta(reader(other))


def test_a_torn_meta_page_is_found(data: bytes) -> None:
    for at in (0, PAGE):
        for length in (16, 20, 48, 4096):
            torn = bytearray(data)
            torn[at : at + length] = bytes(length)
            with pytest.raises(IndexCorrupt):
                look(torn)


def survives(path: Path) -> bool:
    """Whether LMDB reads and writes the index without the death of the process; an error is no death."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            index = Index(path)
            with index.reading() as snapshot:
                for table in Table:
                    for key, _ in snapshot.items(table):
                        snapshot.get(table, key)
            writes = WriteSet()
            for n in range(200):
                writes.put(Table.USES, n.to_bytes(8, "big"), bytes(400))
            index.commit(writes)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_lmdb_survives_whatever_passes(data: bytes, tmp_path: Path) -> None:
    """Rot where pages have their numbers, offsets and kinds. What is let through does no harm to the process."""
    rng = random.Random(2)
    passed = refused = 0
    for _ in range(250 * HUNT):
        rotten = bytearray(data)
        page = rng.choice((0, 1, rng.randrange(len(data) // PAGE), rng.randrange(len(data) // PAGE)))
        at = page * PAGE + rng.randrange(rng.choice((16, 40, PAGE)))
        rotten[at] ^= 1 << rng.randrange(8)
        try:
            look(rotten)
        except IndexCorrupt:
            refused += 1
            continue
        passed += 1
        (tmp_path / "data.mdb").write_bytes(rotten)
        assert survives(tmp_path), (page, at - page * PAGE, data[at], rotten[at])
    assert passed > 50 * HUNT
    assert refused > 20 * HUNT


def test_every_zeroed_page_that_is_used_is_found(data: bytes, tmp_path: Path) -> None:
    refused = 0
    for page in range(2, len(data) // PAGE):
        rotten = bytearray(data)
        rotten[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        try:
            look(rotten)
        except IndexCorrupt:
            refused += 1
            continue
        if page % 8 == 0 or HUNT > 1:
            (tmp_path / "data.mdb").write_bytes(rotten)
            assert survives(tmp_path), page
    assert refused > 20
