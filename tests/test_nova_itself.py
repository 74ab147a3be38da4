"""Nova, unmodified, with `nova/` as its `_base` folder: its own code makes disks, pre-caches and looks after its
cache through a real mount. In an environment of its own; what it did is looked at from here."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cloud import Glance
from tests.cloud.service import clean_environment
from tests.node import ROOT, Node

PYTHON: Final = ROOT / ".nova" / "bin" / "python"
TIMEOUT_S: Final = 120.0
MIB: Final = 1 << 20
OTHERS: Final = {"ephemeral_1_0706d66", "swap_64"}

pytestmark = [
    pytest.mark.mount,
    pytest.mark.cloud,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no Nova: setup/install test"),
]


def sha1(image: str) -> str:
    return hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()


@dataclass
class Done:
    """What Nova saw, and what it left. `disk` is what is inside of each image."""

    saw: dict[str, Any]
    known: str
    unknown: str
    disk: bytes
    overlay: bytes
    status: dict[str, Any]
    leases: str
    log: str


@pytest.fixture(scope="module")
def done(glance: Glance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    path = tmp_path_factory.mktemp("images")
    (path / "raw").write_bytes(random.Random(34).randbytes(3 * MIB))
    os.truncate(path / "raw", 16 * MIB)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", path / "raw", path / "qcow2"], check=True)
    known, deactivated = (glance.upload(name, path / "qcow2", disk_format="qcow2") for name in ("known", "off"))
    glance.deactivate(deactivated)
    # A Glance of which the node knows nothing, as if Nova's user saw more than the node's.
    with (
        Glance(tmp_path_factory.mktemp("glance")) as other,
        tempfile.TemporaryDirectory(prefix="cachefs-nova-") as folder,
    ):
        unknown = other.upload("unknown", path / "qcow2", disk_format="qcow2")
        os.chmod(folder, 0o755)
        node, instances = Node(Path(folder), glance.endpoint), Path(folder) / "instances"
        node.configure(leases={"touch_grace": 0, "interval": 1})
        (instances / "_base").mkdir(parents=True)
        with node:
            subprocess.run(["mount", "--bind", node.mountpoint / "nova", instances / "_base"], check=True)
            try:
                words = [str(instances), other.endpoint, known, unknown, deactivated]
                said = subprocess.run(
                    [PYTHON, ROOT / "tests" / "nova_itself.py", *words],
                    env=clean_environment(),
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=TIMEOUT_S,
                )
                assert said.returncode == 0, said.stderr + node.log
                flat = Path(folder) / "flat"
                overlay = instances / "kept" / "disk"
                subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, flat], check=True)
                node.wait_for_status(lambda now: now["instances"]["disks"] > 0)
                leases = node.cli("image", known, "--json").stdout
                disks = (path / "raw").read_bytes(), flat.read_bytes()[: 16 * MIB]
                yield Done(json.loads(said.stdout), known, unknown, *disks, node.status(), leases, node.log)
            finally:
                subprocess.run(["umount", "-l", instances / "_base"], check=True)


def test_nova_fetches_nothing_that_is_there(done: Done) -> None:
    assert done.saw["fetched for what is there"] == []
    assert done.saw["precached"] is False, "to Nova it was cached before"
    assert done.overlay == done.disk


def test_what_is_not_there_nova_fetches_and_keeps(done: Done) -> None:
    assert done.saw["fetched at last"] == [done.unknown]
    assert set(done.saw["bases"]) == {sha1(done.known), sha1(done.unknown), *OTHERS}


def test_what_is_deactivated_fails_and_is_not_fetched(done: Done) -> None:
    assert done.saw["deactivated"].startswith("PermissionError"), done.saw
    assert done.saw["fetched"] == [done.unknown]


def test_the_periodic_pass_keeps_what_is_used_and_removes_what_is_not(done: Done) -> None:
    assert set(done.saw["bases in use"]) == set(done.saw["bases"])
    assert done.saw["known is young"], "Nova sets its times"
    assert done.saw["bases unused"] == []
    assert done.saw["usage"] == 0, "another filesystem: not Nova's to count"
    assert f"[image {done.known}] removed from nova/" in done.log


def test_a_removed_base_is_there_again_for_the_instance_that_nova_forgot(done: Done) -> None:
    assert done.saw["bases at the end"] == [sha1(done.known)]
    assert "named by an instance disk" in done.leases
    assert done.status["nova"]["files"] == 0
