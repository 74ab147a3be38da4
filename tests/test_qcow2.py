"""Disks inside qcow2 images: the bytes are qemu's, or the image is refused. Nothing is read outside the file."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest
import zstandard
from hypothesis import event, given
from hypothesis import strategies as st

from cachefs.errors import FormatError
from cachefs.formats import decompress as decompressing
from cachefs.formats.decompress import decompress
from cachefs.formats.qcow2 import (
    SLICE_MAX,
    TABLES_MAX,
    Compressed,
    Data,
    Mapping,
    Need,
    Piece,
    Zero,
)
from cachefs.formats.qcow2_fetch import FRONT_MAX, Placed, everything, file_order, front, reach, sequential_plan
from cachefs.formats.qcow2_header import HEAD_MAX, SIZE_MAX, SUBCLUSTERS, Compression, Header
from cachefs.plan.extents import Extent
from tests.qcow2_zoo import HUGE, MIB, SECTOR, ZOO, missing_qemu, qemu, qemu_io, raw_of
from tests.stores import examples

needs_qemu = pytest.mark.skipif(missing_qemu is not None, reason=f"there is no {missing_qemu} (qemu-utils)")
KIB = 1024


class Disk:
    """Reads a disk as a view does, from a file that says when it is asked for what it does not have."""

    def __init__(self, file: bytes | Path, tables_max: int = TABLES_MAX) -> None:
        self._bytes = file if isinstance(file, bytes) else None
        self._fd = os.open(file, os.O_RDONLY) if isinstance(file, Path) else -1
        self.file_size = len(file) if isinstance(file, bytes) else os.fstat(self._fd).st_size
        self.fetched: list[Extent] = []
        try:
            head = self.fetch(Extent(0, min(HEAD_MAX, self.file_size)))
            self.header = Header.parse(head, self.file_size)
        except BaseException:
            self.close()
            raise
        self.mapping = Mapping(self.header, tables_max)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def fetch(self, extent: Extent) -> bytes:
        assert 0 <= extent.start <= extent.end <= self.file_size, f"{extent} is outside the file"
        self.fetched.append(extent)
        if self._bytes is not None:
            return self._bytes[extent.start : extent.end]
        data = os.pread(self._fd, extent.length, extent.start)
        assert len(data) == extent.length
        return data

    def pieces(self, offset: int, length: int) -> list[Piece]:
        for _ in range(3):
            found = self.mapping.lookup(offset, length)
            if not isinstance(found, Need):
                check_pieces(self.header, found, length)
                return found
            assert found.extents
            for extent in found.extents:
                assert 0 < extent.length <= SLICE_MAX
                self.mapping.feed(extent.start, self.fetch(extent))
                assert self.mapping.tables_bytes <= TABLES_MAX
        raise AssertionError("a third round of tables")

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self._read(offset, length))

    def _read(self, offset: int, length: int) -> Iterator[bytes]:
        while length:
            part = min(length, 8 * MIB)
            for piece in self.pieces(offset, part):
                yield self.piece_bytes(piece)
            offset, length = offset + part, length - part

    def piece_bytes(self, piece: Piece) -> bytes:
        match piece:
            case Zero(length):
                return bytes(length)
            case Data(at, length):
                return self.fetch(Extent(at, at + length))
            case Compressed(at, packed, within, length):
                cluster = decompress(
                    self.header.compression, self.fetch(Extent(at, at + packed)), self.header.cluster_size
                )
                assert len(cluster) == self.header.cluster_size
                return cluster[within : within + length]


def check_pieces(header: Header, pieces: list[Piece], length: int) -> None:
    assert sum(piece.length for piece in pieces) == length
    for one in pieces:
        assert one.length > 0
        if isinstance(one, Data):
            assert header.cluster_size <= one.file_offset
            assert one.file_offset + one.length <= header.file_size
        if isinstance(one, Compressed):
            assert one.file_offset + one.file_length <= header.file_size
            assert 0 < one.file_length <= 2 * header.cluster_size
            assert 0 <= one.within < one.within + one.length <= header.cluster_size
    for one, following in pairwise(pieces):
        if type(one) is type(following):
            assert not isinstance(one, Zero), "zeros are joined"
            if isinstance(one, Data) and isinstance(following, Data):
                assert one.file_offset + one.length != following.file_offset, "neighbours are joined"


def digest_of(path: Path) -> bytes:
    digest = blake2b()
    with path.open("rb") as file:
        while data := file.read(MIB):
            digest.update(data)
    return digest.digest()


# ── The zoo ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def animal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Disk, Path]]:
    """The image of that name, and the raw file that qemu makes of it."""
    image = ZOO[request.param].make(tmp_path)
    disk = Disk(image)
    yield disk, raw_of(image)
    disk.close()
    for path in tmp_path.iterdir():
        path.unlink()


@needs_qemu
@pytest.mark.parametrize("animal", [name for name, made in ZOO.items() if made.size < HUGE], indirect=True)
def test_the_disk_is_what_qemu_reads(animal: tuple[Disk, Path]) -> None:
    disk, raw = animal
    assert disk.header.size == raw.stat().st_size
    assert blake2b(disk.read(0, disk.header.size)).digest() == digest_of(raw)
    rng = random.Random(disk.header.size)
    with raw.open("rb") as expected:
        for _ in range(100):
            start = rng.randrange(disk.header.size + 1)
            length = rng.randrange(min(disk.header.size - start, rng.choice((SECTOR, 200_000, MIB))) + 1)
            expected.seek(start)
            assert disk.read(start, length) == expected.read(length)


@needs_qemu
@pytest.mark.parametrize("animal", ["sparse-2t"], indirect=True)
def test_two_sparse_tebibytes(animal: tuple[Disk, Path]) -> None:
    disk, raw = animal
    assert disk.header.size == raw.stat().st_size == HUGE
    parts = list(feeding(disk))
    with raw.open("rb") as expected:
        for part in parts:
            expected.seek(part.disk_offset)
            assert disk.piece_bytes(part.piece) == expected.read(part.piece.length)
        # Whatever qemu wrote down for a gap is zeros.
        ends = [0, *(part.disk_offset + part.piece.length for part in parts)]
        for end, start in zip(ends, [*(part.disk_offset for part in parts), HUGE], strict=True):
            assert is_zero(expected, end, start)
        for start in random.Random(2).choices(range(0, HUGE, 4096), k=200):
            expected.seek(start)
            assert disk.read(start, 4096) == expected.read(4096)


def is_zero(file: BinaryIO, start: int, end: int) -> bool:
    """Whether a sparse file holds no data but zeros there."""
    fd = file.fileno()
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise
        if data >= end:
            return True
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        if any(os.pread(fd, hole - data, data)):
            return False
        start = hole
    return True


def feeding(disk: Disk) -> Iterator[Placed]:
    for found in everything(disk.mapping):
        if isinstance(found, Need):
            for extent in found.extents:
                disk.mapping.feed(extent.start, disk.fetch(extent))
        else:
            yield found


MANY_KINDS = ("guest", "out-of-order", "overwritten-zstd", "subclusters-overwritten", "zlib-512", "grown", "plain")


@needs_qemu
@pytest.mark.parametrize("animal", MANY_KINDS, indirect=True)
def test_one_pass_over_the_file_gives_the_disk(animal: tuple[Disk, Path]) -> None:
    disk, raw = animal
    ordered = file_order(feeding(disk), 100_000)
    assert ordered is not None
    made = bytearray(disk.header.size)
    at = 0
    for part in ordered:
        assert part.file_extent.start >= at
        at = part.file_extent.start
        made[part.disk_offset : part.disk_offset + part.piece.length] = disk.piece_bytes(part.piece)
    assert made == raw.read_bytes()
    assert file_order(iter(ordered), len(ordered)) == ordered
    assert file_order(iter(ordered), len(ordered) - 1) is None


@needs_qemu
@pytest.mark.parametrize("animal", MANY_KINDS, indirect=True)
def test_a_plan_gives_the_disk_by_few_requests(animal: tuple[Disk, Path]) -> None:
    disk, raw = animal
    expected = raw.read_bytes()
    requests: dict[int, int] = {}
    for gap_max in (0, 256 * KIB):
        made = bytearray(b"?" * disk.header.size)
        requests[gap_max] = 0
        for start in range(0, disk.header.size, 8 * MIB):
            length = min(8 * MIB, disk.header.size - start)
            plan = sequential_plan(start, disk.pieces(start, length), gap_max, 8 * MIB)
            for zeros in plan.zeros:
                made[zeros.start : zeros.end] = bytes(zeros.length)
            assert [min(p.disk_offset for p in f.parts) for f in plan.fetches] == sorted(
                min(p.disk_offset for p in f.parts) for f in plan.fetches
            )
            for fetch in plan.fetches:
                requests[gap_max] += 1
                for part in fetch.parts:
                    assert fetch.extent.start <= part.file_extent.start < part.file_extent.end <= fetch.extent.end
                    made[part.disk_offset : part.disk_offset + part.piece.length] = disk.piece_bytes(part.piece)
        assert made == expected
    # How much out of order qemu-img writes depends on how busy the machine is.
    assert requests[256 * KIB] <= -(-disk.header.size // (8 * MIB)) + 8
    assert requests[256 * KIB] <= requests[0]


def scattered(count: int, every: int) -> list[Piece]:
    return [Data(every * number, 512) for number in range(1, count + 1)]


def test_no_request_is_larger_than_it_may_be_or_its_only_piece() -> None:
    plan = sequential_plan(0, [Data(0, 3 * MIB), *scattered(100, 4 * MIB), *scattered(8, 64 * KIB)], MIB, 2 * MIB)
    assert sum(fetch.extent.length for fetch in plan.fetches) < 3 * MIB + 100 * KIB + 8 * 64 * KIB
    assert [fetch.extent.length for fetch in plan.fetches if fetch.extent.length > 2 * MIB] == [3 * MIB]
    many = sequential_plan(0, scattered(8192, 64 * KIB), 256 * KIB, 4 * MIB)
    assert all(fetch.extent.length <= 4 * MIB and fetch.is_wasteful for fetch in many.fetches)
    assert sum(len(fetch.parts) for fetch in many.fetches) == 8192
    assert not sequential_plan(0, [Data(0, 512), Data(1024, 512)], 512, MIB).fetches[0].is_wasteful


def test_a_reach_counts_what_the_file_gives_and_stops_before_what_costs_too_much() -> None:
    pieces: list[Piece] = [
        Compressed(0, 100, 0, 64 * KIB),
        Zero(MIB),
        Data(4096, 64 * KIB),
        Zero(512),
        Compressed(9, 1, 0, 512),
    ]
    assert reach(pieces, 99) == 0
    assert reach(pieces, 100) == 64 * KIB + MIB, "what is not there costs nothing"
    assert reach(pieces, 100 + 64 * KIB) == 2 * 64 * KIB + MIB + 512
    assert reach(pieces, MIB) == 2 * 64 * KIB + MIB + 1024
    assert reach([], MIB) == 0


@needs_qemu
def test_the_first_read_needs_the_head_and_two_tables(tmp_path: Path) -> None:
    disk = Disk(ZOO["zlib"].make(tmp_path))
    disk.pieces(0, 4096)
    head, l1, l2 = disk.fetched
    assert head == Extent(0, HEAD_MAX)
    assert l1.length == disk.header.l1.length <= KIB
    assert l2.length == disk.header.cluster_size
    assert list(disk.mapping.l1_extents()) == [l1]
    disk.close()


@needs_qemu
@pytest.mark.parametrize("name", ["zlib", "plain", "zlib-4k", "v2"])
def test_the_front_holds_all_that_the_first_cluster_needs(name: str, tmp_path: Path) -> None:
    disk = Disk(ZOO[name].make(tmp_path))
    guess = front(disk.header)
    assert guess is not None
    assert guess.length <= FRONT_MAX
    assert guess.end <= disk.header.file_size
    first = sequential_plan(0, disk.pieces(0, disk.header.cluster_size), 0, MIB)
    _, *tables = disk.fetched
    for extent in (*tables, *(fetch.extent for fetch in first.fetches)):
        assert guess.start <= extent.start <= extent.end <= guess.end, (extent, guess)
    disk.close()


@needs_qemu
def test_nothing_is_guessed_where_it_would_be_much(tmp_path: Path) -> None:
    disk = Disk(ZOO["zlib-2M"].make(tmp_path))
    assert front(disk.header) is None
    assert front(replace(disk.header, cluster_bits=16, size=0)) is None
    disk.close()
    assert front(replace(disk.header, cluster_bits=16, l1=Extent(3 * 64 * KIB, 3 * 64 * KIB + FRONT_MAX))) is None


@needs_qemu
def test_tables_of_large_clusters_come_in_slices(tmp_path: Path) -> None:
    disk = Disk(ZOO["zlib-2M"].make(tmp_path))
    disk.pieces(0, 4096)
    assert disk.fetched[-1].length == SLICE_MAX < disk.header.cluster_size
    disk.close()


@needs_qemu
def test_tables_beyond_the_bound_are_forgotten_and_asked_for_again(tmp_path: Path) -> None:
    image = tmp_path / "many-tables.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", image, "100G")
    qemu_io(image, *(f"write -P {1 + at % 250} {at * 512}M 64k" for at in range(200)))
    bound = 4 << 20
    disk = Disk(image, bound)
    rng = random.Random(1)
    most = 0
    for _ in range(600):
        at = rng.randrange(200)
        assert disk.read(at * 512 * MIB, 4096) == bytes([1 + at % 250]) * 4096
        most = max(most, disk.mapping.tables_bytes)
    assert bound - 2 * SLICE_MAX < most <= bound
    tables = [extent for extent in disk.fetched if extent.length == SLICE_MAX]
    assert len(tables) > 2 * len(set(tables)) > 200
    disk.close()


def test_a_bound_that_one_lookup_could_pass_is_no_bound() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        Mapping(Disk(small().file).header, 1 << 20)


# ── Images by hand ────────────────────────────────────────────────────────────────────────────────────

COPIED, COMPRESSED, ALL_ZERO = 1 << 63, 1 << 62, 1
CLUSTER = 16 * KIB


@dataclass(frozen=True)
class Image:
    """A small image, to be spoiled. Its clusters: header, refcount table, refcounts, L1, L2, L2, and data."""

    file: bytes

    def put(self, form: str, at: int, *values: int) -> Image:
        made = bytearray(self.file)
        struct.pack_into(">" + form, made, at, *values)
        return Image(bytes(made))

    def l1(self, index: int, entry: int) -> Image:
        return self.put("Q", 3 * CLUSTER + 8 * index, entry)

    def l2(self, index: int, entry: int) -> Image:
        return self.put("Q", 4 * CLUSTER + self._entry_size * index, entry)

    def bitmap(self, index: int, bits: int) -> Image:
        return self.put("Q", 4 * CLUSTER + 16 * index + 8, bits)

    @property
    def _entry_size(self) -> int:
        return 16 if self.file[79] & 16 else 8

    def cut(self, size: int) -> Image:
        return Image(self.file[:size])

    def read(self, offset: int = 0, length: int = 4 * CLUSTER) -> bytes:
        return Disk(self.file).read(offset, length)


def cluster_bytes(number: int) -> bytes:
    return struct.pack(">Q", 0xC105_7E40_0000_0000 + number) * (CLUSTER // 8)


def packed(data: bytes) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


@lru_cache
def small(version: int = 3, extended: bool = False) -> Image:
    """Disk clusters 0, 1 and 2 are at file clusters 6, 7 and 8; 3 is compressed in the last; all else is zeros."""
    entry = 16 if extended else 8
    cover = CLUSTER // entry * CLUSTER
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, 14, 2 * cover, 0, 2, 3 * CLUSTER, CLUSTER, 1, 0, 0
    )
    if version > 2:
        head += struct.pack(">QQQII", 16 * extended, 0, 0, 4, 112) + bytes(8)
    small_cluster = packed(cluster_bytes(3))
    sectors = -(-len(small_cluster) // SECTOR) - 1
    entries = [COPIED | at * CLUSTER for at in (6, 7, 8)] + [COMPRESSED | sectors << 56 | 9 * CLUSTER]
    bitmaps = [0xFFFF_FFFF] * 3 + [0]
    table = b"".join(
        struct.pack(">Q", one) + struct.pack(">Q", bits) * extended
        for one, bits in zip(entries, bitmaps, strict=True)
    )
    clusters = [
        head,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(">H", 1) * 10,
        struct.pack(">QQ", COPIED | 4 * CLUSTER, COPIED | 5 * CLUSTER),
        table,
        b"",
        *map(cluster_bytes, range(3)),
    ]
    return Image(b"".join(part.ljust(CLUSTER, b"\0") for part in clusters) + small_cluster)


EXPECTED = b"".join(map(cluster_bytes, range(4)))


@pytest.mark.parametrize("extended", [False, True])
def test_an_image_by_hand_reads_as_it_should(extended: bool) -> None:
    disk = Disk(small(extended=extended).file)
    assert disk.read(0, 4 * CLUSTER) == EXPECTED
    assert disk.pieces(0, 6 * CLUSTER) == [
        Data(6 * CLUSTER, 3 * CLUSTER),
        Compressed(9 * CLUSTER, disk.file_size - 9 * CLUSTER, 0, CLUSTER),
        Zero(2 * CLUSTER),
    ]
    assert disk.pieces(CLUSTER + 5, 10) == [Data(7 * CLUSTER + 5, 10)]
    assert disk.pieces(3 * CLUSTER + 5, 10) == [Compressed(9 * CLUSTER, disk.file_size - 9 * CLUSTER, 5, 10)]
    assert disk.pieces(disk.header.size, 0) == []


@needs_qemu
@pytest.mark.parametrize(("version", "extended"), [(2, False), (3, False), (3, True)])
def test_qemu_finds_no_fault_in_the_image_by_hand(version: int, extended: bool, tmp_path: Path) -> None:
    image = tmp_path / "small.qcow2"
    image.write_bytes(small(version, extended).file)
    qemu("qemu-img", "check", "-f", "qcow2", image)
    raw = raw_of(image)
    assert raw.read_bytes() == small(version, extended).read(0, raw.stat().st_size)


def extension(kind: int, data: bytes = b"", length: int | None = None) -> Callable[[Image], Image]:
    """A header extension, instead of the end of extensions; its length may lie."""
    made = struct.pack(">II", kind, len(data) if length is None else length) + data.ljust(
        -(-len(data) // 8) * 8, b"\0"
    )
    return lambda good: Image(good.file[:112] + made + good.file[112 + len(made) :])


HEADERS: dict[str, tuple[Callable[[Image], Image], str]] = {
    "no file": (lambda good: Image(b""), "not a qcow2"),
    "magic only": (lambda good: good.cut(4), "cut short"),
    "a cut header": (lambda good: good.cut(71), "cut short"),
    "a cut version 3 header": (lambda good: good.cut(103), "cut short"),
    "a header beyond the end": (lambda good: good.cut(111), "too long"),
    "another magic": (lambda good: good.put("I", 0, 0x51464900), "not a qcow2"),
    "version 1": (lambda good: good.put("I", 4, 1), "version 1"),
    "version 4": (lambda good: good.put("I", 4, 4), "version 4"),
    "a backing file": (lambda good: good.put("QI", 8, 1024, 11), "backing file"),
    "a backing file far away": (lambda good: good.put("QI", 8, 1 << 63, 11), "backing file"),
    "clusters of 256 bytes": (lambda good: good.put("I", 20, 8), "2\\^8 bytes"),
    "clusters of 4 MiB": (lambda good: good.put("I", 20, 22), "2\\^22 bytes"),
    "clusters of 2^4G": (lambda good: good.put("I", 20, 0xFFFF_FFFF), "2\\^4294967295"),
    "a disk of 2^64": (lambda good: good.put("Q", 24, (1 << 64) - 1), "larger than"),
    "a disk of 2^63": (lambda good: good.put("Q", 24, 1 << 63), "larger than"),
    "a disk above the bound": (lambda good: good.put("Q", 24, SIZE_MAX + 1), "larger than"),
    "a disk that L1 does not cover": (lambda good: good.put("Q", 24, 64 * MIB + 1), "too small for its disk"),
    "AES": (lambda good: good.put("I", 32, 1), "encrypted"),
    "LUKS": (lambda good: good.put("I", 32, 2), "encrypted"),
    "L1 entries without end": (lambda good: good.put("I", 36, 0xFFFF_FFFF), "larger than"),
    "L1 above the bound": (lambda good: good.put("I", 36, (4 << 20) + 1), "larger than"),
    "no L1": (lambda good: good.put("I", 36, 0), "too small for its disk"),
    "L1 beyond the end": (lambda good: good.put("Q", 40, 1 << 40), "beyond the end"),
    "L1 over the end": (lambda good: good.put("I", 36, 1 << 20), "beyond the end"),
    "L1 in the header": (lambda good: good.put("Q", 40, 0), "cluster of its own"),
    "L1 anywhere": (lambda good: good.put("Q", 40, 3 * CLUSTER + 512), "cluster of its own"),
    "L1 in the refcounts": (lambda good: good.put("Q", 40, CLUSTER), "overlap"),
    "no refcounts": (lambda good: good.put("I", 56, 0), "refcount table of 0"),
    "refcounts without end": (lambda good: good.put("I", 56, 0xFFFF_FFFF), "refcount table of"),
    "refcounts in the header": (lambda good: good.put("Q", 48, 0), "cluster of its own"),
    "refcounts anywhere": (lambda good: good.put("Q", 48, CLUSTER + 8), "cluster of its own"),
    "refcounts beyond the end": (lambda good: good.put("Q", 48, 1 << 62), "beyond the end"),
    "a corrupt image": (lambda good: good.put("Q", 72, 2), "marked as corrupt"),
    "a data file": (lambda good: good.put("Q", 72, 4), "another file"),
    "a raw data file": (lambda good: good.put("Q", 88, 2), "another file"),
    "a feature of tomorrow": (lambda good: good.put("Q", 72, 1 << 5), "not known here \\(0x20\\)"),
    "the last feature": (lambda good: good.put("Q", 72, 1 << 63), "not known here"),
    "refcounts of 128 bits": (lambda good: good.put("I", 96, 7), "wider than 64"),
    "a header of 96 bytes": (lambda good: good.put("I", 100, 96), "header of 96"),
    "a header of 105 bytes": (lambda good: good.put("I", 100, 105), "header of 105"),
    "a header beyond its cluster": (lambda good: good.put("I", 100, CLUSTER + 8), "too long"),
    "a header of 4 GiB": (lambda good: good.put("I", 100, 0xFFFF_FFF8), "too long"),
    "compression of tomorrow": (lambda good: good.put("Q", 72, 8).put("B", 104, 2), "type 2 is not known"),
    "zstd unannounced": (lambda good: good.put("B", 104, 1), "contradicts"),
    "zlib announced": (lambda good: good.put("Q", 72, 8), "contradicts"),
    "zlib announced by a short header": (lambda good: good.put("Q", 72, 8).put("I", 100, 104), "contradicts"),
    "subclusters in clusters of 8 KiB": (lambda good: good.put("Q", 72, 16).put("I", 20, 13), "no subclusters"),
    "a data file's name": (extension(0x44415441, b"/etc/passwd"), "names a data file"),
    "the keys of LUKS": (extension(0x0537BE77, bytes(16)), "keys"),
    "an extension beyond the header": (extension(0x12345678, b"", CLUSTER), "does not fit"),
    "an end of extensions that goes on": (extension(0, b"", CLUSTER), "does not fit"),
    "an extension of 4 GiB": (extension(0x6803F857, b"", 0xFFFF_FFFF), "does not fit"),
    "a data file's name behind another extension": (
        lambda good: Image(
            good.file[:112] + struct.pack(">II8sII8s", 0x6803F857, 5, b"", 0x44415441, 3, b"/a") + good.file[144:]
        ),
        "names a data file",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_refused(name: str) -> None:
    spoil, reason = HEADERS[name]
    with pytest.raises(FormatError, match=reason) as refused:
        Disk(spoil(small()).file)
    assert refused.value.errno == errno.EPERM
    assert str(refused.value.again()) == str(refused.value)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good.put("Q", 72, 1 | good.file[79]),  # Dirty.
        lambda good: good.put("QQ", 80, (1 << 64) - 1, 1),  # Compatible features; bitmaps.
        lambda good: good.put("IQ", 60, 0xFFFF_FFFF, 1 << 60),  # Snapshots.
        lambda good: good.put("I", 16, 11),  # The length of no backing file.
        extension(0xE2792ACA, b"qcow2"),  # The format of no backing file.
        extension(0x6803F857, bytes(48)),  # The names of features.
        extension(0x12345678, bytes(999)),
    ],
)
def test_what_does_not_matter_is_not_looked_at(spoil: Callable[[Image], Image], extended: bool) -> None:
    assert spoil(small(extended=extended)).read() == EXPECTED


def test_less_than_the_head_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="not the head"):
        Header.parse(small().file[:1000], len(small().file))


@pytest.mark.parametrize(("said", "size"), [(100 * KIB + 511, 100 * KIB), (511, 0), (513, 512)])
def test_sizes_are_whole_sectors_as_to_qemu(said: int, size: int) -> None:
    assert Disk(small().put("Q", 24, said).file).header.size == size


TABLES: dict[str, tuple[Callable[[Image], Image], str]] = {
    "L1 with reserved bits": (lambda good: good.l1(0, COPIED | 4 * CLUSTER | 1), "L1 entry"),
    "L1 with high reserved bits": (lambda good: good.l1(0, 1 << 62 | 4 * CLUSTER), "L1 entry"),
    "L1 names no cluster": (lambda good: good.l1(0, 4 * CLUSTER + 512), "L1 entry"),
    "L2 beyond the end": (lambda good: good.l1(0, 10 * CLUSTER), "not within the file"),
    "L2 over the end": (lambda good: good.l1(0, 9 * CLUSTER), "not within the file"),
    "L2 far away": (lambda good: good.l1(0, (1 << 56) - CLUSTER), "not within the file"),
    "L2 in L1": (lambda good: good.l1(0, 3 * CLUSTER), "overlaps the header"),
    "L2 in the refcounts": (lambda good: good.l1(0, CLUSTER), "overlaps the header"),
    "one L2 twice": (lambda good: good.l1(1, 4 * CLUSTER), "share one L2 table"),
    "another part's L2 is bad": (lambda good: good.l1(1, 10 * CLUSTER), "not within the file"),
    "L2 with a reserved bit": (lambda good: good.l2(0, 6 * CLUSTER | 2), "L2 entry"),
    "L2 with a high reserved bit": (lambda good: good.l2(0, 6 * CLUSTER | 1 << 56), "L2 entry"),
    "data at no cluster": (lambda good: good.l2(0, 6 * CLUSTER + 512), "names no cluster"),
    "data beyond the end": (lambda good: good.l2(0, 10 * CLUSTER), "beyond the end"),
    "data far away": (lambda good: good.l2(0, (1 << 56) - CLUSTER), "beyond the end"),
    "data in L1": (lambda good: good.l2(0, 3 * CLUSTER), "overlaps the header"),
    "data in the refcounts": (lambda good: good.l2(0, CLUSTER), "overlaps the header"),
    "data in its L2": (lambda good: good.l2(0, 4 * CLUSTER), "overlaps an L2 table"),
    "data in another L2": (lambda good: good.l2(0, 5 * CLUSTER), "overlaps an L2 table"),
    "compressed beyond the end": (lambda good: good.l2(0, COMPRESSED | 10 * CLUSTER), "beyond the end"),
    "compressed far away": (lambda good: good.l2(0, COMPRESSED | (1 << 56) - 1), "beyond the end"),
    "compressed in the header": (lambda good: good.l2(0, COMPRESSED | 5), "overlaps the header"),
    "compressed in nothing": (lambda good: good.l2(0, COMPRESSED), "overlaps the header"),
    "compressed into L1": (
        lambda good: good.l2(0, COMPRESSED | 2 << 56 | 3 * CLUSTER - 100),
        "overlaps the header",
    ),
    "compressed in its L2": (lambda good: good.l2(0, COMPRESSED | 4 * CLUSTER + 1), "overlaps an L2 table"),
    "compressed garbage": (lambda good: good.l2(0, COMPRESSED | 7 * CLUSTER), "compressed cluster"),
}


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_refused(name: str, extended: bool) -> None:
    spoil, reason = TABLES[name]
    image = spoil(small(extended=extended))
    if extended and name.startswith("compressed"):
        image = image.bitmap(0, 0)
    for _ in range(2):
        with pytest.raises(FormatError, match=reason):
            image.read(0, CLUSTER)


SUBCLUSTER_BITS: dict[str, tuple[Callable[[Image], Image], str]] = {
    "zero and allocated": (lambda good: good.bitmap(0, 1 << 40 | 1 << 8), "bitmap"),
    "all zero, all allocated": (lambda good: good.bitmap(0, (1 << 64) - 1), "bitmap"),
    "allocated nowhere": (lambda good: good.l2(0, 0).bitmap(0, 1), "bitmap"),
    "allocated nowhere, copied": (lambda good: good.l2(0, COPIED).bitmap(0, 1), "bitmap"),
    "compressed with bits": (lambda good: good.bitmap(3, 1), "has subclusters"),
    "compressed with zeros": (lambda good: good.bitmap(3, 1 << 32), "has subclusters"),
    "the flag of plain L2": (lambda good: good.l2(0, COPIED | 6 * CLUSTER | ALL_ZERO), "flag"),
}


@pytest.mark.parametrize("name", SUBCLUSTER_BITS)
def test_a_bitmap_is_refused(name: str) -> None:
    spoil, reason = SUBCLUSTER_BITS[name]
    with pytest.raises(FormatError, match=reason):
        spoil(small(extended=True)).read()


@given(
    states=st.lists(st.sampled_from("-az"), min_size=SUBCLUSTERS, max_size=SUBCLUSTERS),
    start=st.integers(0, 2 * CLUSTER),
    length=st.integers(0, 2 * CLUSTER),
    host=st.booleans(),
)
@examples(100)
def test_subclusters_are_what_their_bits_say(states: list[str], start: int, length: int, host: bool) -> None:
    if not host:
        states = [state.replace("a", "-") for state in states]
    bits = sum((1 << at) * (state == "a") + (1 << 32 + at) * (state == "z") for at, state in enumerate(states))
    image = small(extended=True).l2(1, 7 * CLUSTER * host).bitmap(1, bits)
    size = CLUSTER // SUBCLUSTERS
    middle = b"".join(
        cluster_bytes(1)[at * size : (at + 1) * size] if state == "a" else bytes(size)
        for at, state in enumerate(states)
    )
    expected = EXPECTED[:CLUSTER] + middle + EXPECTED[2 * CLUSTER :]
    assert image.read(start, length) == expected[start : start + length]


def test_zero_flags() -> None:
    preallocated, plain = COPIED | 6 * CLUSTER | ALL_ZERO, ALL_ZERO
    image = small().l2(0, preallocated).l2(1, plain)
    assert image.read() == bytes(2 * CLUSTER) + EXPECTED[2 * CLUSTER :]
    for entry in (preallocated, plain):
        with pytest.raises(FormatError, match="flag"):
            small(version=2).l2(0, entry).read()


def test_zeros_need_no_room_in_the_file() -> None:
    # As to qemu: a cluster that is not read may be anywhere, if only at a cluster.
    assert small().l2(0, 50 * CLUSTER | ALL_ZERO).read(0, CLUSTER) == bytes(CLUSTER)
    assert small(extended=True).l2(0, 50 * CLUSTER).bitmap(0, 1 << 32).read(0, CLUSTER) == bytes(CLUSTER)
    with pytest.raises(FormatError, match="names no cluster"):
        small().l2(0, 6 * CLUSTER + 512 | ALL_ZERO).read(0, CLUSTER)


def test_the_tail_of_the_last_cluster_may_be_missing() -> None:
    image = small().cut(8 * CLUSTER + 700)
    assert image.read(0, 3 * CLUSTER) == EXPECTED[: 2 * CLUSTER + 700] + bytes(CLUSTER - 700)
    assert image.read(2 * CLUSTER + 600, 200) == EXPECTED[2 * CLUSTER + 600 : 2 * CLUSTER + 700] + bytes(100)
    assert image.read(2 * CLUSTER + 900, 200) == bytes(200)
    with pytest.raises(FormatError, match="beyond the end"):
        small().cut(8 * CLUSTER).read(2 * CLUSTER, 1)


def test_whole_subclusters_of_the_last_cluster_may_be_missing() -> None:
    image = small(extended=True).bitmap(2, 0xAAAA_AAAA).cut(8 * CLUSTER + 700)
    kept = bytes(512) + EXPECTED[2 * CLUSTER + 512 : 2 * CLUSTER + 700]
    assert image.read(2 * CLUSTER, CLUSTER) == kept.ljust(CLUSTER, b"\0")


def test_a_sector_too_many_of_a_neighbour_does_no_harm() -> None:
    # Compressed at the very end of cluster 2, and counted into L1, which is cluster 3.
    data = packed(cluster_bytes(9))
    at = 3 * CLUSTER - len(data)
    image = Image(small().file[:at] + data + small().file[3 * CLUSTER :])
    assert len(data) <= SECTOR
    assert image.l2(0, COMPRESSED | 1 << 56 | at).read(0, CLUSTER) == cluster_bytes(9)


def test_a_compressed_cluster_that_expands_is_refused() -> None:
    bomb = packed(cluster_bytes(0) + b"!")
    image = Image(small().file.ljust(10 * CLUSTER, b"\0") + bomb).l2(0, COMPRESSED | 2 << 56 | 10 * CLUSTER)
    with pytest.raises(FormatError, match="expand beyond"):
        image.read(0, 1)


@pytest.mark.parametrize("length", [-1, 65 * MIB])
def test_a_lookup_has_bounds(length: int) -> None:
    disk = Disk(small().put("QI", 24, SIZE_MAX >> 20, 0).put("I", 36, 2).file)
    with pytest.raises(ValueError, match="of a disk"):
        disk.mapping.lookup(0, length)
    with pytest.raises(ValueError, match="of a disk"):
        disk.mapping.lookup(disk.header.size, 1)


@pytest.mark.parametrize(
    ("at", "length"), [(0, 0), (4 * CLUSTER, CLUSTER - 1), (4 * CLUSTER + 8, CLUSTER), (3 * CLUSTER, 8)]
)
def test_only_what_a_need_names_can_be_fed(at: int, length: int) -> None:
    with pytest.raises(ValueError, match="no slice"):
        Disk(small().file).mapping.feed(at, bytes(length))


# ── Decompression ─────────────────────────────────────────────────────────────────────────────────────

PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.ZLIB: packed,
    Compression.ZSTD: lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("kind", Compression)
@pytest.mark.parametrize("size", [SECTOR, 64 * KIB, 2 * MIB])
def test_one_cluster_and_no_more(kind: Compression, size: int) -> None:
    cluster = random.Random(size).randbytes(size // 2) + b"x" * (size // 2)
    pack = PACKERS[kind]
    assert decompress(kind, pack(cluster), size) == cluster
    assert decompress(kind, memoryview(pack(cluster) + b"neighbour"), size) == cluster
    assert decompress(kind, pack(cluster) + pack(cluster), size) == cluster
    for bad in (cluster + b"x", cluster * 2, bytes(30 * size)):
        with pytest.raises(FormatError, match="expand beyond"):
            decompress(kind, pack(bad), size)
    for bad in (pack(cluster[:-1]), pack(cluster)[: size // 4], pack(b""), b""):
        with pytest.raises(FormatError, match="ends before"):
            decompress(kind, bad, size)
    with pytest.raises(FormatError, match="cannot be"):
        decompress(kind, b"\xff" * 100, size)


def test_zlib_that_has_no_end_is_read_as_qemu_reads_it() -> None:
    cluster = random.Random(1).randbytes(SECTOR)
    stream = zlib.compressobj(6, zlib.DEFLATED, -12)
    endless = stream.compress(cluster) + stream.flush(zlib.Z_SYNC_FLUSH)
    assert decompress(Compression.ZLIB, endless, SECTOR) == cluster
    # What follows is looked at as far as it gives no byte, by zlib itself: qemu gives up here, too.
    with pytest.raises(FormatError, match="cannot be"):
        decompress(Compression.ZLIB, endless + b"\xff" * 10, SECTOR)


def test_zstd_that_asks_for_much_memory_is_refused() -> None:
    asks = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=asks).compressobj()
    with pytest.raises(FormatError, match="cannot be"):
        decompress(Compression.ZSTD, stream.compress(bytes(SECTOR)) + stream.flush(), SECTOR)
    # A frame that claims 2^60 bytes of content.
    claims = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + b"\x01\x00\x00"
    with pytest.raises(FormatError, match="compressed cluster"):
        decompress(Compression.ZSTD, claims, SECTOR)


def unpacked(data: bytes, size: int) -> bytes | None:
    try:
        return decompress(Compression.ZLIB, data, size)
    except FormatError:
        return None


@given(flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=4), text=st.booleans())
@examples(300)
def test_what_zlib_unpacks_the_faster_library_unpacks_to_the_same(
    flips: list[tuple[int, int]], text: bool
) -> None:
    igzip = pytest.importorskip("isal.igzip_lib", reason="there is no ISA-L for this processor")
    noise = random.Random(4).randbytes(2 * KIB)
    cluster = (b"".join(b"%d bottles of beer " % n for n in range(300)) if text else noise * 2)[: 4 * KIB]
    data = bytearray(packed(cluster))
    for at, change in flips:
        data[at % len(data)] ^= change
    answers = []
    for library in (None, igzip):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decompressing, "igzip", library)
            answers.append(unpacked(bytes(data), 4 * KIB))
    # ISA-L lets pass what refers to bytes before the window that was agreed on.
    assert answers[1] == answers[0] or answers[0] is None
    event("unpacked" if answers[0] else "refused")


@given(
    kind=st.sampled_from(Compression), flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=8)
)
@examples(300)
def test_spoilt_compressed_bytes(kind: Compression, flips: list[tuple[int, int]]) -> None:
    cluster = b"".join(b"%d bottles of beer " % n for n in range(300))[: 4 * KIB]
    data = bytearray(PACKERS[kind](cluster))
    for at, change in flips:
        data[at % len(data)] ^= change
    try:
        assert len(decompress(kind, bytes(data), 4 * KIB)) == 4 * KIB
    except FormatError as refused:
        event(refused.reason)


# ── Mutations ─────────────────────────────────────────────────────────────────────────────────────────

# Files of some 100 KiB, of every kind of table.
STOCK = {
    "plain": ("cluster_size=4k", ()),
    "compressed": ("cluster_size=4k", ("-c",)),
    "v2": ("cluster_size=512,compat=0.10", ("-c",)),
    "zstd": ("cluster_size=8k,compression_type=zstd", ("-c",)),
    "extended": ("cluster_size=16k,extended_l2=on", ()),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good images to spoil, with all kinds of clusters in each."""
    folder = tmp_path_factory.mktemp("stock")
    source = folder / "source"
    rng = random.Random(5)
    source.write_bytes(rng.randbytes(40 * KIB) + b"text " * 8 * KIB + bytes(100 * KIB) + rng.randbytes(30 * KIB))
    made = {}
    for name, (options, flags) in STOCK.items():
        image = folder / name
        qemu("qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", "-o", options, source, image)
        qemu_io(image, "write -P 1 20k 9k", "write -z 40k 20k", "discard 60k 20k", "write -P 2 100k 1k")
        made[name] = image.read_bytes()
    return made


def interesting(file: bytes) -> st.SearchStrategy[int]:
    """Numbers that a table of `file` could hold: places in it, flags, and what is next to them."""
    bits = struct.unpack_from(">I", file, 20)[0]
    place = st.integers(0, (len(file) >> bits) + 1).map(lambda number: number << bits)
    flags = st.sampled_from([0, COPIED, COMPRESSED, ALL_ZERO, COPIED | ALL_ZERO, 1 << 57, 0x1FE, 512])
    entries = st.builds(lambda at, flag: at | flag, place, flags)
    packed_entries = st.builds(
        lambda at, sectors: COMPRESSED | sectors << (62 - (bits - 8)) | at,
        st.integers(0, len(file) + 100),
        st.integers(0, (1 << (bits - 8)) - 1),
    )
    powers = st.integers(0, 63).map(lambda power: 1 << power)
    ends = st.sampled_from([(1 << 64) - 1, 1 << 63, len(file), 0xFFFF_FFFF, 0x1_0000_0001])
    likely = entries | packed_entries | place.map(lambda at: COPIED | at)
    return likely | likely | powers | ends | st.integers(0, 200) | st.integers(0, (1 << 64) - 1)


@dataclass(frozen=True)
class Mutation:
    at: int
    width: int
    value: int

    def apply(self, file: bytearray) -> None:
        end = min(self.at + self.width, len(file))
        file[self.at : end] = self.value.to_bytes(8, "big")[-self.width :][: end - self.at]


def targets(file: bytes) -> dict[str, range]:
    """Where the header and the tables of a good image are."""
    header = Disk(file).header
    l1 = range(header.l1.start, header.l1.end, 8)
    tables = [struct.unpack_from(">Q", file, at)[0] & 0xFF_FFFF_FFFF_FE00 for at in l1]
    named = {f"L2 {n}": range(at, at + header.cluster_size, 8) for n, at in enumerate(tables[:4]) if at}
    heads = {"header": range(24, 112, 4), "all of the header": range(4, 400, 4)}
    return heads | {"L1": l1, "anywhere": range(len(file))} | named


@st.composite
def mutated(draw: st.DrawFn, stock: dict[str, bytes]) -> bytes:
    file = stock[draw(st.sampled_from(sorted(stock)))]
    places = targets(file)
    made = bytearray(file)
    for _ in range(draw(st.integers(1, 3))):
        where = places[draw(st.sampled_from(sorted(places)))]
        at = where[draw(st.integers(0, len(where) - 1))]
        width = draw(st.sampled_from([8, 8, 4, 1]))
        Mutation(at, width, draw(interesting(file))).apply(made)
    if draw(st.integers(0, 9)) == 0:
        del made[draw(st.integers(0, len(made))) :]
    return bytes(made)


@needs_qemu
@given(data=st.data())
@examples(400)
def test_mutated_images_are_read_as_qemu_reads_them_or_refused(
    data: st.DataObject, stock: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = data.draw(mutated(stock))
    try:
        disk = Disk(file)
        size = disk.header.size
        # Large ones at their ends, and everywhere in between now and then.
        starts = range(0, size, MIB) if size <= 4 * MIB else [0, size // 3, size - MIB]
        ours = [disk.read(start, min(MIB, size - start)) for start in starts]
    except FormatError as refused:
        event("refused: " + " ".join(word for word in refused.reason.split() if word.isalpha()))
        return
    event(f"read, {'small' if size <= 4 * MIB else 'large'}")
    image = tmp_path_factory.getbasetemp() / "mutated.qcow2"
    image.write_bytes(file)
    theirs = qemu_reads(image, [(start, min(MIB, size - start)) for start in starts])
    if theirs is None:
        event("qemu refuses what matters to it alone (refcounts, snapshots, bitmaps)")
        return
    assert theirs == ours


def qemu_reads(image: Path, ranges: list[tuple[int, int]]) -> list[bytes] | None:
    """Those bytes of the disk as qemu reads them; None where it refuses."""
    found = []
    for start, length in ranges:
        out = image.with_suffix(".part")
        arguments = [
            "-f",
            "qcow2",
            "-O",
            "raw",
            "bs=512",
            f"skip={start // 512}",
            f"count={(start + length) // 512}",
        ]
        done = subprocess.run(
            ["qemu-img", "dd", *arguments, f"if={image}", f"of={out}"], capture_output=True, timeout=60
        )
        if done.returncode:
            return None
        # Some versions count from the beginning, others from what is skipped.
        found.append(out.read_bytes()[:length])
    return found


@given(head=st.binary(max_size=600), size=st.integers(0, 1 << 63))
@examples(200)
def test_no_header_is_too_strange(head: bytes, size: int) -> None:
    size = max(size, HEAD_MAX)
    try:
        header = Header.parse((b"QFI\xfb" + head).ljust(HEAD_MAX, b"\0"), size)
    except FormatError:
        return
    assert header.size <= SIZE_MAX
