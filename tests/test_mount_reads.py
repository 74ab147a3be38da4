"""What is read from the mount is what the image has, whatever the way of reading. The origin is scripted, the
kernel and the daemon are real.

Nothing here touches a mapping of a mounted file in the tests' own process: a page fault holds Python's lock, and
the origin that is to answer it runs in this process, too.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.node import Node, drop_pages, errno_of, read_buffered, read_direct
from tests.origin import Content, Fault, Kind, OriginImage, Request, ScriptedOrigin, Stall, literal, pattern

pytestmark = pytest.mark.mount

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40

EMPTY: Final = "00000000-0000-4000-8000-000000000000"
BYTE: Final = "00000000-0000-4000-8000-000000000001"
SHORT: Final = "00000000-0000-4000-8000-000000004095"
ODD: Final = "00000000-0000-4000-8000-000000065537"
HOLES: Final = "00000000-0000-4000-8000-000009000123"
HUGE: Final = "00000000-0000-4000-8000-002000000000"

HOLES_SIZE: Final = 9 * MIB + 123
HUGE_SIZE: Final = 2 * TIB
# (start, end) of what is zero: less than a page, a page, across chunks, across a span of 4 MiB, to the end.
ZEROS: Final = [
    (1000, 3000),
    (8192, 12288),
    (300 * KIB + 1, MIB),
    (3 * MIB, 5 * MIB + 4097),
    (9 * MIB, HOLES_SIZE),
]


def with_zeros(content: Content, zeros: list[tuple[int, int]]) -> Content:
    def read(offset: int, length: int) -> bytes:
        data = bytearray(content(offset, length))
        for start, end in zeros:
            low, high = max(start - offset, 0), min(end - offset, len(data))
            if low < high:
                data[low:high] = bytes(high - low)
        return bytes(data)

    return read


def islands(size: int, every: int, length: int) -> Content:
    """Zeros, but for `length` bytes of pattern at each multiple of `every`, and at the end."""
    bytes_of = pattern(size)

    def read(offset: int, wanted: int) -> bytes:
        data = bytearray(min(wanted, size - offset))
        for start in [*range(offset - offset % every, offset + len(data), every), size - length]:
            low, high = max(start, offset), min(start + length, offset + len(data))
            if low < high:
                data[low - offset : high - offset] = bytes_of(low, high - low)
        return bytes(data)

    return read


CONTENTS: Final[dict[str, tuple[int, Content]]] = {
    EMPTY: (0, literal(b"")),
    BYTE: (1, literal(b"\x5a")),
    SHORT: (4095, pattern(4095, seed=1)),
    ODD: (65537, pattern(65537, seed=2)),
    HOLES: (HOLES_SIZE, with_zeros(pattern(HOLES_SIZE, seed=3), ZEROS)),
    HUGE: (HUGE_SIZE, islands(HUGE_SIZE, TIB, MIB)),
}
NAMES: Final = {EMPTY: "empty", BYTE: "byte", SHORT: "short", ODD: "odd", HOLES: "holes", HUGE: "huge"}
# Places worth reading in every image: edges of pages, of blocks, of chunks, of spans, and of the image.
EDGES: Final = (0, 1, 511, 512, 4095, 4096, 65535, 65536, 256 * KIB, MIB, 4 * MIB, 8 * MIB)
LENGTHS: Final = (1, 512, 4096, 65536, 65537, 300_000)


def ranges_of(size: int, seed: int, count: int) -> list[tuple[int, int]]:
    """(offset, length) around the edges of an image, before, across and after its end, and anywhere."""
    rng = random.Random(seed)
    places = [edge for edge in EDGES if edge <= size] + [max(size - edge, 0) for edge in EDGES] + [size, size + 1]
    near = [(max(place - rng.randrange(2), 0), rng.choice(LENGTHS)) for place in places]
    return near + [(rng.randrange(size + 1), rng.choice(LENGTHS)) for _ in range(count)]


def expected(image: str, offset: int, length: int) -> bytes:
    size, content = CONTENTS[image]
    return content(offset, min(length, size - offset)) if offset < size else b""


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    images = [OriginImage(id_, NAMES[id_], size, content) for id_, (size, content) in CONTENTS.items()]
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture
def node(tmp_path: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    """A daemon with an empty store."""
    with Node(tmp_path, origin.url) as node:
        yield node


@pytest.fixture(scope="module")
def warm_node(tmp_path_factory: pytest.TempPathFactory, origin: ScriptedOrigin) -> Iterator[Node]:
    """The module's daemon, whose store knows whatever was read before."""
    with Node(tmp_path_factory.mktemp("node"), origin.url) as node:
        yield node


sized = pytest.mark.parametrize("image", list(CONTENTS), ids=list(NAMES.values()))


# ── Ways of reading ───────────────────────────────────────────────────────────────────────────────────


@sized
def test_the_size_is_final_at_the_first_stat(node: Node, image: str) -> None:
    size = CONTENTS[image][0]
    assert node.path(image).stat().st_size == size
    read_buffered(node.path(image), 0, 1)
    with node.path(image).open("rb") as file:
        assert os.fstat(file.fileno()).st_size == size
        assert file.seek(0, os.SEEK_END) == size


@sized
def test_buffered_reads(warm_node: Node, image: str) -> None:
    path = warm_node.path(image)
    for repeat in range(2):  # What was fetched, then what is stored.
        for offset, length in ranges_of(CONTENTS[image][0], seed=repeat, count=20):
            assert read_buffered(path, offset, length) == expected(image, offset, length), (offset, length)
        drop_pages(path)


@sized
def test_direct_reads_of_whole_sectors(warm_node: Node, image: str) -> None:
    path = warm_node.path(image)
    for offset, length in ranges_of(CONTENTS[image][0], seed=3, count=20):
        offset, length = offset & ~511, -(-length // 512) * 512
        assert read_direct(path, offset, length) == expected(image, offset, length), (offset, length)


@sized
def test_direct_reads_of_anything_are_right_or_refused_by_the_kernel(warm_node: Node, image: str) -> None:
    path = warm_node.path(image)
    for offset, length in ranges_of(CONTENTS[image][0], seed=4, count=20):
        try:
            data = read_direct(path, offset, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            assert data == expected(image, offset, length), (offset, length)


def test_one_read_of_everything(node: Node) -> None:
    assert node.path(HOLES).read_bytes() == expected(HOLES, 0, HOLES_SIZE)


def test_one_direct_read_of_everything(node: Node) -> None:
    assert read_direct(node.path(HOLES), 0, HOLES_SIZE) == expected(HOLES, 0, HOLES_SIZE)


def test_a_scattered_read(warm_node: Node) -> None:
    file = os.open(warm_node.path(HOLES), os.O_RDONLY)
    try:
        parts = [bytearray(n) for n in (1, 4095, 70_000, 3, MIB)]
        count = os.preadv(file, parts, 299 * KIB)
    finally:
        os.close(file)
    assert b"".join(parts) == expected(HOLES, 299 * KIB, count)
    assert count == sum(map(len, parts))


MAPPED: Final = """
    import mmap, random, sys
    path, original, seed = sys.argv[1:]
    right = open(original, "rb").read()
    with open(path, "rb") as file:
        for access in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
            with mmap.mmap(file.fileno(), 0, access, mmap.PROT_READ) as mapped:
                assert len(mapped) == len(right)
                rng = random.Random(seed)
                for _ in range(50):
                    at = rng.randrange(len(right))
                    end = at + rng.choice((1, 4096, 100_000))
                    assert mapped[at:end] == right[at:end], (at, end)
                assert mapped[:] == right
                tail = -len(right) % mmap.PAGESIZE
"""


@pytest.mark.parametrize("image", [BYTE, SHORT, ODD, HOLES], ids=["byte", "short", "odd", "holes"])
def test_mapped_reads(node: Node, tmp_path: Path, image: str) -> None:
    run_reader(MAPPED, node.path(image), original_of(image, tmp_path), 0)


def original_of(image: str, folder: Path) -> Path:
    path = folder / f"original-{image}"
    path.write_bytes(expected(image, 0, CONTENTS[image][0]))
    return path


def reader(program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_reader(program: str, *args: object) -> None:
    process = reader(program, *args)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


@pytest.mark.parametrize("image", [BYTE, ODD, HOLES], ids=["byte", "odd", "holes"])
def test_sendfile(node: Node, image: str) -> None:
    size = CONTENTS[image][0]
    with node.path(image).open("rb") as file, tempfile.TemporaryFile() as out:
        for start in (0, size // 3):
            out.truncate(0)
            out.seek(0)
            at = start
            while count := os.sendfile(out.fileno(), file.fileno(), at, 1 << 30):
                at += count
            assert at == size
            out.seek(0)
            assert out.read() == expected(image, start, size)


@pytest.mark.parametrize("image", [BYTE, ODD, HOLES], ids=["byte", "odd", "holes"])
def test_splice(node: Node, image: str) -> None:
    size = CONTENTS[image][0]
    inlet, outlet = os.pipe()
    spliced = bytearray()
    with node.path(image).open("rb") as file, os.fdopen(inlet, "rb", buffering=0) as pipe, os.fdopen(outlet, "wb"):
        while len(spliced) < size:
            count = os.splice(file.fileno(), outlet, 1 << 20, offset_src=len(spliced))
            assert count > 0, "the end, too early"
            while count:
                piece = pipe.read(count)
                spliced += piece
                count -= len(piece)
        assert os.splice(file.fileno(), outlet, 4096, offset_src=size) == 0
    assert spliced == expected(image, 0, size)


def test_two_tebibytes(node: Node, origin: ScriptedOrigin) -> None:
    path = node.path(HUGE)
    assert path.stat().st_size == HUGE_SIZE
    origin.clear()
    for place in (0, TIB, TIB + MIB, HUGE_SIZE // 3, HUGE_SIZE - 4096, HUGE_SIZE - 65537):
        for read in (read_buffered, read_direct):
            assert read(path, place - place % 512, 65536) == expected(HUGE, place - place % 512, 65536)
    assert read_buffered(path, HUGE_SIZE - 1, 10) == expected(HUGE, HUGE_SIZE - 1, 1)
    assert read_buffered(path, HUGE_SIZE, 10) == b""
    assert origin.bytes_sent < 200 * MIB  # And not the zeros between.


READ_AT_RANDOM: Final = """
    import mmap, os, random, sys
    path, original, seed = sys.argv[1:]
    right = open(original, "rb").read()
    rng = random.Random(int(seed))
    direct = os.O_DIRECT if int(seed) % 2 else 0
    file = os.open(path, os.O_RDONLY | direct)
    room = mmap.mmap(-1, 512 << 10)
    for _ in range(100):
        at = rng.randrange(len(right)) & (~511 if direct else -1)
        length = rng.choice((512, 4096, 65536, 512 << 10))
        count = os.preadv(file, [memoryview(room)[:length]], at)
        assert room[:count] == right[at : at + length], (at, length)
        if rng.random() < 0.05:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""


def test_many_processes_at_once(node: Node, tmp_path: Path) -> None:
    original = original_of(HOLES, tmp_path)
    readers = [reader(READ_AT_RANDOM, node.path(HOLES), original, seed) for seed in range(8)]
    for process in readers:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


# ── What reaches the daemon ───────────────────────────────────────────────────────────────────────────


def test_the_page_cache_survives_closing_and_opening(node: Node) -> None:
    path = node.path(HOLES)
    assert path.read_bytes() == expected(HOLES, 0, HOLES_SIZE)
    before = node.requests_seen()
    assert before > 0
    for _ in range(3):
        assert path.read_bytes() == expected(HOLES, 0, HOLES_SIZE)
    assert node.requests_seen() == before
    drop_pages(path)
    path.read_bytes()
    assert node.requests_seen() > before


def test_what_was_read_is_fetched_once(node: Node, origin: ScriptedOrigin) -> None:
    origin.clear()
    path = node.path(HOLES)
    path.read_bytes()
    node.wait_for_status(lambda now: now["store"]["bytes_cached"] == HOLES_SIZE)
    assert origin.bytes_sent == HOLES_SIZE
    assert read_direct(path, 0, HOLES_SIZE) == expected(HOLES, 0, HOLES_SIZE)
    assert origin.bytes_sent == HOLES_SIZE


STALLED: Final = "00000000-0000-4000-8000-000000057a11"
STALLED_SIZE: Final = 32 * MIB
STALLED_BYTES: Final = pattern(STALLED_SIZE, seed=9)
READERS_PER_WAY: Final = 100
# Two readers have no block in common, and none of them one with what is cached before.
READER_STRIDE: Final = 128 * KIB
FIRST_READER: Final = 6 * MIB


def test_blocked_misses_never_delay_a_hit(tmp_path: Path, origin: ScriptedOrigin) -> None:
    """By outcome: the hits are all done while each of the misses still waits."""
    release = threading.Event()
    stalls = threading.Event()

    def stall(request: Request) -> Fault | None:
        if stalls.is_set() and request.kind is Kind.DATA and request.image == STALLED:
            return Stall(release=release)
        return None

    origin.add(OriginImage(STALLED, "stalled", STALLED_SIZE, STALLED_BYTES))
    origin.script = stall
    deadlines = {"read_deadline": 300}, {"read_timeout": 300}
    try:
        with (
            Node(tmp_path, origin.url, mount=deadlines[0], glance=deadlines[1]) as node,
            ThreadPoolExecutor(2 * READERS_PER_WAY) as pool,
            ThreadPoolExecutor(1) as pool_of_hits,
        ):
            try:
                stalled, cached = node.path(STALLED), node.path(HOLES)
                assert read_buffered(stalled, 0, MIB) == STALLED_BYTES(0, MIB)
                cached.read_bytes()
                node.wait_for_status(lambda now: now["fetcher"]["bytes_in_memory"] == 0)
                present = node.status()["store"]["bytes_cached"] - HOLES_SIZE
                assert MIB <= present <= FIRST_READER
                stalls.set()
                misses = list(start_misses(pool, stalled))
                node.wait_for_status(lambda now: now["reads"]["waiting"] >= len(misses))
                pool_of_hits.submit(hit_often, cached, stalled).result(timeout=60)
                assert cached.stat().st_size == HOLES_SIZE
                assert STALLED in os.listdir(node.mountpoint / "images")
                assert not any(miss.done() for _, miss in misses)
            finally:
                release.set()
            for offset, miss in misses:
                assert miss.result(timeout=60) == STALLED_BYTES(offset, 4096), offset
    finally:
        origin.script = None
        origin.remove(STALLED)


def test_a_read_that_is_not_answered_in_time_fails_and_may_be_tried_again(
    tmp_path: Path, origin: ScriptedOrigin
) -> None:
    with Node(tmp_path, origin.url, mount={"read_deadline": 0.5}) as node:
        path = node.path(HOLES)
        assert read_direct(path, 0, 4096) == expected(HOLES, 0, 4096)
        node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
        stall = Stall()
        origin.fault(stall)
        far = 8 * MIB
        before = len(origin.data)  # Other tests share this origin.
        assert errno_of(lambda: read_direct(path, far, 4096)) == errno.EIO
        assert read_direct(path, 0, 4096) == expected(HOLES, 0, 4096)
        stall.release.set()
        # The flight goes on without its reader, and serves the next one.
        node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
        assert read_direct(path, far, 4096) == expected(HOLES, far, 4096)
        assert len([r for r in origin.data[before:] if r.extent and r.extent[0] == far]) == 1


def hit_often(cached: Path, partly_cached: Path) -> None:
    for _ in range(3):
        drop_pages(cached)
        assert cached.read_bytes() == expected(HOLES, 0, HOLES_SIZE)
        assert read_direct(cached, 0, HOLES_SIZE) == expected(HOLES, 0, HOLES_SIZE)
        for offset in range(0, MIB, 64 * KIB):
            assert read_direct(partly_cached, offset, 4096) == STALLED_BYTES(offset, 4096)


def start_misses(pool: ThreadPoolExecutor, path: Path) -> Iterator[tuple[int, Future[bytes]]]:
    for number in range(READERS_PER_WAY):
        offset = FIRST_READER + 2 * number * READER_STRIDE
        yield offset, pool.submit(read_buffered, path, offset, 4096)
        yield offset + READER_STRIDE, pool.submit(read_direct, path, offset + READER_STRIDE, 4096)
