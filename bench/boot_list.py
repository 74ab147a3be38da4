"""A recorded boot as a file: what it read of a disk, in which order and at what pace, and where the disk has data.
Rule: nothing here reads a disk at a pace, or measures anything.

A gzipped text, which `zcat` shows:

    # anything: how it was recorded
    size 2147483648
    data <base64>                                bits, the lowest first: which 64 KiB of the disk have data
    <offset> <length> <microseconds> <n> ...     one line for each read, in the order in which they came

A read begins when all reads before it have been answered, but for those that are `n` lines back (they were under
way when it came), and the guest has thought for so many microseconds since the last of these answers.
"""

from __future__ import annotations

import base64
import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 64 << 10
DEBIAN = Path(__file__).with_name("data") / "boot-debian-12.gz"

_PAGE = 4096
# Of a page, so many bytes are hexadecimal digits of random ones (4 bits each), the rest is always the same: zlib
# makes 1 of 2.2, as of the disk of a system.
_DIGITS = 3200
_SAME = (b"The quick brown fox jumps over the lazy dog. " * 20)[: _PAGE - _DIGITS]


@dataclass(frozen=True)
class Read:
    """`beside`: how many lines back the reads are that were still under way."""

    offset: int
    length: int
    think_s: float
    beside: tuple[int, ...] = ()


@dataclass(frozen=True)
class Boot:
    """`data`: numbers of the 64 KiB blocks of the disk that are not all zeros."""

    size: int
    data: frozenset[int]
    reads: list[Read]
    notes: list[str] = field(default_factory=list)

    @property
    def touched(self) -> set[int]:
        """Numbers of the 64 KiB blocks that it reads of."""
        return pieces(self.reads, BLOCK)

    @property
    def think_s(self) -> float:
        return sum(read.think_s for read in self.reads)


def pieces(reads: Sequence[Read], size: int) -> set[int]:
    """Numbers of the aligned pieces of `size` bytes that are read of."""
    return {
        number
        for read in reads
        for number in range(read.offset // size, (read.offset + read.length - 1) // size + 1)
    }


def save(path: Path, boot: Boot) -> None:
    bitmap = bytearray(-(-boot.size // BLOCK // 8))
    for number in boot.data:
        bitmap[number // 8] |= 1 << number % 8
    lines = [*(f"# {note}".rstrip() for note in boot.notes), f"size {boot.size}"]
    lines.append(f"data {base64.b64encode(bitmap).decode()}")
    for read in boot.reads:
        beside = "".join(f" {back}" for back in read.beside)
        lines.append(f"{read.offset} {read.length} {round(read.think_s * 1e6)}{beside}")
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def load(path: Path) -> Boot:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    notes = [line[1:].strip() for line in lines if line.startswith("#")]
    size, data, *reads = [line for line in lines if not line.startswith("#")]
    bitmap = base64.b64decode(data.removeprefix("data "))
    numbers = (number for number in range(8 * len(bitmap)) if bitmap[number // 8] >> number % 8 & 1)
    return Boot(int(size.removeprefix("size ")), frozenset(numbers), [_read(line) for line in reads], notes)


def _read(line: str) -> Read:
    offset, length, think, *beside = map(int, line.split())
    return Read(offset, length, think / 1e6, tuple(beside))


def summary(boot: Boot) -> str:
    """What it is like, in a line."""
    mib = {size: len(pieces(boot.reads, size)) * size >> 20 for size in (4096, BLOCK, 1 << 20, 4 << 20)}
    deepest = max((len(read.beside) for read in boot.reads), default=0) + 1
    return (
        f"{len(boot.reads)} reads, {sum(read.length for read in boot.reads) >> 20} MiB, up to {deepest} at once, "
        f"think time {boot.think_s:.1f} s; touches {mib[4096]} MiB in pages, {mib[BLOCK]} in 64 KiB, "
        f"{mib[1 << 20]} in 1 MiB, {mib[4 << 20]} in 4 MiB; the disk has {len(boot.data) * BLOCK >> 20} MiB in it"
    )


def blocks_with_data(disk: Path) -> frozenset[int]:
    found = []
    with disk.open("rb") as file:
        for number in range(-(-disk.stat().st_size // BLOCK)):
            if file.read(BLOCK).strip(b"\0"):
                found.append(number)
    return frozenset(found)


def make_image(boot: Boot, path: Path) -> None:
    """A disk of the boot's size with data where its disk had some: the same bytes in every run, no two pages
    alike, and zlib makes 1 of 2.2 of them."""
    source = random.Random(boot.size)
    with path.open("wb") as file:
        file.truncate(boot.size)
        for number in sorted(boot.data):
            file.seek(number * BLOCK)
            digits = source.randbytes(_DIGITS // 2 * (BLOCK // _PAGE)).hex().encode()
            file.write(b"".join(digits[at : at + _DIGITS] + _SAME for at in range(0, len(digits), _DIGITS)))
