"""Boot traces with real daemons: recorded by reads of the mount, replayed after an eviction, and carried to
another node by the command. Rule: what is asserted is bytes, and what the origin was asked for.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.store.check import check
from tests.node import Node, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, literal
from tests.qcow2_zoo import MIB, missing_qemu, qemu

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(missing_qemu is not None, reason=f"there is no {missing_qemu} (qemu-utils)"),
]

BLOCK: Final = 64 << 10
SIZE: Final = 48 * MIB
RAW, QCOW2, SAME = (f"a0000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
UNKNOWN: Final = "a0000000-0000-4000-8000-00000000dead"
# Far apart, so that what else is fetched would be seen; a pair, and a run.
BOOT: Final = [700, 3, 4, 120, 300, 301, 302, 303, 60, 500]


def disk() -> bytes:
    """Pages that zlib makes half of, each its own."""
    rng = random.Random(5)
    return b"".join(rng.randbytes(2048) + bytes(2048) for _ in range(SIZE // 4096))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[OriginImage]:
    folder, content = tmp_path_factory.mktemp("images"), disk()
    (folder / "disk").write_bytes(content)
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", folder / "disk", folder / "qcow2")
    packed = (folder / "qcow2").read_bytes()
    return [
        OriginImage.of(RAW, "raw", content),
        OriginImage.of(QCOW2, "packed", packed, disk_format="qcow2"),
        OriginImage(SAME, "again", SIZE, literal(content)).hashed(),
    ]


def boot(path: Path, content: bytes, blocks: Sequence[int] = BOOT) -> None:
    for block in blocks:
        at = block * BLOCK + 8192
        assert read_direct(path, at, 4096) == content[at : at + 4096]


def asked(origin: ScriptedOrigin) -> set[int]:
    """Blocks of images' files that were asked for since the last look."""
    extents = [r.extent for r in origin.requests if r.kind is Kind.DATA and r.extent is not None]
    return {block for start, end in extents for block in range(start // BLOCK, -(-end // BLOCK))}


def replayed(node: Node, count: int) -> dict[str, Any]:
    return node.wait_for_status(
        lambda now: (
            now["traces"]["replayed"] >= count and not now["traces"]["replaying"] and not now["fetcher"]["flights"]
        )
    )


def test_a_boot_is_recorded_replayed_and_carried_to_another_node(
    images: list[OriginImage], tmp_path: Path
) -> None:
    content = images[0].content(0, SIZE)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    file = tmp_path / "boots.traces"
    with ScriptedOrigin(images) as origin:
        one, two = Node(tmp_path / "one", origin.url), Node(tmp_path / "two", origin.url)
        one.configure(trace={"seconds": 3})
        with one:
            refused = one.cli("trace", "export", RAW, "-o", str(file))
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr == f"cachefs: no boot trace of {RAW} is known\n"
            disk_path = one.mountpoint / "raw" / QCOW2
            larger = one.mountpoint / "resized" / QCOW2 / "1G"
            with one.path(RAW).open("rb") as opened, larger.open("rb") as disk:
                boot(one.path(RAW), content)
                boot(disk_path, content, list(reversed(BOOT)))
                boot(larger, content, BOOT[:2])
                one.wait_for_status(lambda now: now["traces"]["recorded"] == 2, 60)
                # Handles that were recorded read on.
                assert os.pread(opened.fileno(), 4096, 40 * MIB) == content[40 * MIB : 40 * MIB + 4096]
                assert os.pread(disk.fileno(), 4096, 41 * MIB) == content[41 * MIB : 41 * MIB + 4096]
                assert os.pread(disk.fileno(), 4096, 500 * MIB) == bytes(4096)
            # The next cold boot: from few requests, of just its blocks.
            assert one.cli("evict", RAW, QCOW2).returncode == 0
            origin.clear()
            with one.path(RAW).open("rb"):
                replayed(one, 1)
                assert set(BOOT) <= asked(origin) <= {*BOOT, *range(300, 304), 121, 122}
                assert origin.data_requests <= len(BOOT) - 3
                requests = origin.data_requests
                boot(one.path(RAW), content)
                assert origin.data_requests == requests
            origin.clear()
            with disk_path.open("rb"):
                replayed(one, 2)
                requests = origin.data_requests
                boot(disk_path, content)
                assert origin.data_requests == requests, "what is inside a qcow2, too"
                assert origin.bytes_sent < images[1].size / 2  # type: ignore[operator]
            # Over a restart, and out of the daemon.
            one.stop()
            one.start()
            one.cli("images")  # Now it knows the other image of the same bytes.
            rows = json.loads(one.cli("trace", "list", "--json").stdout)["traces"]
            assert {(row["kind"], tuple(row["images"]), row["blocks"]) for row in rows} == {
                ("original", (RAW, SAME), len(BOOT)),
                ("raw", (QCOW2,), len(BOOT)),
            }
            listed = one.cli("trace", "list").stdout
            assert re.search(rf"^{RAW}  .* and 1 other image +images +[\d.]+ [KM]iB +\d+  ", listed, re.M), listed
            assert re.search(rf"^{QCOW2}  .* raw +[\d.]+ [KM]iB ", listed, re.M), listed
            done = one.cli("trace", "export", "-o", str(file))
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith("2 boot traces, ")
            assert one.cli("trace", "export", SAME, UNKNOWN, "-o", str(tmp_path / "some")).returncode == 1
        with two:
            hostile = tmp_path / "hostile"
            hostile.write_bytes(file.read_bytes()[:-20])
            refused = two.cli("trace", "import", str(hostile))
            assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (1, "", 1)
            assert two.cli("trace", "import", str(tmp_path / "none")).stderr.endswith(
                "No such file or directory\n"
            )
            assert json.loads(two.cli("trace", "list", "--json").stdout)["traces"] == []
            done = two.cli("trace", "import", str(file))
            assert (done.returncode, done.stdout, done.stderr) == (0, "2 boot traces imported\n", "")
            assert "(no image here has it)" in two.cli("trace", "list").stdout
            two.kill()  # What was answered outlives a crash.
            two.start()
            origin.clear()
            with two.path(SAME).open("rb"):
                replayed(two, 1)
                assert set(BOOT) <= asked(origin) <= {*BOOT, *range(300, 304), 121, 122}
                requests = origin.data_requests
                boot(two.path(SAME), content)
                assert origin.data_requests == requests
    assert check(one.store).sound
    assert check(two.store).sound
