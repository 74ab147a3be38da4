"""Disk images, made on the spot and without root: a partition table, and an ext4 filled as it is made. Rule:
the same bytes in every run, so that what the demo says can be repeated.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DISK_BYTES = 1 << 30
PARTITION_OFFSET = 1 << 20
_FILESYSTEM_KIB = (DISK_BYTES - 2 * PARTITION_OFFSET) >> 10  # The last MiB holds the second copy of the table.

_PACKAGES, _FILES_PER_PACKAGE = 40, 10
_FILE_BYTES_MEAN = 700_000
_SEED = 1
# The next build brings new versions of these, and one package more, which shifts what is laid out after it.
_UPDATED_PACKAGES = (7, 23)
_UUID = "cac4ef50-0000-4000-8000-00000000000{}"

RELEASE_FILE = "/etc/os-release"

Run = Callable[[Sequence[str]], object]


@dataclass(frozen=True)
class Tree:
    """What is in a disk: the number of its files, and their bytes."""

    files: int
    total: int


def _content(build: int, package: int, number: int) -> bytes:
    version = build if package in _UPDATED_PACKAGES else 1
    content = random.Random(f"{_SEED}.{package}.{number}.{version}")
    return content.randbytes(int(content.expovariate(1 / _FILE_BYTES_MEAN)) + 1000)


def release(build: int) -> bytes:
    return f'NAME="Demo Linux"\nVERSION="1.{build}"\nBUILD_ID={build}\n'.encode()


def module(package: int, number: int) -> tuple[str, bytes]:
    """(path, bytes) of one of the first build's large files."""
    return _path(package, number), _content(1, package, number)


def _path(package: int, number: int) -> str:
    return f"/usr/lib/package{package:02}/module{number}.so"


def _contents(build: int) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every file of build 1 or 2."""
    yield RELEASE_FILE, release(build)
    for package in range(0 if build == 2 else 1, _PACKAGES + 1):
        for number in range(_FILES_PER_PACKAGE):
            yield _path(package, number), _content(build, package, number)


def write_tree(folder: Path, build: int) -> Tree:
    """Writes the files of a build below `folder`."""
    files = total = 0
    for path, data in _contents(build):
        target = folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        files, total = files + 1, total + len(data)
    return Tree(files, total)


def make_disk(disk: Path, tree: Path, build: int, run: Run) -> None:
    """A disk with one partition, which holds the files of `tree`."""
    disk.touch()
    os.truncate(disk, DISK_BYTES)
    table = disk.with_suffix(".sfdisk")
    table.write_text(
        f"label: gpt\nlabel-id: {_UUID.format(build)}\n"
        f"start={PARTITION_OFFSET // 512}, size={_FILESYSTEM_KIB * 2}, type=linux, name=root\n"
    )
    run(["sh", "-c", 'exec sfdisk --quiet "$1" <"$2"', "sfdisk", str(disk), str(table)])
    table.unlink()
    options = [
        f"offset={PARTITION_OFFSET}", f"hash_seed={_UUID.format(build)}", "lazy_itable_init=1", "nodiscard",
        "root_owner=0:0",
    ]  # fmt: skip
    command = ["mkfs.ext4", "-q", "-F", "-L", "root", "-U", _UUID.format(build), "-E", ",".join(options)]
    run([*command, "-d", str(tree), str(disk), f"{_FILESYSTEM_KIB}k"])
