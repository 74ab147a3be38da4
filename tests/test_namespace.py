"""Inodes and names, whatever Glance's users have called their images."""

from __future__ import annotations

from itertools import product
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.namespace import (
    NAME_BYTES_MAX,
    Folder,
    Node,
    Overlay,
    ScratchNode,
    Slot,
    image_id,
    inode_of,
    link_name,
    node_of,
    overlay_inode,
    scratch_inode,
    size_name,
    size_of,
    unique_links,
)
from tests.stores import examples

INODE_MAX = (1 << 64) - 1

_numbers = st.integers(1, (1 << 44) - 1)

# ── Inodes ────────────────────────────────────────────────────────────────────────────────────────────


def test_golden_inodes() -> None:
    # The kernel, NFS clients and backup tools remember them: they are the same in every release.
    assert [(folder.name, int(folder)) for folder in Folder] == [
        ("ROOT", 1),
        ("IMAGES", 2),
        ("BY_NAME", 3),
        ("RAW", 4),
        ("RESIZED", 5),
        ("NOVA", 6),
    ]
    assert [inode_of(slot, n) for n, slot in product((1, 1000), Slot)] == [
        17, 18, 19, 20, 16001, 16002, 16003, 16004,
    ]  # fmt: skip
    assert [overlay_inode(view) for view in (1, 1000)] == [(1 << 48) + 1, (1 << 48) + 1000]
    assert [scratch_inode(number) for number in (1, 1000)] == [(1 << 62) + 1, (1 << 62) + 1000]


@given(_numbers, st.sampled_from(Slot))
@examples(200)
def test_an_inode_says_what_it_is(number: int, slot: Slot) -> None:
    inode = inode_of(slot, number)
    assert node_of(inode) == Node(slot, number)
    assert max(Folder) < inode <= INODE_MAX


@given(st.lists(st.tuples(st.sampled_from(Slot), _numbers), unique=True))
@examples(100)
def test_inodes_are_disjoint(given_: list[tuple[Slot, int]]) -> None:
    inodes = {inode_of(slot, number) for slot, number in given_}
    assert len(inodes) == len(given_)
    assert inodes.isdisjoint(Folder)


@given(st.integers(0, INODE_MAX))
@examples(300)
def test_an_inode_that_nobody_was_given_is_nothing(inode: int) -> None:
    node = node_of(inode)
    if isinstance(node, Node):
        assert inode_of(node.slot, node.image_number) == inode
    elif isinstance(node, Overlay):
        assert overlay_inode(node.view) == inode
    elif isinstance(node, ScratchNode):
        assert scratch_inode(node.number) == inode
    elif node is not None:
        assert node == inode


@given(st.integers(1, (1 << 32) - 1))
@examples(100)
def test_an_overlay_is_its_view(view: int) -> None:
    assert node_of(overlay_inode(view)) == Overlay(view)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (b"20G", 20 << 30),
        (b"1", 1),
        (b"21474836480", 20 << 30),
        (b"8589934591G", 8589934591 << 30),
        (b"8589934592G", None),
        (b"9223372036854775807", (1 << 63) - 1),
        (b"9223372036854775808", None),
        *(
            (name, None)
            for name in (b"", b"0", b"020G", b"-1", b"+1", b"1.5G", b"1g", b"1M", b"1G ", b"\xff", b"G")
        ),
    ],
)
def test_sizes(name: bytes, size: int | None) -> None:
    assert size_of(name) == size
    if size is not None:
        assert size_of(size_name(size)) == size


def test_a_size_is_listed_in_one_spelling() -> None:
    assert [size_name(size) for size in (20 << 30, (20 << 30) + 512)] == [b"20G", b"21474836992"]


@pytest.mark.parametrize("inode", [0, 7, 15, 16, 21, 31, 1 << 62, 1 << 63])
def test_kept_and_odd_inodes_are_nothing(inode: int) -> None:
    assert node_of(inode) is None


# ── Names that somebody asks for ──────────────────────────────────────────────────────────────────────

UUID_TEXT = "0b5cf0d3-6b5a-4f0e-9a0d-2f1f6cf1ab42"


def test_a_uuid_is_an_image() -> None:
    assert image_id(UUID_TEXT.encode()) == UUID_TEXT


@pytest.mark.parametrize(
    "name",
    [
        b"", b".", b"..", b"../images", b"/", b"\0", b"\n", b"\xff" * 36, b"x" * 4096, "é".encode() * 18,
        UUID_TEXT.upper().encode(), UUID_TEXT.replace("-", "").encode(), b"{" + UUID_TEXT.encode() + b"}",
        b"urn:uuid:" + UUID_TEXT.encode(), b" " + UUID_TEXT.encode(), UUID_TEXT.encode() + b"\n",
        UUID_TEXT.encode() + b"/..", UUID_TEXT.encode() + b"\0", UUID_TEXT[:-1].encode(),
        "٠b5cf0d3-6b5a-4f0e-9a0d-2f1f6cf1ab42".encode(),
    ],
)  # fmt: skip
def test_nothing_but_the_one_spelling_of_a_uuid_is_an_image(name: bytes) -> None:
    assert image_id(name) is None


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode(errors="surrogatepass")))
@examples(300)
def test_what_passes_as_an_image_is_fit_for_a_path_and_a_url(name: bytes) -> None:
    found = image_id(name)
    assert found is None or (found.encode() == name and str(UUID(found)) == found)


# ── Names that images have ────────────────────────────────────────────────────────────────────────────

HOSTILE = [
    None, "", ".", "..", "/", "a/b", "../../etc/passwd", "/etc/passwd", "\0", "debian\0.qcow2",
    "ü" * 2048, "x" * (NAME_BYTES_MAX + 1), "é" * 128, "\ud800", "debian\udcff", "\U0001f427" * 64,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_cannot_be_a_file_has_no_link(name: str | None) -> None:
    assert link_name(name) is None
    assert unique_links([(name, 7)]) == {}


@pytest.mark.parametrize(
    "name",
    ["debian", "...", ". ", "-rf", " ", "two\nlines", "\x1b[2J", "~", "*", "a\\b", "é" * 127, "x" * NAME_BYTES_MAX,
     "\u202egnp.exe", "\u2044etc"],
)  # fmt: skip
def test_an_odd_name_is_a_name(name: str) -> None:
    assert unique_links([(name, 7)]) == {name.encode(): 7}


@given(st.text(max_size=300) | st.text(st.characters(exclude_categories=()), max_size=300))
@examples(300)
def test_every_link_is_a_name_that_the_kernel_takes(name: str) -> None:
    encoded = link_name(name)
    if encoded is not None:
        assert encoded.decode() == name
        assert 0 < len(encoded) <= NAME_BYTES_MAX
        assert encoded not in (b".", b"..")
        assert not set(encoded) & {0, ord("/")}


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "..", None, "é", "e\u0301"]), _numbers), max_size=12))
@examples(200)
def test_only_a_name_that_one_image_has_is_a_link(named: list[tuple[str | None, int]]) -> None:
    links = unique_links(named)
    for name, number in links.items():
        assert [n for text, n in named if text is not None and text.encode() == name] == [number]
    for text, _ in named:
        once = sum(other == text for other, _ in named) == 1
        assert (text is not None and text.encode() in links) == (once and text not in (None, ".."))


def test_three_of_one_name_are_not_one() -> None:
    assert unique_links([("a", 1), ("a", 2), ("a", 3), ("b", 4)]) == {b"b": 4}
