"""`pin`, `unpin`, `evict` and a small store, with a real daemon: what a node's operator sees and relies on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.store.check import check
from tests.node import Node, read_buffered, read_direct
from tests.origin import OriginImage, ScriptedOrigin, pattern

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE: Final = 48 * MIB
A, B, C = (f"40000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
SEEDS: Final = {A: 1, B: 2, C: 3}
UNKNOWN: Final = "40000000-0000-4000-8000-00000000dead"


BYTES = pattern(8 * SIZE)


def content(image: str, offset: int, length: int) -> bytes:
    return BYTES(SEEDS[image] * SIZE + offset, min(length, SIZE - offset))


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin(OriginImage(image, None, SIZE, partial(content, image)) for image in SEEDS) as running:
        yield running


def told(node: Node, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(node.cli(*words, "--json").stdout)["images"]
    return found


def fill(node: Node, image: str) -> None:
    for offset in range(0, SIZE, MIB):
        assert read_direct(node.path(image), offset, MIB) == content(image, offset, MIB)


def cached(node: Node, image: str) -> int:
    (row,) = (row for row in json.loads(node.cli("images", "--json").stdout)["images"] if row["id"] == image)
    return int(row["cached"])


def test_what_is_pinned_or_open_is_not_evicted_and_the_rest_is(origin: ScriptedOrigin, tmp_path: Path) -> None:
    with Node(tmp_path, origin.url) as node:
        fill(node, A)
        fill(node, B)
        pinned = node.cli("pin", A)
        assert (pinned.returncode, pinned.stdout, pinned.stderr) == (0, f"{A}: pinned, 48.0 MiB\n", "")
        done = node.cli("evict", A, B, UNKNOWN, "nonsense")
        assert done.returncode == 1
        assert (
            done.stderr == f"cachefs: image {A} is not evicted: it is pinned (cachefs unpin ends that)\n"
            "cachefs: 'nonsense' is no image id, nor the first 4 or more digits of one, nor an image's name "
            "(cachefs images)\n"
        )
        assert done.stdout == f"{B}: evicted; 48.0 MiB freed\n{UNKNOWN}: was not cached\n"
        assert (cached(node, A), cached(node, B)) == (SIZE, 0)
        assert read_buffered(node.path(B), 0, 4096) == content(B, 0, 4096), "it comes again"
        # Over a restart, too.
        node.stop()
        node.start()
        assert told(node, "evict", A)[0]["error"] is not None
        assert node.cli("unpin", A).stdout == f"{A}: unpinned\n"
        assert node.cli("unpin", A).stdout == f"{A}: was not pinned\n"
        with node.path(A).open("rb"):
            assert node.cli("evict", A).stderr == f"cachefs: image {A} is not evicted: it is open (1 handle)\n"
        (row,) = told(node, "evict", A)
        assert (row["error"], row["bytes"], row["cached"], row["done"]) == (None, SIZE, SIZE, True)
        assert node.status()["evictor"]["evicted"]["asked"]["bytes"] == SIZE
    assert check(node.store).sound


def test_what_is_evicted_takes_no_blocks_any_more(origin: ScriptedOrigin, tmp_path: Path) -> None:
    """Though the kernel may keep for a minute what it knows of a whole file."""
    with Node(tmp_path, origin.url) as node:
        for _ in range(2):
            fill(node, A)
            node.wait_for_status(lambda _: node.path(A).stat().st_blocks == SIZE // 512)
            assert told(node, "evict", A)[0]["done"]
            blocks = [node.path(A).stat().st_blocks for _ in range(100) if node.status()]
            assert blocks[-1] == 1


def test_pins_are_bounded_by_a_share_of_the_store(origin: ScriptedOrigin, tmp_path: Path) -> None:
    with Node(tmp_path, origin.url, store={"max_size": "160M", "pin_share": "50%"}) as node:
        assert node.cli("pin", A).returncode == 0
        refused = node.cli("pin", B)
        assert (refused.returncode, refused.stdout) == (1, "")
        why = f"cachefs: image {B} is not pinned: it has 48.0 MiB, and pins have 32.0 MiB left"
        assert refused.stderr.startswith(why)


def test_three_images_pass_through_a_store_for_one_and_a_half(origin: ScriptedOrigin, tmp_path: Path) -> None:
    most = 72 * MIB
    with Node(tmp_path, origin.url, store={"max_size": f"{most >> 20}M", "span_size": "1M"}) as node:
        for image in SEEDS:
            fill(node, image)
            assert node.status()["store"]["bytes_on_disk"] <= most
        now = node.wait_for_status(  # The last of it lands after it was read.
            lambda now: sum(cause["bytes"] for cause in now["evictor"]["evicted"].values()) >= 3 * SIZE - most
        )
        assert now["evictor"]["stuck"] is None
        assert cached(node, C) == SIZE, "the last one is here"
        before = origin.bytes_sent
        fill(node, C)
        assert origin.bytes_sent == before
    assert check(node.store).sound


def test_what_an_eviction_does_not_free_is_said_to_be_shared(tmp_path: Path) -> None:
    size = 4 * MIB
    twins = [OriginImage(image, None, size, pattern(size)) for image in (A, B)]
    with ScriptedOrigin(twins) as origin, Node(tmp_path, origin.url) as node:
        assert node.cli("prefetch", "--wait", A, B).returncode == 0
        rest = ", the rest of 4.0 MiB is zeros or shared with other images"
        rest += "; a prefetch fetches it, too"
        assert node.cli("evict", A).stdout == f"{A}: evicted; 0 B freed{rest}\n"
        sent, stored = origin.bytes_sent, node.status()["store"]["bytes_on_disk"]
        begun = f"{A}: 0 B of 4.0 MiB is here; the rest comes in the background\n"
        assert node.cli("prefetch", A).stdout == begun
        assert node.cli("prefetch", "--wait", A).returncode == 0
        assert node.cli("prefetch", A).stdout == f"{A}: 4.0 MiB is here, all of it\n"
        assert origin.bytes_sent - sent == size, "which of the other's chunks they are is known no more"
        assert node.status()["store"]["bytes_on_disk"] - stored < size // 4, "and not stored again"
        assert node.cli("evict", A).stdout == f"{A}: evicted; 0 B freed{rest}\n"
        assert node.cli("evict", A).stdout == f"{A}: was not cached\n"
        assert node.cli("evict", B).stdout == f"{B}: evicted; 4.0 MiB freed\n"
