"""Memory that the kernel looks up cheaply. Rule: only for buffers that are kept: a huge page is slow to fault in.

Whatever is copied to or from the kernel, or written past its cache, it looks up page by page. In huge pages that
costs next to nothing; in ordinary ones it was a quarter of the daemon's processor time in a cold read from end to
end (`sequential-cold`: 1.7 s for a GiB, and 1.3 s in huge ones).
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

HUGE_PAGE = 2 << 20


def place(size: int) -> mmap.mmap:
    """`size` bytes, zeros, in huge pages as far as these fit and the kernel has them."""
    found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE:
        with suppress(OSError):  # A kernel that was built without them.
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def buffer(size: int) -> memoryview:
    """The same, beginning on a huge page (kernels before 6.7 begin a mapping on any page)."""
    whole = place(size + HUGE_PAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(whole)) % HUGE_PAGE
    return memoryview(whole)[first : first + size]
