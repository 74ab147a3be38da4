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
    Slot,
    image_id,
    inode_of,
    link_name,
    node_of,
    unique_links,
)
from tests.stores import examples

INODE_MAX = (1 << 64) - 1

_numbers = st.integers(1, (1 << 59) - 1)

# ── Inodes ────────────────────────────────────────────────────────────────────────────────────────────


def test_golden_inodes() -> None:
    # The kernel, NFS clients and backup tools remember them: they are the same in every release.
    assert [(folder.name, int(folder)) for folder in Folder] == [("ROOT", 1), ("IMAGES", 2), ("BY_NAME", 3)]
    assert [inode_of(slot, n) for n, slot in product((1, 2, 1000), Slot)] == [17, 20, 33, 36, 16001, 16004]


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
    elif node is not None:
        assert node == inode


@pytest.mark.parametrize("inode", [0, 4, 5, 6, 15, 16, 18, 19, 31])
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
