"""Where `cachefs image` says that an image can be opened: each path opens, and has what it is said to have."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.disks import MIB
from tests.hostile import QCOW2
from tests.node import Node, errno_of
from tests.origin import OriginImage, ScriptedOrigin
from tests.qcow2_zoo import qemu

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="there is no qemu-img (qemu-utils)"),
]

RAW, INSIDE, REFUSED, OFF = (f"7a000000-0000-4000-8000-00000000000{n}" for n in range(1, 5))
DISK: Final = random.Random(11).randbytes(2 * MIB)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedOrigin]:
    folder = tmp_path_factory.mktemp("images")
    (folder / "raw").write_bytes(DISK)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "qcow2")
    good = (folder / "qcow2").read_bytes()
    lie = next(case for case in QCOW2 if "backing" in case.name)
    images = [
        OriginImage.of(RAW, "plain", DISK),
        OriginImage.of(INSIDE, "inside", good, disk_format="qcow2"),
        OriginImage.of(REFUSED, "refused", lie.change(good), disk_format="qcow2"),
        OriginImage.of(OFF, "off", DISK, status="deactivated"),
    ]
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture(scope="module")
def node(origin: ScriptedOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), origin.url) as node:
        os.listdir(node.mountpoint / "images")
        yield node


def said_of(node: Node, image: str) -> dict[str, Any]:
    done = node.cli("image", "--json", image)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(node: Node, image: str) -> dict[str, list[str]]:
    """What is said in a pipe, by name."""
    rows: dict[str, list[str]] = {}
    name = ""
    for line in node.cli("image", image).stdout.splitlines():
        key, _, value = line.partition(": ") if not line.startswith(" ") else (name, "", line)
        name = key
        rows.setdefault(name, []).append(value.strip())
    return rows


def in_nova(node: Node, image: str) -> Path:
    return node.mountpoint / "nova" / hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("image", [RAW, INSIDE], ids=["raw", "qcow2"])
def test_every_path_has_what_it_is_said_to_have(node: Node, origin: ScriptedOrigin, image: str) -> None:
    paths = said_of(node, image)["paths"]
    assert paths["file"] == [str(node.path(image))]
    assert paths["disk"] == [str(node.mountpoint / "raw" / image), str(in_nova(node, image))]
    assert paths["scratch"] is None
    assert {Path(path).read_bytes() for path in paths["disk"]} == {DISK}
    whole = Path(paths["file"][0]).read_bytes()
    assert hashlib.sha512(whole).hexdigest() == origin.images[image].os_hash_value
    larger = Path(paths["resized"]) / str(3 * MIB)
    assert larger.read_bytes() == DISK + bytes(MIB)
    rows = rows_of(node, image)
    assert (rows["file"], rows["disk file"]) == (paths["file"], paths["disk"])
    assert rows["larger disk"] == [f"{paths['resized']}/SIZE"]
    words = {RAW: "2.0 MiB (the file itself)", INSIDE: "2.0 MiB (inside the qcow2), "}[image]
    assert rows["guest disk"][0].startswith(words)


def test_a_disk_that_is_refused_has_no_path_and_its_file_has(node: Node) -> None:
    before = said_of(node, REFUSED)["paths"]
    assert before["disk"], "nobody has looked at it yet"
    assert errno_of(Path(before["disk"][0]).read_bytes) == errno.EPERM
    after = said_of(node, REFUSED)["paths"]
    assert after == {"file": [str(node.path(REFUSED))], "disk": [], "resized": None, "scratch": None}
    assert errno_of(lambda: in_nova(node, REFUSED).open("rb")) == errno.EPERM, "so it is not named"
    rows = rows_of(node, REFUSED)
    assert rows["guest disk"][0].startswith("refused: ")
    assert "disk file" not in rows


def test_what_may_not_be_opened_has_no_path(node: Node) -> None:
    assert errno_of(lambda: node.path(OFF).open("rb")) == errno.EACCES
    assert said_of(node, OFF)["paths"] == {"file": [], "disk": [], "resized": None, "scratch": None}
    assert rows_of(node, OFF)["file"] == ["it cannot be opened"]


def test_a_scratch_file_of_its_name_is_said_to_stand_before_it(node: Node) -> None:
    path = in_nova(node, RAW)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(b"nova's own")
    os.rename(temporary, path)
    try:
        paths = said_of(node, RAW)["paths"]
        assert (paths["scratch"], paths["disk"]) == (str(path), [str(node.mountpoint / "raw" / RAW)])
        assert path.read_bytes() == b"nova's own"
        assert rows_of(node, RAW)["scratch file"] == [f"{path} stands before it in nova/"]
    finally:
        path.unlink()
    assert str(path) in said_of(node, RAW)["paths"]["disk"]


def test_with_glances_bytes_in_nova_that_path_is_the_files(tmp_path: Path, origin: ScriptedOrigin) -> None:
    node = Node(tmp_path, origin.url)
    node.configure(nova={"view": "images"})
    with node:
        paths = said_of(node, INSIDE)["paths"]
        assert paths["file"] == [str(node.path(INSIDE)), str(in_nova(node, INSIDE))]
        assert len({Path(path).read_bytes() for path in paths["file"]}) == 1
        assert paths["disk"] == [str(node.mountpoint / "raw" / INSIDE)]
    node.configure(nova={"enabled": "false"})
    with node:
        assert said_of(node, INSIDE)["paths"]["file"] == [str(node.path(INSIDE))]
        assert not in_nova(node, INSIDE).exists()
