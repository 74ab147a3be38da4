"""qcow2 images with every option that qemu-img has for them, made by qemu itself. Rule: what an image holds is
what `qemu-img convert -O raw` says, never what this file meant to write.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MIB = 1 << 20
SECTOR = 512

missing_qemu = next((tool for tool in ("qemu-img", "qemu-io") if shutil.which(tool) is None), None)


def qemu(*arguments: str | Path, status: int = 0) -> str:
    """Runs one of qemu's tools; what it said."""
    done = subprocess.run([str(part) for part in arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    """Writes to an image as a guest would: each command is one of qemu-io's."""
    arguments: list[str | Path] = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
    for command in commands:
        arguments += ["-c", command]
    qemu(*arguments, image)


@lru_cache(8)
def contents(seed: int, size: int) -> bytes:
    """A disk in runs of up to 200 KB that begin and end anywhere: random bytes, text that compresses, zeros, and
    one byte over and over."""
    rng = random.Random(seed)
    made = bytearray()
    while len(made) < size:
        length = rng.randrange(1, 200_000)
        match rng.randrange(5):
            case 0:
                made += rng.randbytes(length)
            case 1:
                made += (b"%d bottles of beer on the wall\n" % len(made) * length)[:length]
            case 2:
                made += bytes([rng.randrange(1, 256)]) * length
            case _:
                made += bytes(length)
    return bytes(made[:size])


@dataclass(frozen=True)
class Animal:
    """One image: `build` makes it at a path. `size`: of its disk, in bytes."""

    name: str
    size: int
    build: Callable[[Path], None]

    def make(self, folder: Path) -> Path:
        """The image, as a file of this name."""
        image = folder / f"{self.name}.qcow2"
        self.build(image)
        return image


def raw_of(image: Path) -> Path:
    """The image's disk as qemu reads it, beside the image; sparse where it is zero."""
    raw = image.with_suffix(".raw")
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw


def _converted(size: int, options: str, *flags: str) -> Callable[[Path], None]:
    """A disk with contents, written by qemu-img."""

    def build(image: Path) -> None:
        source = image.with_suffix(".source")
        source.write_bytes(contents(size, size))
        arguments = ["-o", options] if options else []
        qemu("qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", *arguments, source, image)
        source.unlink()

    return build


def _written(size: int, options: str, *commands: str) -> Callable[[Path], None]:
    """An empty image, then written to as by a guest."""

    def build(image: Path) -> None:
        arguments = ["-o", options] if options else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *arguments, image, str(size))
        if commands:
            qemu_io(image, *commands)

    return build


def _then(build: Callable[[Path], None], *steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(image: Path) -> None:
        build(image)
        for step in steps:
            step(image)

    return both


def _guest(*commands: str) -> Callable[[Path], None]:
    return lambda image: qemu_io(image, *commands)


def _snapshot(name: str) -> Callable[[Path], str]:
    return lambda image: qemu("qemu-img", "snapshot", "-c", name, image)


def _resized(size: int, *flags: str) -> Callable[[Path], str]:
    return lambda image: qemu("qemu-img", "resize", "-q", *flags, "-f", "qcow2", image, str(size))


def _cut_behind_last_data(image: Path) -> None:
    """Leaves out the end of the file that qemu reads as zeros anyway."""
    whole = image.read_bytes()
    image.write_bytes(whole.rstrip(b"\0"))


def _dirty(image: Path) -> None:
    """A guest that wrote and was killed: lazy refcounts leave the image marked as dirty."""
    arguments = ["-c", "write -P 7 100k 300k", "-c", "flush", "-c", "abort"]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, str(image)], capture_output=True, timeout=60)


# Sizes that are no multiple of the cluster, nor of 4 KiB.
ODD = 5 * MIB + 3 * SECTOR
LARGE = 41 * MIB + 5 * SECTOR
HUGE = 2 << 40

_MIXED = (
    "write -P 1 0 1M",
    "write -z 128k 256k",
    "write -z -u 512k 128k",
    "write -P 2 700k 3k",
    "discard 64k 64k",
    "write -P 3 2M 64k",
    "write -P 4 2050k 512",
    "write -P 5 4000k 1k",
)
# Subclusters are of 2 KiB with clusters of 64 KiB.
_SUBCLUSTERS = (
    "write -P 1 2k 2k",
    "write -P 2 10k 6k",
    "write -z 12k 2k",
    "write -P 3 130k 20k",
    "write -z 256k 64k",
    "write -P 4 260k 2k",
    "discard 132k 4k",
    "write -P 5 512k 256k",
    "write -z -u 576k 64k",
    "discard 640k 64k",
    "write -P 6 1M 70k",
    "write -z 1026k 2k",
)


def _zoo() -> list[Animal]:
    zoo = [
        Animal("empty", MIB, _written(MIB, "")),
        Animal("nothing", 0, _written(0, "")),
        Animal("v2", ODD, _converted(ODD, "compat=0.10")),
        Animal("v2-compressed", ODD, _converted(ODD, "compat=0.10", "-c")),
        Animal("v2-guest", ODD, _written(ODD, "compat=0.10", *_MIXED)),
        Animal("guest", ODD, _written(ODD, "", *_MIXED)),
        Animal("guest-4k", ODD, _written(ODD, "cluster_size=4k", *_MIXED)),
        Animal("guest-512", ODD, _written(ODD, "cluster_size=512", *_MIXED)),
        Animal("guest-2m", ODD, _written(ODD, "cluster_size=2M", *_MIXED)),
        Animal("one-sector", SECTOR, _written(SECTOR, "", "write -P 9 0 512")),
        Animal("out-of-order", LARGE, _converted(LARGE, "", "-c", "-W", "-m", "8")),
        Animal("lazy", ODD, _converted(ODD, "lazy_refcounts=on")),
        Animal("dirty", ODD, _then(_converted(ODD, "lazy_refcounts=on"), _dirty)),
        Animal("refcounts-1", ODD, _converted(ODD, "refcount_bits=1")),
        Animal("refcounts-64", ODD, _converted(ODD, "refcount_bits=64", "-c")),
        Animal("overwritten", ODD, _then(_converted(ODD, "", "-c"), _guest(*_MIXED))),
        Animal("overwritten-zstd", ODD, _then(_converted(ODD, "compression_type=zstd", "-c"), _guest(*_MIXED))),
        Animal("snapshots", ODD, _snapshots("")),
        Animal("snapshots-v2", ODD, _snapshots("compat=0.10")),
        Animal("snapshots-extended", ODD, _snapshots("extended_l2=on")),
        Animal("bitmap", ODD, _then(_converted(ODD, ""), _bitmap)),
        Animal(
            "grown",
            LARGE,
            _then(_converted(ODD, "cluster_size=512"), _resized(LARGE), _guest("write -P 8 40M 9k")),
        ),
        Animal("shrunk", 3 * MIB, _then(_converted(ODD, ""), _resized(3 * MIB, "--shrink"))),
        Animal("cut", ODD, _then(_written(ODD, "", "write -P 1 0 1M", "write -P 2 3M 1k"), _cut_behind_last_data)),
        Animal("subclusters", ODD, _written(ODD, "extended_l2=on", *_SUBCLUSTERS)),
        Animal("subclusters-16k", ODD, _written(ODD, "extended_l2=on,cluster_size=16k", *_SUBCLUSTERS)),
        Animal("subclusters-2m", ODD, _written(ODD, "extended_l2=on,cluster_size=2M", *_SUBCLUSTERS)),
        Animal(
            "subclusters-overwritten",
            ODD,
            _then(_converted(ODD, "extended_l2=on,compression_type=zstd", "-c"), _guest(*_SUBCLUSTERS)),
        ),
        Animal(
            "sparse-2t",
            HUGE,
            _written(HUGE, "", "write -P 1 0 64k", "write -P 2 1T 1M", f"write -P 3 {HUGE - 512} 512"),
        ),
    ]
    for preallocation in ("metadata", "falloc", "full"):
        for extended in ("on", "off"):
            options = f"preallocation={preallocation},extended_l2={extended}"
            name = preallocation + ("-extended" if extended == "on" else "")
            zoo.append(Animal(name, ODD, _converted(ODD, options)))
            zoo.append(Animal(f"{name}-guest", ODD, _written(ODD, options, *_SUBCLUSTERS)))
    for cluster in ("512", "1k", "2k", "4k", "8k", "16k", "32k", "128k", "256k", "512k", "1M", "2M"):
        size = LARGE if cluster.endswith("M") else ODD
        options = f"cluster_size={cluster}"
        zoo.append(Animal(f"clusters-{cluster}", size, _converted(size, options)))
        zoo.append(Animal(f"zlib-{cluster}", size, _converted(size, options, "-c")))
        zoo.append(Animal(f"zstd-{cluster}", size, _converted(size, f"{options},compression_type=zstd", "-c")))
    zoo.append(Animal("plain", LARGE, _converted(LARGE, "")))
    zoo.append(Animal("zlib", LARGE, _converted(LARGE, "", "-c")))
    zoo.append(Animal("zstd", LARGE, _converted(LARGE, "compression_type=zstd", "-c")))
    for cluster in ("16k", "64k", "2M"):
        zoo.append(Animal(f"extended-{cluster}", ODD, _converted(ODD, f"extended_l2=on,cluster_size={cluster}")))
    return zoo


def _snapshots(options: str) -> Callable[[Path], None]:
    return _then(
        _converted(ODD, options),
        _snapshot("first"),
        _guest("write -P 1 300k 500k", "write -P 2 2M 1k"),
        _snapshot("second"),
        _guest("write -P 3 310k 1k", "discard 3M 512k"),
    )


def _bitmap(image: Path) -> None:
    qemu("qemu-img", "bitmap", "--add", image, "changes")
    qemu_io(image, "write -P 1 1M 100k")


ZOO = {animal.name: animal for animal in _zoo()}
