"""What a hypervisor does with a mounted image, done by qemu's own tools: inspect it, compare it, read it past the
page cache, and stand an overlay on it.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node import COMMAND_TIMEOUT_S, Node
from tests.origin import Content, OriginImage, ScriptedOrigin, pattern

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(
        shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
        reason="there is no qemu-img or no qemu-io (qemu-utils)",
    ),
]

KIB, MIB = 1 << 10, 1 << 20
IMAGE: Final = "50000000-0000-4000-8000-000000000001"
QCOW2: Final = "50000000-0000-4000-8000-000000000002"
SIZE: Final = 24 * MIB
BLOCK: Final = 64 * KIB


def guest_disk() -> Content:
    """Pattern in every other MiB; zeros between."""
    bytes_of = pattern(SIZE)

    def read(offset: int, length: int) -> bytes:
        data = bytearray(bytes_of(offset, length))
        for start in range(MIB, SIZE, 2 * MIB):
            low, high = max(start - offset, 0), min(start + MIB - offset, len(data))
            if low < high:
                data[low:high] = bytes(high - low)
        return bytes(data)

    return read


BYTES: Final = guest_disk()


def run(*command: object, status: int = 0) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S
    )
    assert done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout


def info(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(run("qemu-img", "info", "--output=json", *arguments)))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "disk.raw"
    path.write_bytes(BYTES(0, SIZE))
    return path


@pytest.fixture(scope="module")
def qcow2(original: Path) -> Path:
    path = original.with_suffix(".qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", original, path)
    return path


@pytest.fixture
def origin(original: Path, qcow2: Path) -> Iterator[ScriptedOrigin]:
    images = [
        OriginImage(IMAGE, "raw", SIZE, BYTES),
        OriginImage.of(QCOW2, "qcow2", qcow2.read_bytes(), disk_format="qcow2"),
    ]
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture
def node(tmp_path: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    with Node(tmp_path, origin.url) as node:
        yield node


def test_info(node: Node, origin: ScriptedOrigin, qcow2: Path) -> None:
    """As Nova asks, before a guest has read a byte: cheap, and of the final size."""
    found = info("--force-share", node.path(IMAGE))
    assert (found["format"], found["virtual-size"]) == ("raw", SIZE)
    assert found["actual-size"] < SIZE
    found = info(node.path(QCOW2))
    assert (found["format"], found["virtual-size"]) == ("qcow2", SIZE)
    assert "backing-filename" not in found
    run("qemu-img", "check", "-f", "qcow2", node.path(QCOW2))


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_compare(node: Node, origin: ScriptedOrigin, original: Path, cache: str) -> None:
    run("qemu-img", "compare", "-T", cache, "-f", "raw", "-F", "raw", node.path(IMAGE), original)
    assert origin.bytes_sent == SIZE
    run("qemu-img", "compare", "-T", cache, "-f", "qcow2", "-F", "raw", node.path(QCOW2), original)


def test_a_difference_would_be_found(node: Node, tmp_path: Path, original: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(original.read_bytes()[:-1] + b"\xff")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", node.path(IMAGE), other, status=1)


def test_convert(node: Node, tmp_path: Path, original: Path) -> None:
    """As Nova's flat backend copies a base."""
    for image, kind in ((IMAGE, "raw"), (QCOW2, "qcow2")):
        copy = tmp_path / f"copy-of-{kind}"
        run("qemu-img", "convert", "-t", "none", "-f", kind, "-O", "raw", node.path(image), copy)
        assert copy.read_bytes() == original.read_bytes()
    copied = tmp_path / "cp"
    run("cp", node.path(IMAGE), copied)
    assert copied.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("aio", ["threads", "native"])
def test_reads_past_the_page_cache(node: Node, aio: str) -> None:
    """qemu-io can compare with one byte only, so most reads are of zeros, and one shows what it read."""
    rng = random.Random(5)
    commands: list[object] = []
    for _ in range(40):
        length = rng.choice((512, 4096, 64 * KIB, 512 * KIB))
        start = rng.randrange(SIZE // (2 * MIB)) * 2 * MIB + MIB
        offset = start + rng.randrange((MIB - length) // 512 + 1) * 512
        commands += ["-c", f"read -P 0 {offset} {length}"]
    commands += ["-c", f"aio_read -q 0 {SIZE}", "-c", "aio_flush"]
    said = run("qemu-io", "-r", "-f", "raw", "-t", "none", "-i", aio, *commands, node.path(IMAGE))
    assert "failed" not in said
    dumped = run("qemu-io", "-r", "-f", "raw", "-t", "none", "-c", "read -v 65024 1024", node.path(IMAGE))
    assert bytes_of_dump(dumped) == BYTES(65024, 1024)


def bytes_of_dump(text: str) -> bytes:
    """The bytes in lines such as `0000fe00:  00 01 ... 0f  ................`."""
    rows = [line.split(":", 1)[1].split()[:16] for line in text.splitlines() if line[8:9] == ":"]
    return bytes(int(byte, 16) for row in rows for byte in row)


@pytest.mark.parametrize(("image", "kind"), [(IMAGE, "raw"), (QCOW2, "qcow2")], ids=["raw", "qcow2"])
def test_an_overlay(
    node: Node, origin: ScriptedOrigin, tmp_path: Path, original: Path, image: str, kind: str
) -> None:
    """A guest's disk: the mounted file below, what it writes above; both as a hypervisor reads with cache=none."""
    overlay, model = tmp_path / "overlay.qcow2", tmp_path / "model.raw"
    shutil.copy(original, model)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", node.path(image), overlay)
    if kind == "raw":
        assert origin.bytes_sent == 0  # Making one reads nothing of a raw base.
    found = info(overlay)
    assert (found["virtual-size"], found["backing-filename"]) == (SIZE, str(node.path(image)))
    rng = random.Random(6)
    for _ in range(4):
        commands: list[object] = []
        for _ in range(20):
            length = rng.choice((512, 4096, 5 * KIB, BLOCK, 200 * KIB))
            offset = rng.randrange((SIZE - length) // 512) * 512
            commands += ["-c", f"write -q -P {rng.randrange(1, 256)} {offset} {length}"]
            commands += ["-c", f"read -q {rng.randrange(SIZE // BLOCK) * BLOCK} {BLOCK}"]
        for path, form in ((overlay, "qcow2"), (model, "raw")):
            assert "failed" not in run("qemu-io", "-t", "none", "-f", form, *commands, path)
    run("qemu-img", "compare", "-T", "none", "-f", "qcow2", "-F", "raw", overlay, model)
    run("qemu-img", "check", "-f", "qcow2", overlay)
    run("qemu-img", "compare", "-T", "none", "-f", kind, "-F", "raw", node.path(image), original)


def test_whatever_reads_it_the_image_lands_once(
    node: Node, origin: ScriptedOrigin, tmp_path: Path, original: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", node.path(IMAGE), overlay)
    for cache in ("none", "writeback", "none"):
        run("qemu-img", "compare", "-T", cache, "-f", "raw", "-F", "raw", node.path(IMAGE), original)
        run("qemu-img", "compare", "-T", cache, "-f", "qcow2", "-F", "raw", overlay, original)
    assert origin.bytes_sent == SIZE
    found = node.wait_for_status(lambda now: now["store"]["bytes_cached"] == SIZE)["store"]
    assert found["bytes_zero"] + found["bytes_shared"] + found["bytes_on_disk"] >= SIZE
    assert SIZE // 2 <= found["bytes_on_disk"] <= SIZE // 2 + MIB
    node.stop()
    origin.stop()
    try:
        node.start()  # And the next daemon needs no Glance for it.
        run("qemu-img", "compare", "-T", "none", "-f", "qcow2", "-F", "raw", overlay, original)
    finally:
        origin.start()
