"""LMDB's file, page by page: whether LMDB may be let near it. Rule: knows the form of the pages and nothing of
the records in them, and reads by `read` alone.

LMDB 0.9 maps its file and believes every page. A file that is shorter than its meta pages say kills the process
(SIGBUS) at the first touch; so may a rotten offset, and a page of the wrong kind fails an assertion of LMDB's.
Here the file is read instead of mapped, and every number that LMDB would follow is looked at first. The form is
that of LMDB 0.9 on 64-bit little-endian machines; `tests/test_pages.py` holds this to files that LMDB wrote.

    pages 0, 1  metas: each names the roots of two trees, and LMDB goes by the one with the greater txnid
    free tree   transaction → the numbers of pages that it freed
    main tree   name of a table → its `Tree`
    page        a header of 16 bytes, offsets of nodes, room, nodes; large values lie in overflow pages
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from cachefs.errors import IndexCorrupt

_META = struct.Struct("<8xHHHH II 16x 48s48s QQ")
_TREE = struct.Struct("<IHHQQQQQ")
_HEADER = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_HEADER_BYTES = _HEADER.size
META_BYTES = _META.size

_MAGIC, VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _IS_META, _LEAF2, _SUBPAGE = 1, 2, 4, 8, 0x20, 0x40
_DIRTY = 0x10  # In a sub-page, which is never cleaned.
_BIG, _TREE_INSIDE, _DUPLICATES = 1, 2, 4  # Flags of a node.
DUPSORT, _INTEGERKEY, DUPFIXED = 4, 8, 0x10  # Flags of a tree.

_NO_ROOT = (1 << 64) - 1  # The tree is empty.
_DEPTH_MAX = 32  # Of LMDB's cursors.
_KEY_MAX = 511

Read = Callable[[int, int], bytes]
"""(offset, length) → bytes, fewer where the file ends. Raises OSError."""


class Tree(NamedTuple):
    """LMDB's `MDB_db`. In the free tree `pad` is the size of a page, in bytes."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    version: int
    free: Tree
    main: Tree
    last_page: int
    txn: int

    @property
    def page_bytes(self) -> int:
        return self.free.pad

    @property
    def file_bytes(self) -> int:
        """How long the file is when all its pages were written. A shorter one was cut, unless its last pages were
        freed in the transaction that had taken them: only a walk over all pages tells."""
        return (self.last_page + 1) * self.page_bytes


def decode_meta(page: bytes, number: int) -> Meta:
    """The meta page `number` (0 or 1). Raises IndexCorrupt for what LMDB would refuse. One of another version is
    decoded as well as it goes: whoever asked looks at `version`."""
    if len(page) < META_BYTES:
        raise IndexCorrupt(number, "the file ends in it")
    _, flags, _, _, magic, version, free, main, last_page, txn = _META.unpack_from(page)
    if magic != _MAGIC or not flags & _IS_META:
        raise IndexCorrupt(number, "it is no meta page")
    meta = Meta(version, Tree(*_TREE.unpack(free)), Tree(*_TREE.unpack(main)), last_page, txn)
    size = meta.page_bytes
    if version == VERSION and (not 512 <= size <= 32768 or size & (size - 1)):
        raise IndexCorrupt(number, f"pages of {size} bytes")
    if version == VERSION and (meta.free.flags != _INTEGERKEY or meta.main.flags):
        raise IndexCorrupt(number, "its trees make no sense")
    return meta


def newest_meta(read: Read) -> Meta:
    """What LMDB goes by. Raises IndexCorrupt. Where `version` is another, both metas say so, and nothing else was
    looked at: another LMDB made the file."""
    first = decode_meta(read(0, META_BYTES), 0)
    # Another version may have other pages: ask where a page of this machine would be.
    second = decode_meta(read(first.page_bytes if first.version == VERSION else 4096, META_BYTES), 1)
    if first.version != second.version or first.page_bytes != second.page_bytes:
        raise IndexCorrupt(1, "the two metas contradict each other")
    return second if second.txn > first.txn else first


def verify(read: Read, meta: Meta, tables: Mapping[str, int], whole: set[str] | None = None) -> set[str]:
    """Follows every number that LMDB would follow, and returns the names of the tables. `tables` are the flags
    that the known ones must have. With `whole`, only these tables are gone through. Raises IndexCorrupt."""
    walk = _Walk(read, meta)
    found: set[str] = set()
    for key, value in list(walk.tree(meta.main)):
        name = key.decode("ascii", "replace")
        tree = Tree(*_TREE.unpack(value)) if len(value) == _TREE.size else None
        if tree is None or tree.flags != tables.get(name, tree.flags):
            raise IndexCorrupt(meta.main.root, f"the tree of table {name} makes no sense")
        found.add(name)
        if whole is None or name in whole:
            for _ in walk.tree(tree):
                pass
    if whole is None:
        walk.free()
    return found


class _Walk:
    """One walk over the trees. `_seen` has a byte for each page: none belongs to two."""

    def __init__(self, read: Read, meta: Meta) -> None:
        self._read, self._meta, self._size = read, meta, meta.page_bytes
        self._seen = bytearray(meta.last_page + 1)
        self._seen[:2] = b"\1\1"

    def tree(self, tree: Tree) -> Iterator[tuple[bytes, bytes]]:
        """Looks at every page of a tree, and gives (key, value) of the nodes that hold trees."""
        if tree.root == _NO_ROOT:
            return
        if not 0 < tree.depth <= _DEPTH_MAX:
            raise IndexCorrupt(tree.root, f"a tree of depth {tree.depth}")
        todo = [(tree.root, tree.depth)]
        while todo:
            number, depth = todo.pop()
            page, flags, keys = self._page(number)
            if flags == _BRANCH and depth > 1:
                todo.extend((child, depth - 1) for child in self._children(number, page, keys))
            elif flags == _LEAF and depth == 1:
                yield from self._leaf(number, page, keys, tree.flags)
            elif flags == _LEAF | _LEAF2 and depth == 1 and tree.flags & DUPFIXED:
                self._packed(number, page, keys)
            else:
                raise IndexCorrupt(number, f"a page of kind {flags:#x} at height {depth} of a tree")

    def free(self) -> None:
        """The free tree, and that no page in it is used: LMDB would write over it."""
        tree = self._meta.free
        if tree.root == _NO_ROOT:
            return
        todo = [(tree.root, tree.depth)]
        lists: list[tuple[int, bytes]] = []
        while todo:
            number, depth = todo.pop()
            page, flags, keys = self._page(number)
            if flags == _BRANCH and depth > 1:
                todo.extend((child, depth - 1) for child in self._children(number, page, keys))
            elif flags == _LEAF and depth == 1:
                lists.extend(self._values(number, page, keys))
            else:
                raise IndexCorrupt(number, f"a page of kind {flags:#x} at height {depth} of the free tree")
        if len({txn for txn, _ in lists}) != len(lists) or any(txn > self._meta.txn for txn, _ in lists):
            raise IndexCorrupt(tree.root, "pages were freed by no transaction")
        for _, value in lists:
            self._free_list(value)

    def _free_list(self, value: bytes) -> None:
        root = self._meta.free.root
        words = array("Q")
        words.frombytes(value[: len(value) // 8 * 8])
        if len(value) % 8 or not words or words[0] != len(words) - 1:
            raise IndexCorrupt(root, "a list of free pages makes no sense")
        before = self._meta.last_page + 1
        for number in words[1:]:
            if not 1 < number < before or self._seen[number]:
                raise IndexCorrupt(root, f"page {number} cannot be free")
            self._seen[number] = 1
            before = number

    # ── pages ──

    def _take(self, number: int, count: int = 1) -> None:
        if number < 2 or count < 1 or number + count - 1 > self._meta.last_page:
            raise IndexCorrupt(number, "there is no such page")
        if any(self._seen[number : number + count]):
            raise IndexCorrupt(number, "it has two places")
        self._seen[number : number + count] = b"\1" * count

    def _page(self, number: int) -> tuple[bytes, int, int]:
        """(bytes, flags, how many nodes) of a branch or a leaf."""
        self._take(number)
        page = self._read(number * self._size, self._size)
        if len(page) < self._size:
            raise IndexCorrupt(number, "the file ends in it")
        itself, _, flags, lower, upper = _HEADER.unpack_from(page)
        if itself != number:
            raise IndexCorrupt(number, f"it says that it is {itself}")
        if not _HEADER_BYTES < lower <= upper <= self._size or lower % 2:
            raise IndexCorrupt(number, "its bounds make no sense")
        return page, flags, (lower - _HEADER_BYTES) // 2

    def _children(self, number: int, page: bytes, keys: int) -> Iterator[int]:
        if keys < 2:
            raise IndexCorrupt(number, "a branch that does not branch")
        filled = 0
        for at in self._nodes(number, page, keys):
            low, high, top, key_bytes = _NODE.unpack_from(page, at)
            filled += 8 + key_bytes + key_bytes % 2
            if at + 8 + key_bytes > self._size:
                raise IndexCorrupt(number, "a key ends outside")
            yield low | high << 16 | top << 32
        self._filled(number, page, filled)

    def _nodes(self, number: int, page: bytes, keys: int) -> tuple[int, ...]:
        offsets = struct.unpack_from(f"<{keys}H", page, _HEADER_BYTES)
        if min(offsets) != _HEADER.unpack_from(page)[4] or max(offsets) + 8 > len(page):
            raise IndexCorrupt(number, "a node lies outside")
        return offsets

    def _filled(self, number: int, page: bytes, node_bytes: int) -> None:
        """Nodes lie one behind the other, up to the end: LMDB moves them when one goes."""
        if _HEADER.unpack_from(page)[4] + node_bytes != self._size:
            raise IndexCorrupt(number, "its nodes overlap")

    def _packed(self, number: int, page: bytes, keys: int, size: int = 0) -> None:
        """Values of one length, without nodes. They grow `lower` by 2 each, too."""
        pad = _HEADER.unpack_from(page)[1]
        if not pad or _HEADER_BYTES + keys * pad > (size or self._size):
            raise IndexCorrupt(number, "its values end outside")

    def _leaf(self, number: int, page: bytes, keys: int, tree_flags: int) -> Iterator[tuple[bytes, bytes]]:
        size = self._size
        unpack = _NODE.unpack_from
        filled = 0
        for at in self._nodes(number, page, keys):
            low, high, flags, key_bytes = unpack(page, at)
            data = at + 8 + key_bytes
            data_bytes = low | high << 16
            if not 0 < key_bytes <= _KEY_MAX or data + (8 if flags == _BIG else data_bytes) > size:
                raise IndexCorrupt(number, "a value ends outside")
            used = 8 + key_bytes + (8 if flags == _BIG else data_bytes)
            filled += used + used % 2
            if not flags:
                continue
            if flags == _BIG:
                self._overflow(int.from_bytes(page[data : data + 8], "little"), data_bytes)
            elif flags == _TREE_INSIDE:
                yield page[at + 8 : data], page[data : data + data_bytes]
            elif flags == _DUPLICATES and tree_flags & DUPSORT:
                self._subpage(number, page[data : data + data_bytes], tree_flags)
            elif flags == _DUPLICATES | _TREE_INSIDE and tree_flags & DUPSORT and data_bytes == _TREE.size:
                inner = Tree(*_TREE.unpack_from(page, data))
                if inner.root == _NO_ROOT:
                    raise IndexCorrupt(number, "duplicates without any")
                for _ in self.tree(inner._replace(flags=tree_flags & DUPFIXED)):
                    raise IndexCorrupt(inner.root, "a tree among duplicates")
            else:
                raise IndexCorrupt(number, f"a node of kind {flags:#x}")
        self._filled(number, page, filled)

    def _values(self, number: int, page: bytes, keys: int) -> Iterator[tuple[int, bytes]]:
        """(transaction, value) of a leaf of the free tree."""
        filled = 0
        for at in self._nodes(number, page, keys):
            low, high, flags, key_bytes = _NODE.unpack_from(page, at)
            data = at + 8 + key_bytes
            data_bytes = low | high << 16
            if key_bytes != 8 or flags not in (0, _BIG) or data + (8 if flags else data_bytes) > self._size:
                raise IndexCorrupt(number, "a value ends outside")
            used = 16 + (8 if flags else data_bytes)
            filled += used + used % 2
            if flags:
                first = int.from_bytes(page[data : data + 8], "little")
                self._overflow(first, data_bytes)
                yield (
                    int.from_bytes(page[at + 8 : data], "little"),
                    self._read(first * self._size + _HEADER_BYTES, data_bytes),
                )
            else:
                yield int.from_bytes(page[at + 8 : data], "little"), page[data : data + data_bytes]
        self._filled(number, page, filled)

    def _overflow(self, number: int, data_bytes: int) -> None:
        count = -(-(data_bytes + _HEADER_BYTES) // self._size)
        self._take(number, count)
        header = self._read(number * self._size, _HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            raise IndexCorrupt(number, "the file ends in it")
        itself, _, flags, low, high = _HEADER.unpack(header)
        if itself != number or flags != _OVERFLOW or low | high << 16 != count:
            raise IndexCorrupt(number, "it holds no large value")

    def _subpage(self, number: int, sub: bytes, tree_flags: int) -> None:
        """The values of one key, while they are few: a page within the node."""
        if len(sub) < _HEADER_BYTES:
            raise IndexCorrupt(number, "duplicates make no sense")
        _, _, flags, lower, upper = _HEADER.unpack_from(sub)
        packed = _LEAF2 if tree_flags & DUPFIXED else 0
        if (
            flags | _DIRTY != _LEAF | _SUBPAGE | _DIRTY | packed
            or not _HEADER_BYTES < lower <= upper <= len(sub)
            or lower % 2
        ):
            raise IndexCorrupt(number, "duplicates make no sense")
        if packed:
            self._packed(number, sub, (lower - _HEADER_BYTES) // 2, len(sub))
