"""The unit: under a real systemd as root and as an account of its own, and under systemd's own eyes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cloud.service import poll_until
from tests.instance_disks import make_disk
from tests.node import ROOT
from tests.origin import OriginImage, ScriptedOrigin, pattern
from tests.own_systemd import Systemd, missing_for_systemd
from tests.test_sandbox import LACKING as NO_SANDBOX

UNIT: Final = ROOT / "systemd" / "cachefs.service"
MOUNT_UNIT: Final = ROOT / "systemd" / "var-lib-nova-instances-_base.mount"
UNPRIVILEGED: Final = ROOT / "systemd" / "unprivileged.conf"
OPERATIONS: Final = ROOT / "docs" / "operations.md"
DROP_INS: Final = "/etc/systemd/system/cachefs.service.d"

IMAGE: Final = "60000000-0000-4000-8000-000000000001"
VMDK: Final = "60000000-0000-4000-8000-000000000002"
SIZE: Final = 3 << 20
BYTES: Final = pattern(SIZE)(0, SIZE)
FILE: Final = f"/mnt/cachefs/images/{IMAGE}"
BASES: Final = "/var/lib/nova/instances/_base"
BASE: Final = f"{BASES}/{hashlib.sha1(IMAGE.encode(), usedforsecurity=False).hexdigest()}"


lacking: Final = missing_for_systemd()
needs_systemd = pytest.mark.skipif(lacking is not None, reason=str(lacking))
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


@dataclass
class Host:
    """A node with the unit installed as the documentation says, and nothing started yet."""

    systemd: Systemd
    as_root: bool

    def install(self, endpoint: str) -> None:
        write, path = self.systemd.write, self.systemd.path
        configuration = f"[glance]\nauth_type = none\nendpoints = {endpoint}\n[metrics]\nlisten =\n"
        configuration += "[store]\nmin_free = 0\nmax_size = 2G\n"
        write("/etc/cachefs/cachefs.conf", configuration, 0o600)
        path("/usr/bin/cachefs").symlink_to(Path(sys.executable).with_name("cachefs"))
        path("/mnt/cachefs").mkdir(parents=True, exist_ok=True)
        write("/etc/systemd/system/cachefs.service", UNIT.read_text())
        if not self.as_root:
            self.prepare_account()
        self.change("test", f"StandardOutput=append:{self.systemd.folder}/daemon.log\nRestartSec=100ms")

    def prepare_account(self) -> None:
        """The commands are those of the drop-in's own first lines."""
        steps = [line[4:] for line in UNPRIVILEGED.read_text().splitlines() if line.startswith("#   ")]
        assert [step.split()[0] for step in steps] == ["useradd", "install", "chgrp", "echo", "install"]
        done = self.systemd.run("sh", "-ec", f"cd '{ROOT}'\n" + "\n".join(steps))
        assert done.returncode == 0, done.stderr
        # This interpreter, and this repository, may lie in somebody's home.
        for folder in {ROOT, Path(sys.base_prefix), Path(sys.prefix)}:
            for parent in (folder, *folder.parents):
                inside = self.systemd.path(str(parent))
                if parent != ROOT and not inside.stat().st_mode & 0o001:
                    inside.chmod(inside.stat().st_mode | 0o011)

    def change(self, name: str, lines: str) -> None:
        """A drop-in of the test's own."""
        self.systemd.write(f"{DROP_INS}/{name}.conf", f"[Service]\n{lines}\n")
        self.systemd.systemctl("daemon-reload")

    def unchange(self, name: str) -> None:
        self.systemd.path(f"{DROP_INS}/{name}.conf").unlink()
        self.systemd.systemctl("daemon-reload")

    # ── what is there ──

    @property
    def log(self) -> str:
        return (self.systemd.folder / "daemon.log").read_text(errors="replace")

    def shows(self, name: str) -> str:
        return self.systemd.show("cachefs.service", name)

    def digest(self, path: str, *wrapper: str) -> str:
        """Of a file's bytes, as another process on the node reads it; what it said where it could not."""
        done = self.systemd.run(*wrapper, "sha256sum", path)
        return done.stdout.split()[0] if done.returncode == 0 else done.stderr

    @property
    def mounts(self) -> int:
        """How many lie on the mountpoint, for everybody outside of the unit."""
        lines = self.systemd.run("cat", "/proc/self/mountinfo").stdout.splitlines()
        return sum(line.split()[4] == "/mnt/cachefs" for line in lines)

    def asks(self, *words: str) -> Any:
        done = self.systemd.run("cachefs", *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def wait_restarted(self, times: int) -> None:
        def is_so() -> bool:
            return (self.shows("NRestarts"), self.shows("ActiveState")) == (str(times), "active")

        assert poll_until(is_so, 60), self.systemd.run("systemctl", "status", "cachefs.service").stdout + self.log


@pytest.fixture(scope="module")
def vmdk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """BYTES as a vmdk."""
    folder = tmp_path_factory.mktemp("vmdk")
    (folder / "raw").write_bytes(BYTES)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", str(folder / "raw"), str(folder / "vmdk")]
    subprocess.run(convert, check=True)
    return (folder / "vmdk").read_bytes()


@pytest.fixture(scope="module", params=["root", "unprivileged"])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vmdk: bytes
) -> Iterator[Host]:
    images = [OriginImage.of(IMAGE, "one", BYTES), OriginImage.of(VMDK, "two", vmdk, disk_format="vmdk")]
    folder = tmp_path_factory.mktemp("systemd")
    with ScriptedOrigin(images) as origin, Systemd(folder) as systemd:
        host = Host(systemd, as_root=request.param == "root")
        host.install(origin.url)
        yield host
        systemd.systemctl("stop", "cachefs.service")
        assert host.mounts == 0, host.log
        assert "Traceback" not in host.log, host.log


@pytest.fixture
def host(installed: Host) -> Host:
    """Started."""
    installed.systemd.systemctl("start", "cachefs.service")
    return installed


as_root_only = pytest.mark.parametrize("installed", ["root"], indirect=True)

DIGEST: Final = hashlib.sha256(BYTES).hexdigest()
AS_NOBODY: Final = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


# ── Its life ──────────────────────────────────────────────────────────────────────────────────────────


@needs_systemd
def test_started_means_that_everybody_on_the_node_reads(host: Host) -> None:
    assert host.shows("StatusText") == "mounted on /mnt/cachefs"
    assert host.mounts == 1
    assert host.digest(FILE) == DIGEST
    assert host.digest(FILE, *AS_NOBODY) == DIGEST
    owner = "root" if host.as_root else "cachefs"
    modes = host.systemd.run("stat", "-c", "%a %U %n", "/var/lib/cachefs", "/run/cachefs/control.sock").stdout
    assert modes.splitlines() == [f"700 {owner} /var/lib/cachefs", f"660 {owner} /run/cachefs/control.sock"]
    doctor = host.systemd.run("cachefs", "doctor")
    assert "0 problems, 0 warnings" in doctor.stdout, doctor.stdout


@needs_systemd
def test_what_it_may(host: Host) -> None:
    pid = host.shows("MainPID")
    lines = host.systemd.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    effective = int(status["CapEff"], 16)
    if host.as_root:
        # KILL, SETGID, SETUID, SETPCAP, DAC_READ_SEARCH, SYS_ADMIN: <linux/capability.h>
        assert effective == int(status["CapBnd"], 16) == sum(1 << bit for bit in (2, 5, 6, 7, 8, 21))
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    else:
        assert status["Uid"].split()[0] not in ("0", "65534")
        assert effective == 0


@needs_systemd
@pytest.mark.skipif(NO_SANDBOX is not None, reason=str(NO_SANDBOX))
@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="there is no qemu-nbd (qemu-utils)")
def test_other_formats_are_read_in_their_own_sandbox_inside_of_this_one(host: Host) -> None:
    assert host.digest(f"/mnt/cachefs/raw/{VMDK}") == DIGEST, host.log


@needs_systemd
def test_whoever_needs_the_mount_starts_after_it_and_stops_before_it(host: Host) -> None:
    systemd = host.systemd
    systemd.systemctl("stop", "cachefs.service")
    needy = ("libvirtd", "virtqemud", "libvirt-guests", "nova-compute", "openstack-nova-compute")
    for name in needy:
        reads = f"/bin/sh -c 'sha256sum {FILE} > {systemd.folder}/{name}.%s'"
        service = f"Type=oneshot\nRemainAfterExit=yes\nExecStart={reads % 'start'}\nExecStop={reads % 'stop'}"
        systemd.write(f"/etc/systemd/system/{name}.service", f"[Service]\n{service}\n")
    # As a boot and a shutdown do it: all in one transaction.
    units = " ".join(f"{name}.service" for name in (*needy, "cachefs"))
    systemd.write("/etc/systemd/system/boot.target", f"[Unit]\nDefaultDependencies=no\nWants={units}\n")
    systemd.write("/etc/systemd/system/end.target", f"[Unit]\nDefaultDependencies=no\nConflicts={units}\n")
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "boot.target")
    assert poll_until(lambda: all(systemd.show(name, "ActiveState") == "active" for name in needy), 60)
    systemd.systemctl("start", "end.target")
    assert poll_until(lambda: host.shows("ActiveState") == "inactive", 60)
    assert host.mounts == 0
    for name in needy:
        for when in ("start", "stop"):
            assert (systemd.folder / f"{name}.{when}").read_text().split() == [DIGEST, FILE], name


@needs_systemd
def test_a_daemon_that_was_killed_is_started_again_and_takes_the_dead_mount_away(host: Host) -> None:
    restarts = int(host.shows("NRestarts"))
    said = len(host.log)
    assert host.digest(FILE) == DIGEST
    host.systemd.run("kill", "-KILL", host.shows("MainPID"))
    host.wait_restarted(restarts + 1)
    assert "dead mount" in host.log[said:]
    assert host.mounts == 1
    assert host.digest(FILE) == DIGEST
    assert host.asks("status")["store"]["bytes_cached"] > 0, "what was fetched is still here"


@needs_systemd
@as_root_only
def test_a_daemon_that_is_stuck_says_where_and_is_started_again(host: Host) -> None:
    host.change("impatient", "WatchdogSec=2")  # The unit's own is a minute.
    try:
        host.systemd.systemctl("restart", "cachefs.service")
        restarts = int(host.shows("NRestarts"))
        said = len(host.log)
        host.systemd.run("kill", "-STOP", host.shows("MainPID"))
        host.wait_restarted(restarts + 1)
    finally:
        host.unchange("impatient")
    assert "Fatal Python error: Aborted" in host.log[said:]
    assert "most recent call first" in host.log[said:]
    assert host.digest(FILE) == DIGEST
    host.systemd.systemctl("stop", "cachefs.service")


# ── Nova's folder ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bound(host: Host) -> Iterator[Host]:
    """With `nova/` bound to Nova's folder, as the unit's own first lines say."""
    systemd = host.systemd
    steps = [line[4:] for line in MOUNT_UNIT.read_text().splitlines() if line.startswith("#   ") and "ctl" in line]
    systemd.write(f"/etc/systemd/system/{MOUNT_UNIT.name}", MOUNT_UNIT.read_text())
    done = systemd.run("sh", "-ec", steps[0])
    assert done.returncode == 0, done.stderr + systemd.log
    yield host
    systemd.systemctl("disable", "--now", MOUNT_UNIT.name)
    assert binds(host) == 0


def binds(host: Host) -> int:
    lines = host.systemd.run("cat", "/proc/self/mountinfo").stdout.splitlines()
    return sum(line.split()[4] == BASES for line in lines)


def is_bound(host: Host) -> bool:
    return host.systemd.show(MOUNT_UNIT.name, "ActiveState") == "active"


@needs_systemd
def test_nova_finds_its_images_and_writes_its_files(bound: Host) -> None:
    systemd = bound.systemd
    assert binds(bound) == 1
    assert bound.digest(BASE) == DIGEST
    assert bound.digest(BASE, *AS_NOBODY) == DIGEST
    assert (
        systemd.run("sh", "-ec", f"echo swap > {BASES}/swap_1 && mv {BASES}/swap_1 {BASES}/swap_2").returncode == 0
    )
    done = systemd.run("cat", f"{BASES}/swap_2")
    assert (done.stdout, done.stderr) == ("swap\n", "")
    assert systemd.run("stat", "-c", "%a", f"{BASES}/swap_2").stdout == "644\n"
    doctor = systemd.run("cachefs", "doctor")
    assert f"bound to {BASES}" in doctor.stdout, doctor.stdout
    assert "0 problems, 0 warnings" in doctor.stdout, doctor.stdout
    disk = make_disk(systemd.path("/var/lib/nova/instances/8/disk"), Path(BASE))
    disk.chmod(0o644)
    systemd.systemctl("restart", "cachefs.service")  # And with it the bind.
    assert poll_until(lambda: "named by an instance disk" in str(bound.asks("image", IMAGE)["leases"]), 30), (
        bound.log
    )
    disk.unlink()
    assert poll_until(lambda: is_bound(bound), 20)
    assert systemd.run("cat", f"{BASES}/swap_2").stdout == "swap\n"
    assert systemd.run("rm", f"{BASES}/swap_2").returncode == 0


@needs_systemd
def test_the_bind_of_a_daemon_that_was_killed_is_done_again(bound: Host) -> None:
    systemd = bound.systemd
    restarts = int(bound.shows("NRestarts"))
    # Somebody has a file open through it, so that it is busy, and dead.
    systemd.write(
        "/etc/systemd/system/guest.service", f"[Service]\nExecStart=/bin/sh -c 'exec sleep 1000 < {BASE}'\n"
    )
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "guest.service")
    for turn in (1, 2):
        systemd.run("kill", "-KILL", bound.shows("MainPID"))
        bound.wait_restarted(restarts + turn)
        assert poll_until(lambda: is_bound(bound) and bound.digest(BASE) == DIGEST, 30), (
            systemd.run("systemctl", "status", MOUNT_UNIT.name).stdout + systemd.log
        )
        assert binds(bound) == 1
        assert bound.mounts == 1
    systemd.systemctl("stop", "guest.service")


@needs_systemd
def test_the_bind_goes_before_the_daemon_and_comes_back_with_it(bound: Host) -> None:
    systemd = bound.systemd
    for name in ("libvirtd", "nova-compute"):
        reads = f"/bin/sh -c 'sha256sum {BASE} > {systemd.folder}/{name}.base.%s'"
        service = f"Type=oneshot\nRemainAfterExit=yes\nExecStart={reads % 'start'}\nExecStop={reads % 'stop'}"
        systemd.write(f"/etc/systemd/system/{name}.service", f"[Service]\n{service}\n")
    units = "libvirtd.service nova-compute.service cachefs.service"
    systemd.write("/etc/systemd/system/boot.target", f"[Unit]\nDefaultDependencies=no\nWants={units}\n")
    systemd.systemctl("stop", "cachefs")
    assert (binds(bound), bound.mounts) == (0, 0)
    assert systemd.run("ls", BASES).stdout == ""
    assert systemd.run("stat", "-c", "%U %a", BASES).stdout == "root 755\n", "nobody else fills what is underneath"
    # As a boot and a shutdown do it: all in one transaction.
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "boot.target")
    started = ("nova-compute.service", "libvirtd.service", MOUNT_UNIT.name)
    assert poll_until(lambda: all(systemd.show(name, "ActiveState") == "active" for name in started), 60), (
        systemd.log
    )
    systemd.write("/etc/systemd/system/end.target", f"[Unit]\nDefaultDependencies=no\nConflicts={units}\n")
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "end.target")
    assert poll_until(lambda: bound.shows("ActiveState") == "inactive", 60)
    assert (binds(bound), bound.mounts) == (0, 0)
    for name in ("libvirtd", "nova-compute"):
        for when in ("start", "stop"):
            assert (systemd.folder / f"{name}.base.{when}").read_text().split() == [DIGEST, BASE], name


@needs_systemd
def test_an_unmount_by_hand_is_an_order_to_end(host: Host) -> None:
    host.systemd.run("umount", "/mnt/cachefs")
    assert poll_until(lambda: host.shows("ActiveState") == "inactive", 60), host.log
    assert host.shows("Result") == "success"


@needs_systemd
def test_the_disks_of_instances_are_looked_at_where_the_account_may(host: Host) -> None:
    systemd = host.systemd
    systemd.systemctl("stop", "cachefs.service")
    disk = make_disk(systemd.path("/var/lib/nova/instances/7/disk"), Path(FILE))
    os.chown(disk, 64055, 64055)
    disk.chmod(0o600)
    said = len(host.log)
    systemd.systemctl("start", "cachefs.service")

    def is_named() -> bool:
        return "named by an instance disk" in str(host.asks("image", IMAGE)["leases"])

    if not host.as_root:
        assert poll_until(lambda: "Permission denied" in host.log[said:], 20), host.log[said:]
        assert not is_named()
        disk.chmod(0o644)
        systemd.systemctl("restart", "cachefs.service")
    assert poll_until(is_named, 20), host.log[said:]
    disk.unlink()


@needs_systemd
@pytest.mark.parametrize("store", ["/srv/cachefs", "/var/lib/cachefs"])
def test_a_node_goes_from_root_to_an_account_and_back(tmp_path: Path, store: str) -> None:
    tmp_path.chmod(0o755)
    with ScriptedOrigin([OriginImage.of(IMAGE, "one", BYTES)]) as origin, Systemd(tmp_path) as systemd:
        host = Host(systemd, as_root=True)
        host.install(origin.url)
        configuration = systemd.path("/etc/cachefs/cachefs.conf")
        configuration.write_text(configuration.read_text() + f"path = {store}\n")
        systemd.path("/srv").mkdir(exist_ok=True)
        assert systemd.run("install", "-d", "-m", "0700", store).returncode == 0
        systemd.systemctl("start", "cachefs.service")
        assert systemd.run("cachefs", "prefetch", "--wait", IMAGE).returncode == 0
        systemd.systemctl("stop", "cachefs.service")
        fetched = origin.data_requests

        def is_served() -> None:
            systemd.systemctl("start", "cachefs.service")
            assert host.digest(FILE, *AS_NOBODY) == DIGEST
            assert origin.data_requests == fetched, "what was cached is cached"
            systemd.systemctl("stop", "cachefs.service")

        host.prepare_account()
        systemd.systemctl("daemon-reload")
        if store != "/var/lib/cachefs":
            assert systemd.run("systemctl", "start", "cachefs.service").returncode != 0
            assert f"store {store}: belongs to user 0" in host.log
            systemd.systemctl("stop", "cachefs.service")
            assert systemd.run("chown", "-R", "cachefs:cachefs", store).returncode == 0
        is_served()
        systemd.path(f"{DROP_INS}/unprivileged.conf").unlink()
        systemd.systemctl("daemon-reload")
        if store != "/var/lib/cachefs":
            assert systemd.run("chown", "-R", "root:root", store).returncode == 0
        is_served()


@needs_systemd
@as_root_only
def test_in_a_mount_namespace_of_its_own_nobody_would_see_the_mount(host: Host) -> None:
    """Why the sandbox is no tighter. Should this fail one day, it can be."""
    host.change("tighter", "ProtectSystem=full\nMountFlags=shared")
    try:
        host.systemd.systemctl("restart", "cachefs.service")
        assert host.shows("StatusText") == "mounted on /mnt/cachefs"
        assert host.mounts == 0
        doctor = host.systemd.run("cachefs", "doctor")
        assert doctor.returncode == 1
        assert "not seen from here" in doctor.stdout
    finally:
        host.unchange("tighter")
        host.systemd.systemctl("stop", "cachefs.service")


# ── What systemd thinks of it ─────────────────────────────────────────────────────────────────────────


def analyzed(tmp_path: Path, *drop_ins: Path) -> tuple[str, float]:
    """What `systemd-analyze verify` says, and the exposure by `systemd-analyze security`."""
    program = tmp_path / "cachefs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "cachefs.service"
    unit.write_text(UNIT.read_text().replace("/usr/bin/cachefs", str(program)))
    folder = tmp_path / "cachefs.service.d"
    folder.mkdir()
    for drop_in in drop_ins:
        shutil.copy(drop_in, folder)
    analyze = ["systemd-analyze", "--no-pager"]
    verify = subprocess.run([*analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert verify.returncode == 0, verify.stderr
    score = subprocess.run(
        [*analyze, "security", "--offline=true", unit], capture_output=True, text=True, check=False
    )
    found = re.search(r"exposure level for cachefs.service: ([0-9.]+)", score.stdout)
    assert found is not None, score
    return verify.stdout + verify.stderr, float(found[1])


@needs_analyze
@pytest.mark.parametrize("drop_ins", [(), (UNPRIVILEGED,)], ids=["root", "unprivileged"])
def test_systemd_finds_nothing_wrong_and_the_score_is_the_documented_one(
    drop_ins: tuple[Path, ...], tmp_path: Path
) -> None:
    said, exposure = analyzed(tmp_path, *drop_ins)
    assert said == ""
    documented = re.findall(r"\| `cachefs.service`.*\| ([0-9.]+) \|", OPERATIONS.read_text())
    assert len(documented) == 2
    # Versions of systemd weigh a little differently.
    assert exposure <= float(documented[len(drop_ins)]) + 0.2


@needs_analyze
def test_systemd_finds_nothing_wrong_with_the_bind(tmp_path: Path) -> None:
    analyzed(tmp_path)  # Puts the service beside it.
    unit = tmp_path / MOUNT_UNIT.name
    shutil.copy(MOUNT_UNIT, unit)
    verify = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verify.returncode, verify.stdout + verify.stderr) == (0, "")
    where = re.search(r"^Where=(.*)$", MOUNT_UNIT.read_text(), re.MULTILINE)
    escape = ["systemd-escape", "--path", "--suffix=mount", where[1] if where else ""]
    assert subprocess.run(escape, capture_output=True, text=True, check=True).stdout.strip() == MOUNT_UNIT.name
    lines = MOUNT_UNIT.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"(BindsTo|PartOf|Before|DefaultDependencies|DirectoryMode|LazyUnmount|WantedBy)=", line):
            assert before.startswith(("#", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")), f"{line} has no reason"


def test_every_line_of_the_sandbox_has_its_reason() -> None:
    """A line, or a run of lines, comes after a comment."""
    _, sandbox = UNIT.read_text().split("── The sandbox ──")
    before = ""
    for line in sandbox.split("[Install]")[0].splitlines():
        if re.match(r"[A-Z][A-Za-z]+=", line):
            assert before.startswith(("#", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")), line
        before = line
