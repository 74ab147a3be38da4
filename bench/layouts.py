"""Two versions of a disk with an operating system, the second with its files laid out anew: what both cost in the
store, against one. Target: at most 1.35.

The disks are ext4, filled with debugfs, which puts each file behind the one before, in the order that it is told.
The files are those of this machine's /usr in some thousand folders, chosen by their names' hashes: figures of two
machines differ a little.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import trio
from xxhash import xxh3_128_digest

from bench.bare import fill_from
from bench.lab import GIB, MIB, Lab
from bench.table import Row
from cachefs.plan.cutting import ZERO_PAGE
from cachefs.plan.extents import PAGE
from cachefs.store.format import ViewKind
from tests.stores import running

SOURCE = Path("/usr")
FILE_MAX_BYTES = 64 * MIB
# Of the second version's files: this share is other bytes, this is gone, and as many are new.
CHANGED, REMOVED, ADDED = 0.01, 0.005, 0.005
SEED = 1
# What is not a word of debugfs's own.
UNSPEAKABLE = frozenset('"\\\n\t ')
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Entry:
    """A file of a disk: its folder and name there, and where its bytes are now."""

    folder: str
    name: str
    source: Path


@dataclass(frozen=True)
class Version:
    """A disk's files in the order in which they are laid out. `number` makes its filesystem another one."""

    what: str
    number: int
    files: Sequence[Entry]


def run(lab: Lab) -> Iterator[Row]:
    """The first version is landed, then the second into the same store, and so for each order anew. Orders: the
    same, so that what is new or gone shifts the rest; folders shuffled, as where packages come in another order;
    and every file shuffled within its folder as well, which no builder of images does."""
    total = GIB // 2 if lab.quick else GIB
    with lab.scratch() as folder:
        files = _files(total)
        first = Version("", 1, files)
        size = (total * 3 // 2 + len(files) * 256) // MIB * MIB
        base = _disk(folder, first, size)
        lab.say(f"layouts: {len(files)} files, {_blocks(base) // MIB} MiB of a {size // MIB} MiB disk")
        known = _pages(base)
        others = _other_files(folder, files)
        for version, target in (
            (Version("in the same order", 2, others), 1.35),
            (Version("folders in another order", 3, _shuffled(others, within=False)), 1.35),
            (Version("every file in another order", 4, _shuffled(others, within=True)), None),
        ):
            disk = _disk(folder, version, size)
            with lab.scratch() as store:
                one, both, shared = trio.run(_land, store, base, disk)
            apart = len(_pages(disk) - known) * PAGE
            disk.unlink()
            yield Row(
                "layouts",
                f"two versions of a disk, {version.what}: bytes on disk / of one",
                both / one,
                target=target,
                samples={"one_bytes": one, "both_bytes": both, "shared_bytes": shared, "new_pages_bytes": apart},
            )
            yield Row("layouts", f"  shared of {one // MIB} MiB", shared / MIB, "MiB")
            yield Row("layouts", "  the same if single pages were shared", (one + apart) / one)


async def _land(folder: Path, base: Path, disk: Path) -> tuple[int, int, int]:
    """Bytes that the store occupies with the first, and with both; and what of the second it shared."""
    async with running(folder, span_size=None) as store:
        occupied = []
        for number, path in enumerate((base, disk), start=1):
            view = store.view(str(UUID(int=number)), ViewKind.ORIGINAL, path.stat().st_size)
            shared_before = store.writer.lander.bytes_shared
            await fill_from(store, view, path)
            occupied.append(store.segments.blocks_bytes())
        return occupied[0], occupied[1], store.writer.lander.bytes_shared - shared_before


# ── the files ──


def _files(total: int) -> list[Entry]:
    """About `total` bytes of files, in whole folders."""
    folders: dict[str, list[tuple[Entry, int]]] = {}
    for folder, _, names in os.walk(SOURCE):
        for name in sorted(names):
            path = Path(folder, name)
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and 0 < found.st_size <= FILE_MAX_BYTES and os.access(path, os.R_OK):
                entry = Entry(folder, name, path)
                if not UNSPEAKABLE & set(str(path)):
                    folders.setdefault(folder, []).append((entry, found.st_size))
    chosen: list[Entry] = []
    folder_max = total // 4
    for folder in sorted(folders, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(length for _, length in folders[folder])
        if size <= folder_max:
            chosen += [entry for entry, _ in folders[folder]]
            total -= size
        if total <= 0:
            break
    if total > 0:
        raise RuntimeError(f"{SOURCE} has too little for this: {total // MIB} MiB are missing")
    return sorted(chosen, key=lambda entry: (entry.folder, entry.name))


def _other_files(folder: Path, files: Sequence[Entry]) -> list[Entry]:
    """The second version's, in the order of the first's."""
    rng = random.Random(SEED)
    made = folder / "made"
    made.mkdir()
    out: list[Entry] = []
    for number, entry in enumerate(files):
        fate = rng.random()
        length = entry.source.stat().st_size
        if fate < CHANGED or CHANGED + REMOVED <= fate < CHANGED + REMOVED + ADDED:
            source = made / str(number)
            source.write_bytes(rng.randbytes(length))
            if fate < CHANGED:
                out.append(Entry(entry.folder, entry.name, source))
            else:
                out += [Entry(entry.folder, f"{entry.name}.new", source), entry]
        elif fate >= CHANGED + REMOVED:
            out.append(entry)
    return out


def _shuffled(files: Sequence[Entry], *, within: bool) -> list[Entry]:
    """Folders in another order; `within` them their files, too."""
    rng = random.Random(SEED)
    folders: dict[str, list[Entry]] = {}
    for entry in files:
        folders.setdefault(entry.folder, []).append(entry)
    names = list(folders)
    rng.shuffle(names)
    if within:
        for entries in folders.values():
            rng.shuffle(entries)
    return [entry for name in names for entry in folders[name]]


# ── the disks ──


def _disk(folder: Path, version: Version, size: int) -> Path:
    """An ext4 of `size` bytes with these files."""
    disk = folder / f"disk{version.number}"
    disk.touch()
    os.truncate(disk, size)
    uuid = UUID(int=version.number << 64)
    options = f"hash_seed={uuid},lazy_itable_init=1,nodiscard,root_owner=0:0"
    _run("mkfs.ext4", "-q", "-F", "-U", str(uuid), "-E", options, str(disk))
    script = folder / "script"
    script.write_text("\n".join(_script(version.files)) + "\n")
    said = _run("debugfs", "-w", "-f", str(script), str(disk))
    if len(said.splitlines()) > 1:  # It ends with 0 whatever happens; its name and version it says always.
        raise RuntimeError(f"debugfs: {said[:500]}")
    return disk


def _script(files: Sequence[Entry]) -> Iterator[str]:
    made = {"/"}
    now = ""
    for entry in files:
        path = Path(entry.folder)
        for folder in map(str, (*reversed(path.parents), path)):
            if folder not in made:
                made.add(folder)
                yield f"mkdir {folder}"
        if entry.folder != now:
            now = entry.folder
            yield f"cd {now}"
        yield f"write {entry.source} {entry.name}"


def _run(tool: str, *arguments: str) -> str:
    found = shutil.which(tool, path=_SBIN)
    if found is None:
        raise RuntimeError(f"there is no {tool} (e2fsprogs)")
    done = subprocess.run(
        [found, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    return done.stderr


def _pages(disk: Path) -> set[bytes]:
    """The digests of all its pages that are not zero."""
    found = set()
    with disk.open("rb", buffering=0) as file:
        while data := file.read(MIB):
            found |= {
                xxh3_128_digest(page)
                for page in (data[at : at + PAGE] for at in range(0, len(data), PAGE))
                if page != ZERO_PAGE
            }
    return found


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512
