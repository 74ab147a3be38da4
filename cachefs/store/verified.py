"""Which chunks' bytes were compared with their digests since the daemon started: one bit each. Rule: a bit that is
lost costs one more comparison; a bit is never set for bytes that nobody compared.
"""

from __future__ import annotations

from collections.abc import Iterable

from cachefs.store.format import ChunkId

_PAGE_BITS = 15  # 32,768 chunks, 4 KiB of bits: about 2 GiB of a store.
_PAGE_MASK = (1 << _PAGE_BITS) - 1


class Verified:
    """A set of chunks that only grows. `everything` takes all for verified. Chunks' numbers are never given twice,
    so a bit of a chunk that is gone harms nobody. 16 million chunks with neighbouring numbers take 2 MiB.

    Threads may add at once: two that set bits of one byte may lose one of them, which is allowed.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self._everything = everything
        self._pages: dict[int, bytearray] = {}

    def __contains__(self, chunk: ChunkId) -> bool:
        page = self._pages.get(chunk >> _PAGE_BITS)
        bit = chunk & _PAGE_MASK
        return self._everything or (page is not None and bool(page[bit >> 3] >> (bit & 7) & 1))

    def add(self, chunks: Iterable[ChunkId]) -> None:
        if self._everything:
            return
        for chunk in chunks:
            page = self._pages.get(chunk >> _PAGE_BITS)
            if page is None:
                page = self._pages.setdefault(chunk >> _PAGE_BITS, bytearray((_PAGE_MASK + 1) // 8))
            bit = chunk & _PAGE_MASK
            page[bit >> 3] |= 1 << (bit & 7)
