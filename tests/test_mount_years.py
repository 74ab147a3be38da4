"""What befalls a store in its years, with a real daemon: it is killed while it evicts, punches and scrubs, and its
disk rots. Rule: every byte that a reader gets is the image's; after everything `check` finds the store sound.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.store.check import check
from tests.node import Node, read_direct
from tests.origin import OriginImage, ScriptedOrigin, pattern
from tests.stores import HUNT

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE: Final = 24 * MIB
IMAGES: Final = [f"50000000-0000-4000-8000-00000000000{n}" for n in range(4)]
BYTES = pattern(len(IMAGES) * SIZE)


def content(image: str, offset: int, length: int) -> bytes:
    return BYTES(IMAGES.index(image) * SIZE + offset, min(length, SIZE - offset))


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin(OriginImage(image, None, SIZE, partial(content, image)) for image in IMAGES) as running:
        yield running


def read_and_compare(node: Node, rng: random.Random) -> None:
    image = rng.choice(IMAGES)
    offset = rng.randrange(SIZE // 4096) * 4096
    length = min(rng.choice((4096, 65536, MIB)), SIZE - offset)
    assert read_direct(node.path(image), offset, length) == content(image, offset, length)


def test_killed_while_it_evicts_and_scrubs(origin: ScriptedOrigin, tmp_path: Path) -> None:
    """The store holds a third of what is read, so nearly every read evicts and punches."""
    rng = random.Random(7)
    store = {"max_size": "32M", "span_size": "1M", "commit_interval": 0.01}
    node = Node(tmp_path, origin.url, store=store)
    node.configure(scrub={"bandwidth": 0})
    evicted = scrubbed = 0
    for _ in range(12 * HUNT):
        with node:
            node.cli("scrub")
            for _ in range(rng.randrange(5, 60)):
                read_and_compare(node, rng)
            now = node.status()
            evicted += sum(cause["spans"] for cause in now["evictor"]["evicted"].values())
            scrubbed += now["scrub"]["bytes_verified"]
            node.kill()
        report = check(node.store)
        assert report.sound, [str(finding) for finding in report.findings[:10]]
    assert evicted > 100, "it did not come to that"
    assert scrubbed > 0
    with node:
        for _ in range(50):
            read_and_compare(node, rng)
    assert check(node.store).sound


def flip_bits(folder: Path, count: int, rng: random.Random) -> int:
    """Of bytes that lie on the disk: holes stay holes. Returns how many."""
    flipped = 0
    paths = sorted((folder / "segments").glob("*.seg"))
    while flipped < count:
        path = rng.choice(paths)
        with path.open("r+b") as file:
            offset = rng.randrange(path.stat().st_size)
            if os.lseek(file.fileno(), offset, os.SEEK_DATA) != offset:
                continue
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ (1 << rng.randrange(8))]), offset)
            flipped += 1
    return flipped


def fill(node: Node) -> None:
    for image in IMAGES:
        for offset in range(0, SIZE, MIB):
            assert read_direct(node.path(image), offset, MIB) == content(image, offset, MIB)


def cached(node: Node) -> int:
    return int(node.status()["store"]["bytes_cached"])


@pytest.mark.parametrize("found_by", ["reading", "scrubbing"])
def test_bits_flip_by_the_thousand_and_no_reader_notices(
    origin: ScriptedOrigin, tmp_path: Path, found_by: str
) -> None:
    rng = random.Random(8)
    node = Node(tmp_path, origin.url)
    node.configure(scrub={"bandwidth": 0})
    with node:
        fill(node)
        node.wait_for_status(lambda now: now["store"]["bytes_cached"] == len(IMAGES) * SIZE)
    flip_bits(node.store, 2000, rng)
    damaged = sum("digest" in finding.what for finding in check(node.store).findings)
    assert damaged > 500
    with node:
        if found_by == "scrubbing":
            done = node.cli("scrub", "--wait")
            assert done.returncode == 1, done.stdout
            now = node.status()
            assert now["scrub"]["last"]["rotten"] == damaged
            assert cached(node) < len(IMAGES) * SIZE
        # What comes from the origin brings its neighbours, whose stored bytes are looked at by the next read.
        sent = -1
        for _ in range(6):
            fill(node)
            node.wait_for_status(lambda now: now["scrub"]["to_mend"] == 0)
            if origin.bytes_sent == sent:
                break
            sent = origin.bytes_sent
        now = node.wait_for_status(whole)
        assert origin.bytes_sent == sent, "all is healed"
        assert now["store"]["rotten_chunks_found"] >= damaged
        assert node.cli("scrub", "--wait").returncode == 0
    assert check(node.store).findings == []


def whole(now: dict[str, Any]) -> bool:
    return bool(now["store"]["bytes_cached"] == len(IMAGES) * SIZE)


def test_rot_of_what_glance_has_no_more_is_an_error_and_said_to_be_lost(tmp_path: Path) -> None:
    image = IMAGES[0]
    with ScriptedOrigin([OriginImage(image, None, SIZE, partial(content, image))]) as origin:
        node = Node(tmp_path, origin.url, mount={"read_deadline": 2})
        node.configure(scrub={"bandwidth": 0}, glance={"listing_ttl": 0, "retries": 0})
        with node:
            for offset in range(0, SIZE, MIB):
                read_direct(node.path(image), offset, MIB)
            node.wait_for_status(lambda now: now["store"]["bytes_cached"] == SIZE)
        flip_bits(node.store, 1, random.Random(9))
        with node, node.path(image).open("rb") as opened:
            origin.remove(image)
            done = node.cli("scrub", "--wait")
            assert done.returncode == 2, done.stdout
            assert re.search(rf"\[image {image}\] LOST: \d+ bytes at \d+ are rotten", node.log)
            failed = 0
            for offset in range(0, SIZE, 65536):
                try:
                    got = os.pread(opened.fileno(), 65536, offset)
                except OSError:
                    got = b""
                assert got == content(image, offset, len(got))
                failed += len(got) < 65536
            assert 1 <= failed <= 6, "the chunk, and no more"
