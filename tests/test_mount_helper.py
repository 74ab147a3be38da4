"""`mount -t cachefs`: the helper that mount(8) calls starts the daemon, and returns when files can be read."""

from __future__ import annotations

import hashlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cachefs import asking
from tests.cloud.service import clean_environment, poll_until
from tests.node import ROOT, Node, unmount
from tests.origin import OriginImage, ScriptedOrigin, pattern
from tests.own_systemd import Systemd, missing_for_systemd

IMAGE = "50000000-0000-4000-8000-000000000001"
SIZE = 1 << 20
DIGEST = hashlib.sha256(pattern(SIZE)(0, SIZE)).hexdigest()
OPERATIONS = ROOT / "docs" / "operations.md"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cachefs.mount_helper", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Configured, and never started: the helper does that."""
    with ScriptedOrigin([OriginImage(IMAGE, "helped", SIZE, pattern(SIZE))]) as origin:
        node = Node(tmp_path, origin.url)
        try:
            yield node
        finally:
            if node.mounted:
                unmount(node.mountpoint)


@pytest.mark.mount
@pytest.mark.parametrize("how", ["source", "option"])
def test_it_is_mounted_when_the_helper_returns_and_gone_after_umount(node: Node, how: str) -> None:
    call: Sequence[str | Path] = {
        "source": (node.config_file, node.mountpoint, "-o", "rw,nofail,x-systemd.automount,_netdev"),
        "option": ("cachefs", node.mountpoint, "-n", "-o", f"ro,config_file={node.config_file}"),
    }[how]
    done = run(*call)
    assert (done.returncode, done.stderr) == (0, "")
    assert (node.mountpoint / "images" / IMAGE).read_bytes() == pattern(SIZE)(0, SIZE)
    daemon = os.pidfd_open(asking.ask(str(node.socket), "status")["pid"])
    subprocess.run(["umount", node.mountpoint], check=True)
    assert select.select([daemon], [], [], 60)[0], "the daemon did not end"
    os.close(daemon)
    assert not node.mounted


@pytest.mark.mount
def test_what_keeps_the_daemon_from_starting_is_said(node: Node) -> None:
    node.configure(store={"high_watermark": 7})
    done = run(node.config_file, node.mountpoint)
    assert done.returncode == 32
    assert "high_watermark" in done.stderr
    assert not node.mounted


def test_options_are_refused_or_somebody_elses(tmp_path: Path) -> None:
    assert run("cachefs", tmp_path, "-f", "-o", "ro,nodev,x-gvfs-hide,comment=a=b").returncode == 0
    refused = run("cachefs", tmp_path, "-o", "max_size=1G")
    assert refused.returncode == 1
    assert "unknown option 'max_size=1G'" in refused.stderr


@pytest.mark.mount
@pytest.mark.skipif(missing_for_systemd() is not None, reason=str(missing_for_systemd()))
def test_the_documented_line_of_fstab_works_by_hand_and_in_systemd(tmp_path: Path) -> None:
    (line,) = re.findall(r"^cachefs +/mnt/cachefs +fuse\.cachefs .*$", OPERATIONS.read_text(), re.MULTILINE)
    log = tmp_path / "daemon.log"
    image = OriginImage(IMAGE, "helped", SIZE, pattern(SIZE))
    with ScriptedOrigin([image]) as origin, Systemd(tmp_path) as systemd:
        systemd.write(
            "/etc/cachefs/cachefs.conf",
            f"[DEFAULT]\nlog_file = {log}\n[glance]\nauth_type = none\nendpoints = {origin.url}\n"
            "[metrics]\nlisten =\n",
        )
        for name in ("mount.cachefs", "mount.fuse.cachefs"):
            systemd.path(f"/usr/sbin/{name}").symlink_to(Path(sys.executable).with_name(name))
        systemd.path("/mnt/cachefs").mkdir(exist_ok=True)
        systemd.write("/etc/fstab", line + "\n")

        def run(*command: str) -> str:
            done = systemd.run(*command)
            assert (done.returncode, done.stderr) == (0, ""), done
            return done.stdout

        def reads() -> bool:
            return run("sha256sum", f"/mnt/cachefs/images/{IMAGE}").split()[0] == DIGEST

        def ends(number: int) -> bool:
            return poll_until(lambda: log.read_text().count("INFO cachefs.daemon [-] stopped") == number, 60)

        run("mount", "-a")
        assert reads()
        run("mount", "-a")  # It is mounted already: nothing to do.
        assert "cachefs fuse.cachefs" in run("findmnt", "-n", "-o", "SOURCE,FSTYPE", "/mnt/cachefs")
        run("umount", "/mnt/cachefs")
        assert ends(1), log.read_text()

        systemd.systemctl("daemon-reload")
        systemd.systemctl("start", "mnt-cachefs.mount")
        assert reads()
        before = systemd.show("mnt-cachefs.mount", "Before").split()
        assert {"libvirtd.service", "nova-compute.service"} <= set(before)
        systemd.systemctl("stop", "mnt-cachefs.mount")
        assert ends(2), log.read_text()
        assert "Traceback" not in log.read_text()
