"""A system's boot, recorded: makes a Debian root disk, boots it under QEMU and writes down which reads reach the
disk, and when. Rule: of the disk's bytes nothing is kept but where there are any.

    python -m bench.boot_record [--disk DISK --kernel VMLINUZ --initrd INITRD] [--scale N] OUT

As root, with debootstrap, a mirror of Debian, and QEMU; some five minutes. A disk that is there already (a raw
image, its first partition is the root filesystem) is recorded with `--disk`. How the list that ships came to be:

- The disk: Debian 12 with what its images for clouds have (systemd, cloud-init, ssh, ...), in an ext4 of 2 GiB
  that nobody has booted before; cloud-init finds its data on the disk itself.
- The guest: two processors, virtio-blk, a new overlay (qcow2, as Nova makes it) above the disk, `cache=none`.
  Kernel and initial filesystem are given to QEMU, so a boot loader's reads are not in the list. It ends when
  cloud-init has finished, which is after multi-user.target.
- The overlay's backing file is this program, an NBD server: what it is asked for is what an image would be.
- QEMU translates every instruction (TCG) where there is no KVM that works, and the guest is some ten times slower
  (57 s). So all times are divided by `--scale`, 10: a replay on a local file takes 5.8 s then, as long as such a
  boot does with KVM. And so that the disk is not ten times too fast for this guest, each answer is kept back for
  `--scale` times 0.1 ms, as a local SSD would.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bench import boot_list
from bench.boot_list import Boot, Read
from cachefs.sources import nbd
from tests.guest import accelerator

DISK_BYTES = 2 << 30
PARTITION_OFFSET = 1 << 20
MIRROR = "http://deb.debian.org/debian"
SUITE = "bookworm"
# What debian-12-genericcloud has and a minimal system has not.
PACKAGES = (
    "apparmor,bash-completion,ca-certificates,chrony,cloud-init,cron,curl,dbus,dbus-user-session,e2fsprogs,gcc,git,"
    "gnupg,ifupdown,initramfs-tools,iproute2,isc-dhcp-client,kmod,less,libpam-systemd,linux-image-cloud-amd64,locales,"
    "man-db,nano,netbase,openssh-server,perl,polkitd,python3,python3-cffi-backend,qemu-guest-agent,rsyslog,sudo,systemd,systemd-sysv,"
    "tcpdump,udev,unattended-upgrades,vim-tiny"
)
SSD_S = 0.0001
BOOT_MAX_S = 900.0
FINISHED = b"Cloud-init v. "  # ... finished at ..., the last line of its last stage.
_TOOLS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_NBD_FLAGS = nbd.EXPORT_HAS_FLAGS | nbd.EXPORT_READ_ONLY
_CONNECTION_FLAGS = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES


# ── The disk ──────────────────────────────────────────────────────────────────────────────────────────


def make_disk(folder: Path, tree: Path | None = None) -> tuple[Path, Path, Path]:
    """(disk, kernel, initial filesystem). `tree`: what debootstrap made before."""
    if tree is None:
        tree = folder / "tree"
        _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, tree, MIRROR)
    _settle_in(tree)
    disk, table = folder / "disk.raw", folder / "disk.sfdisk"
    disk.touch()
    os.truncate(disk, DISK_BYTES)
    sectors = (DISK_BYTES - 2 * PARTITION_OFFSET) // 512
    table.write_text(f"label: gpt\nstart={PARTITION_OFFSET // 512}, size={sectors}, type=linux\n")
    _run("sh", "-c", 'exec sfdisk --quiet "$1" <"$2"', "sfdisk", disk, table)
    options = f"offset={PARTITION_OFFSET},lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    _run("mkfs.ext4", "-q", "-F", "-L", "root", "-E", options, "-d", tree, disk, f"{sectors // 2}k")
    kernel = max((tree / "boot").glob("vmlinuz-*"))
    return disk, kernel, max((tree / "boot").glob("initrd.img-*"))


def _settle_in(tree: Path) -> None:
    """What distinguishes an image from a fresh installation."""
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/fstab").write_text("LABEL=root / ext4 rw,discard,errors=remount-ro 0 1\n")
    (tree / "etc/machine-id").write_text("")
    seed = tree / "var/lib/cloud/seed/nocloud"
    seed.mkdir(parents=True, exist_ok=True)
    (seed / "meta-data").write_text("instance-id: guest-1\nlocal-hostname: guest\n")
    (seed / "user-data").write_text("#cloud-config\npassword: guest\nchpasswd: {expire: false}\n")
    (tree / "etc/cloud/cloud.cfg.d/99-here.cfg").write_text("datasource_list: [NoCloud, None]\n")
    for key in (tree / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(tree / folder, ignore_errors=True)
        (tree / folder / "partial").mkdir(parents=True)


# ── The server ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Seen:
    offset: int
    length: int
    came_s: float
    left_s: float = 0.0


class Disk:
    """An NBD server of one client: gives the file's bytes, each answer `answer_s` late, and notes all reads."""

    def __init__(self, path: Path, at: Path, answer_s: float) -> None:
        self.seen: list[Seen] = []
        self.began_s = time.monotonic()
        self._answer_s = answer_s
        self._file = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(at))
        self._listener.listen()
        self._sending = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        stream = client.makefile("rb")
        client.sendall(nbd.GREETING.pack(nbd.NBD_MAGIC, nbd.OPTION_MAGIC, _CONNECTION_FLAGS))
        stream.read(4)
        with ThreadPoolExecutor(64) as pool:
            if not self._negotiate(client, stream):
                return
            while True:
                header = stream.read(nbd.REQUEST.size)
                if len(header) < nbd.REQUEST.size:
                    return
                _, _, command, handle, offset, length = nbd.REQUEST.unpack(header)
                if command == nbd.CMD_DISC:
                    return
                if command != nbd.CMD_READ:
                    raise RuntimeError(f"NBD command {command}")
                seen = Seen(offset, length, time.monotonic())
                self.seen.append(seen)
                pool.submit(self._answer, client, handle, seen)

    def _negotiate(self, client: socket.socket, stream: BinaryIO) -> bool:
        read = stream.read
        while True:
            header = read(nbd.OPTION.size)
            if len(header) < nbd.OPTION.size:
                return False
            _, option, length = nbd.OPTION.unpack(header)
            read(length)
            if option not in (nbd.OPT_GO, nbd.OPT_INFO):
                kind = nbd.REP_ACK if option == nbd.OPT_ABORT else nbd.REP_ERR_UNSUP
                client.sendall(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, 0))
                continue
            export = nbd.EXPORT.pack(nbd.INFO_EXPORT, self._size, _NBD_FLAGS)
            sizes = struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, 512, 4096, 32 << 20)
            for info in (export, sizes):
                client.sendall(
                    nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, nbd.REP_INFO, len(info)) + info
                )
            client.sendall(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, nbd.REP_ACK, 0))
            if option == nbd.OPT_GO:
                return True

    def _answer(self, client: socket.socket, handle: int, seen: Seen) -> None:
        data = os.pread(self._file, seen.length, seen.offset)
        time.sleep(max(0.0, seen.came_s + self._answer_s - time.monotonic()))
        with self._sending:
            seen.left_s = time.monotonic()
            client.sendall(nbd.REPLY.pack(nbd.REPLY_MAGIC, 0, handle) + data)


# ── The boot ──────────────────────────────────────────────────────────────────────────────────────────


def boot(disk: Path, kernel: Path, initrd: Path, folder: Path, answer_s: float) -> tuple[list[Seen], float]:
    """(what was read, seconds from power on to the end of the boot)."""
    server = Disk(disk, folder / "disk.sock", answer_s)
    overlay = folder / "overlay.qcow2"
    base = f"nbd:unix:{folder / 'disk.sock'}"
    size = str(disk.stat().st_size)
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", base, overlay, size)
    command = [
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-accel", accelerator(), "-cpu", "max", "-smp", "2", "-m", "1024"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "root=/dev/vda1 ro console=ttyS0 panic=-1 mitigations=off net.ifnames=0"),
        *("-drive", f"file={overlay},format=qcow2,if=virtio,cache=none,aio=threads"),
        *("-nic", "user,model=virtio-net-pci,restrict=on", "-device", "virtio-rng-pci"),
    ]
    server.seen.clear()  # What qemu-img looked at.
    began_s = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        timer = threading.Timer(BOOT_MAX_S, guest.kill)
        timer.start()
        try:
            assert guest.stdout is not None
            for line in guest.stdout:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
                if FINISHED in line and b" finished " in line:
                    break
            else:
                raise RuntimeError("the guest ended, or did not finish in time")
            return list(server.seen), time.monotonic() - began_s
        finally:
            timer.cancel()
            guest.kill()


# ── The list ──────────────────────────────────────────────────────────────────────────────────────────


def as_reads(seen: Sequence[Seen], scale: float) -> list[Read]:
    """A read waits for all that had been answered when it came, and then for its think time; not for those that
    were still under way."""
    reads: list[Read] = []
    answered_s = seen[0].came_s if seen else 0.0
    open_: list[int] = []  # Numbers of reads that may be under way.
    for number, each in enumerate(seen):
        still = [other for other in open_ if not seen[other].left_s or seen[other].left_s > each.came_s]
        for other in set(open_) - set(still):
            answered_s = max(answered_s, seen[other].left_s)
        think_s = max(0.0, each.came_s - answered_s) / scale
        reads.append(Read(each.offset, each.length, think_s, tuple(number - other for other in still)))
        open_ = [*still, number]
    return reads


def _run(*command: object) -> None:
    environment = os.environ | {"PATH": _TOOLS}
    subprocess.run(list(map(str, command)), check=True, env=environment, stdin=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.boot_record", description="Records a boot.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--initrd", type=Path)
    parser.add_argument("--tree", type=Path, help="what debootstrap made before")
    parser.add_argument("--scale", type=float, default=10.0, help="how much slower this guest is: %(default)s")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on a real disk: %(default)s")  # noqa: S108
    arguments = parser.parse_args()
    scale: float = arguments.scale
    folder = Path(tempfile.mkdtemp(prefix="cachefs-boot-", dir=arguments.dir))
    try:
        if arguments.disk:
            disk, kernel, initrd = arguments.disk, arguments.kernel, arguments.initrd
        else:
            disk, kernel, initrd = make_disk(folder, arguments.tree)
        seen, took_s = boot(disk, kernel, initrd, folder, scale * SSD_S)
        reads = as_reads(seen, scale)
        notes = [
            f"A boot of {arguments.disk or f'Debian {SUITE}'}, from power on to the end of cloud-init.",
            f"QEMU ({accelerator()}), 2 processors, 1 GiB; {took_s:.1f} s, all times divided by {scale:g}.",
            f"Each answer was kept back for {scale * SSD_S * 1e3:g} ms. How: see bench/boot_record.py",
            "offset length think_us back ...: see bench/boot_list.py",
        ]
        boot_list.save(arguments.out, Boot(disk.stat().st_size, boot_list.blocks_with_data(disk), reads, notes))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(boot_list.summary(boot_list.load(arguments.out)))


if __name__ == "__main__":
    main()
