"""Images come whole and are compared with Glance's hash, with a real daemon. Rule: what is asserted is bytes,
states, and what the origin was asked for.
"""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cloud.service import poll_until
from tests.node import Node, read_direct
from tests.origin import OriginImage, ScriptedOrigin, Status, pattern

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE: Final = 24 * MIB + 12345
IMAGES: Final = [f"80000000-0000-4000-8000-00000000000{n}" for n in range(3)]
BYTES = pattern(len(IMAGES) * SIZE)


def content(image: str, offset: int, length: int) -> bytes:
    return BYTES(IMAGES.index(image) * SIZE + offset, min(length, SIZE - offset))


def an_image(image: str) -> OriginImage:
    return OriginImage(image, None, SIZE, partial(content, image))


def state(node: Node, image: str) -> str:
    return os.getxattr(node.path(image), "user.cachefs.state").decode()


def row(node: Node, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.cli("image", image, "--json").stdout)
    return found


EIO: Final = os.strerror(errno.EIO)
ON_OPEN: Final = {"mode": "on-open"}


def test_what_is_open_comes_whole_and_is_verified(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image).hashed() for image in IMAGES) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            with node.path(IMAGES[0]).open("rb") as opened:
                assert opened.read(10) == content(IMAGES[0], 0, 10)
                assert poll_until(lambda: state(node, IMAGES[0]) == "verified", 60)
            assert row(node, IMAGES[0])["verified"] is True
            assert node.status()["verification"] == {"waiting": 0, "verified": 1, "condemned": 0}
            assert state(node, IMAGES[1]) == "absent", "nobody has opened it"
            # From here on the origin is not needed, also after a restart.
            sent = origin.bytes_sent
            assert sent <= SIZE * 1.02 + MIB
            node.stop()
            node.start()
            assert state(node, IMAGES[0]) == "verified"
            origin.stop()
            for offset in range(0, SIZE, MIB):
                assert read_direct(node.path(IMAGES[0]), offset, MIB) == content(IMAGES[0], offset, MIB)


def test_prefetch_brings_what_nobody_has_open(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image) for image in IMAGES) as origin, Node(tmp_path, origin.url) as node:
        done = node.cli("prefetch", "--wait", IMAGES[1], IMAGES[2])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{IMAGES[1]}: 24.0 MiB are here\n{IMAGES[2]}: 24.0 MiB are here\n"
        assert [state(node, image) for image in IMAGES] == ["absent", "complete", "complete"], "without a hash"
        assert origin.bytes_sent <= 2 * SIZE * 1.02
        refused = node.cli("prefetch", "80000000-0000-4000-8000-00000000dead")
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_a_pinned_image_comes_whole_after_a_restart(tmp_path: Path) -> None:
    with ScriptedOrigin([an_image(IMAGES[0])]) as origin:
        node = Node(tmp_path, origin.url)
        with node:
            assert read_direct(node.path(IMAGES[0]), 0, 4096) == content(IMAGES[0], 0, 4096)
            assert node.cli("pin", IMAGES[0]).returncode == 0
            assert state(node, IMAGES[0]) == "partial", "hydration is by hand here"
        node.configure(hydration=ON_OPEN)
        with node:
            assert poll_until(lambda: state(node, IMAGES[0]) == "complete", 90)


def test_an_image_that_is_not_what_glance_promises_is_condemned(tmp_path: Path) -> None:
    rotten = OriginImage.of(IMAGES[0], None, content(IMAGES[0], 0, SIZE)).hashed()
    # The store's file changed behind Glance.
    rotten = OriginImage(
        IMAGES[0], None, SIZE, partial(content, IMAGES[1]),
        os_hash_algo="sha512", os_hash_value=rotten.shown()["os_hash_value"],
    )  # fmt: skip
    with ScriptedOrigin([rotten]) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            with node.path(IMAGES[0]).open("rb") as opened:
                opened.read(1)
                assert poll_until(lambda: state(node, IMAGES[0]) == "condemned", 60)
                # What the kernel has of it is its own; nothing more comes.
                with pytest.raises(OSError, match=EIO):
                    read_direct(node.path(IMAGES[0]), 8 * MIB, 4096)
            assert "CONDEMNED" in node.log
            assert poll_until(lambda: node.status()["store"]["bytes_cached"] == 0, 30)
            node.stop()
            node.start()
            with pytest.raises(OSError, match=EIO):
                node.path(IMAGES[0]).open("rb")
            assert state(node, IMAGES[0]) == "condemned"


def test_a_store_that_cannot_hold_what_is_leased_says_so_once(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image) for image in IMAGES) as origin:
        node = Node(tmp_path, origin.url, store={"max_size": "32M", "span_size": "1M"})
        node.configure(hydration=ON_OPEN)
        with node, node.path(IMAGES[0]).open("rb"), node.path(IMAGES[1]).open("rb"):
            now = node.wait_for_status(lambda now: now["hydration"]["at_risk"], 60)
            (at_risk,) = now["hydration"]["at_risk"]
            assert at_risk in IMAGES[:2]
            assert node.log.count("promise at risk") == 1
            for image in IMAGES[:2]:
                for offset in range(0, SIZE, MIB):
                    assert read_direct(node.path(image), offset, MIB) == content(image, offset, MIB)


def test_an_origin_that_is_away_is_asked_again(tmp_path: Path) -> None:
    with ScriptedOrigin([an_image(IMAGES[0])]) as origin:
        node = Node(tmp_path, origin.url, glance={"retries": 0})
        node.configure(hydration=ON_OPEN)
        with node, node.path(IMAGES[0]).open("rb") as opened:
            assert opened.read(1) == content(IMAGES[0], 0, 1)
            origin.fault(*[Status(500)] * 2)
            assert poll_until(lambda: state(node, IMAGES[0]) == "complete", 90)
