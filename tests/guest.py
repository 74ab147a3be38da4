"""Guests: a kernel of the distribution, a small root disk, and QEMU that boots it. Rule: nothing here knows what
cachefs is; a guest's disk is a path, and what the guest saw is what it said on its console.

    disk = GuestDisk.make(folder)                           # a partition table, an ext4, files of known hashes
    with Guest(overlay_on(base, folder / "overlay.qcow2")) as guest:
        said = guest.finish()                               # it booted, read, wrote, and powered itself off
    assert said.files == disk.files

`setup/install test` puts the kernel package and a static busybox, unpacked and not installed, into `.guest`. The
kernel is given to QEMU with an initial filesystem that loads what reaches the disk; the rest is on the disk.
KVM where the processor has it, else TCG.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import platform
import random
import re
import selectors
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import zstandard

from tests.node import ROOT

KIB, MIB = 1 << 10, 1 << 20
QEMU: Final = "qemu-system-x86_64"
KERNEL: Final = ROOT / ".guest" / "vmlinuz"
BUSYBOX: Final = ROOT / ".guest" / "busybox"
MODULES: Final = ROOT / ".guest" / "modules"
# Those that a kernel has built in are not among its modules, and not needed.
WANTED: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "libcrc32c", "ext4")

BOOT_TIMEOUT_S: Final = 180.0  # A guest is done in some ten seconds, also with TCG.
MEMORY_MIB: Final = 192
CONSOLE_PIECE_BYTES: Final = 65536

# Not a whole number of MiB, nor of pages.
DISK_BYTES: Final = 96 * MIB + 512
PARTITION_OFFSET: Final = MIB
_FILESYSTEM_KIB: Final = 94 * KIB
_FILES: Final = 300
_FILE_BYTES_MAX: Final = 40_000
_BALLAST_FILES, _BALLAST_BYTES = 20, 3 * MIB
_UUID: Final = "cac4ef50-0000-4000-8000-000000000009"
_TOOLS: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing_for_guests() -> str | None:
    """What this machine lacks for a guest, in words; None where they can run."""
    if platform.machine() != "x86_64":
        return f"the tests have no guest for {platform.machine()}"
    for tool in (QEMU, "qemu-img", "mkfs.ext4", "sfdisk", "setpriv"):
        if shutil.which(tool, path=_TOOLS) is None:
            return f"there is no {tool} (setup/install test)"
    for file in (KERNEL, BUSYBOX):
        if not file.exists():
            return f"there is no {file.relative_to(ROOT)} (setup/install test)"
    return None


@cache
def accelerator() -> str:
    """A /dev/kvm may also be emulated, without vmx and svm: such a one needs a minute for a second of TCG's."""
    processor = Path("/proc/cpuinfo").read_text()
    if re.search(r"^flags\s*:.* (vmx|svm)\b", processor, re.MULTILINE) and os.access(
        "/dev/kvm", os.R_OK | os.W_OK
    ):
        return "kvm"
    return "tcg"


def run(*command: object) -> str:
    """Runs a tool; what it said."""
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PATH": _TOOLS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


# ── The first filesystem ──────────────────────────────────────────────────────────────────────────────

_FIRST_INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do [ -f $module ] && $b insmod $module; done
tries=0
until [ -b /dev/vda1 ] || [ $tries = 50 ]; do $b sleep 0.1; tries=$((tries + 1)); done
$b mount -t ext4 /dev/vda1 /root && $b mount --move /dev /root/dev && exec $b switch_root /root /sbin/init
echo "guest: there is no root disk"
$b poweroff -f
"""


def load_order(modules: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, bytes) of these modules and of what they depend on, each after what it needs.

    A kernel's package has no modules.dep, which is made where one is installed: the modules themselves tell.
    """
    files = {module_name(path): path for path in modules.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in order or name not in files:
            return
        module = unpacked(files[name])
        for other in needs(module):
            add(other)
        order[name] = module

    for name in wanted:
        add(name)
    return list(order.items())


def module_name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


def needs(module: bytes) -> list[str]:
    """What a module says that it depends on."""
    found = re.search(rb"(?<![a-z])depends=([a-zA-Z0-9_,-]*)\0", module)
    return found[1].decode().replace("-", "_").split(",") if found and found[1] else []


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive (newc) of (path, mode, bytes) as the kernel unpacks it. A character device is the console."""
    made = bytearray()
    for number, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        major, minor = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name), 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + name, data):
            made += part + bytes(-len(part) % 4)
    return bytes(made)


@cache
def first_filesystem() -> bytes:
    """What the kernel begins with: busybox, the modules that reach a disk, and the way to it."""
    folders = ("bin", "dev", "modules", "root")
    modules = enumerate(load_order(MODULES, WANTED))
    return archive(
        [
            *((name, stat.S_IFDIR | 0o755, b"") for name in folders),
            ("dev/console", stat.S_IFCHR | 0o600, b""),
            ("init", stat.S_IFREG | 0o755, _FIRST_INIT.encode()),
            ("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes()),
            *((f"modules/{at:02}-{name}.ko", stat.S_IFREG | 0o644, data) for at, (name, data) in modules),
        ]
    )


# ── The root disk ─────────────────────────────────────────────────────────────────────────────────────

_APPLETS: Final = ["cat", "dd", "echo", "mount", "poweroff", "sed", "sh", "sha256sum", "sync", "wc"]
# `look` (which MiB of the disk to look at) and `again` come with the kernel's command line.
_INIT: Final = """#!/bin/sh
export PATH=/bin
say() { echo "guest: $*"; }
hash_files() { cd /data && sha256sum * | sed "s/^/guest: $1 /"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
say sectors $(cat /sys/block/vda/size)
hash_files file
for mib in $(echo $look | sed 's/,/ /g'); do
    say mib $mib $(dd if=/dev/vda bs=1M skip=$mib count=1 2>/dev/null | sha256sum)
done
echo boot >>/var/boots
sync
say boots $(wc -l </var/boots)
if [ "$again" ]; then
    say waiting
    read answer
    echo 3 >/proc/sys/vm/drop_caches
    hash_files again
fi
mount -o remount,ro / || say "the root disk is not clean"
say done
poweroff -f
"""


@dataclass(frozen=True)
class GuestDisk:
    """A disk that boots. `files`: sha256 by name of what the guest reads; it leaves most of the disk alone."""

    path: Path
    files: dict[str, str]

    @property
    def size(self) -> int:
        return DISK_BYTES

    @classmethod
    def make(cls, folder: Path) -> Self:
        """Without root; the same bytes in every run."""
        tree, disk = folder / "tree", folder / "disk.raw"
        files = _write_tree(tree)
        disk.touch()
        os.truncate(disk, DISK_BYTES)
        table = folder / "disk.sfdisk"
        table.write_text(
            f"label: gpt\nlabel-id: {_UUID}\n"
            f"start={PARTITION_OFFSET // 512}, size={_FILESYSTEM_KIB * 2}, type=linux\n"
        )
        run("sh", "-c", 'exec sfdisk --quiet "$1" <"$2"', "sfdisk", disk, table)
        # Without lazy_itable_init no thread of the guest's kernel writes tables at moments of its own.
        options = f"offset={PARTITION_OFFSET},hash_seed={_UUID},lazy_itable_init=0,nodiscard,root_owner=0:0"
        run(
            *("mkfs.ext4", "-q", "-F", "-U", _UUID, "-E", options),
            *("-d", tree, disk, f"{_FILESYSTEM_KIB}k"),
        )
        shutil.rmtree(tree)
        return cls(disk, files)

    def hashes_of(self, mibs: Iterable[int], disk_bytes: int) -> dict[int, str]:
        """Of these MiB, by number, of a disk of this size that begins with this one and goes on with zeros."""
        with open(self.path, "rb") as file:
            return {mib: _hash_of_mib(file, mib, disk_bytes) for mib in mibs}


def _hash_of_mib(file: BinaryIO, mib: int, disk_bytes: int) -> str:
    file.seek(mib * MIB)
    return hashlib.sha256(file.read(MIB).ljust(min(MIB, disk_bytes - mib * MIB), b"\0")).hexdigest()


def _write_tree(tree: Path) -> dict[str, str]:
    rng = random.Random(9)
    for folder in ("bin", "sbin", "dev", "proc", "sys", "var", "data", "ballast"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin" / "busybox")
    for applet in _APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin" / "init").write_text(_INIT)
    for program in ("bin/busybox", "sbin/init"):
        (tree / program).chmod(0o755)
    (tree / "var" / "boots").touch()
    hashes = {}
    for number in range(_FILES):
        data = _file(rng, number)
        (tree / "data" / f"f{number}").write_bytes(data)
        hashes[f"f{number}"] = hashlib.sha256(data).hexdigest()
    for number in range(_BALLAST_FILES):
        (tree / "ballast" / f"b{number}").write_bytes(rng.randbytes(_BALLAST_BYTES))
    return hashes


def _file(rng: random.Random, number: int) -> bytes:
    """Every other one is text, which compresses."""
    length = rng.randrange(1, _FILE_BYTES_MAX)
    if number % 2:
        return rng.randbytes(length)
    return (b"%d bottles of beer on the wall\n" % number * length)[:length]


def overlay_on(base: Path, overlay: Path) -> Path:
    """What a guest writes to, above a raw base: as Nova makes it, of the base's size."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay)
    return overlay


# ── A guest ───────────────────────────────────────────────────────────────────────────────────────────


class GuestFailed(Exception):
    """The guest ended, or did not say in time what was waited for; with its console."""


@dataclass(frozen=True)
class Said:
    """What a guest said of its disk. `again`: hashes of the files when it had dropped its caches; `mibs`: of those
    that it was to look at. `seconds`: from power on to off."""

    disk_bytes: int
    files: dict[str, str]
    again: dict[str, str]
    mibs: dict[int, str]
    boots: int
    seconds: float


class Guest:
    """One run of a guest, from `with` on. `look`: the MiB of the disk that it is to hash besides its files. With
    `again`, it waits when it has read and written, and after `go_on` reads its files once more."""

    def __init__(self, overlay: Path, *, look: Iterable[int] = (), again: bool = False) -> None:
        self._overlay = overlay
        self._settings = f"look={','.join(map(str, look))}" + (" again=1" if again else "")
        self._console = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def __enter__(self) -> Self:
        first = self._overlay.with_suffix(".initrd")
        first.write_bytes(first_filesystem())
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._command(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def _command(self, first: Path) -> list[str]:
        disk = f"file={self._overlay},format=qcow2,if=virtio,cache=none,aio=threads"
        kernel = f"console=ttyS0 quiet panic=-1 mitigations=off {self._settings}"
        return [
            *(QEMU, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-accel", accelerator(), "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)),
            *("-kernel", str(KERNEL), "-initrd", str(first), "-append", kernel, "-drive", disk),
        ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._overlay.with_suffix(".initrd").unlink()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def console(self) -> str:
        return self._console.decode(errors="replace").replace("\r", "")

    def wait_for(self, text: str) -> None:
        """Until the guest has said it. Raises GuestFailed, at the latest BOOT_TIMEOUT_S after power on."""
        for _ in self._heard():
            if text in self.console:
                return
        raise GuestFailed(f"it ended without {text!r}:\n{self.console}")

    def go_on(self) -> None:
        """To a guest that waits."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def finish(self) -> Said:
        """What it has said, when it has powered itself off."""
        assert self._process is not None
        for _ in self._heard():
            pass
        status, seconds = self._process.wait(), time.monotonic() - self._began
        lines = [line.split()[1:] for line in self.console.splitlines() if line.startswith("guest: ")]
        if status != 0 or ["done"] not in lines:
            raise GuestFailed(f"exit status {status}:\n{self.console}")
        return _said(lines, seconds)

    def _heard(self) -> Iterator[None]:
        """Once now, and whenever it has said more; ends with the guest."""
        assert self._process is not None
        assert self._process.stdout is not None
        output = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            yield
            while True:
                left_s = self._began + BOOT_TIMEOUT_S - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise GuestFailed(f"not within {BOOT_TIMEOUT_S:.0f} s:\n{self.console}")
                piece = os.read(output.fileno(), CONSOLE_PIECE_BYTES)
                if not piece:
                    return
                self._console += piece
                if b"KVM internal error" in self._console:  # QEMU does not end then.
                    raise GuestFailed(self.console)
                yield


def _said(lines: Iterable[list[str]], seconds: float) -> Said:
    hashes: dict[str, dict[str, str]] = {"file": {}, "again": {}, "mib": {}}
    numbers = {}
    for kind, *rest in lines:
        if kind == "mib":
            hashes[kind][rest[0]] = rest[1]
        elif kind in hashes:
            hashes[kind][rest[1]] = rest[0]
        elif kind in ("sectors", "boots"):
            numbers[kind] = int(rest[0])
    mibs = {int(mib): found for mib, found in hashes["mib"].items()}
    return Said(numbers["sectors"] * 512, hashes["file"], hashes["again"], mibs, numbers["boots"], seconds)
