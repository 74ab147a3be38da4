"""What the kernel's page cache has of a file, seen and held fast; never by reading, which would bring it there.

A kernel takes pages back whenever it likes, cold ones on some virtual machines without any need. A test that wants
them to be there holds them:

    with held(path):
        ...  # What was cached of it when this began stays so.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Final

PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)


def cached_pages(path: Path) -> set[int]:
    """The numbers of the pages that are in the cache."""
    with _mapped(path) as mapped:
        return _cached(mapped)


@contextmanager
def held(path: Path) -> Iterator[int]:
    """What is cached now stays until the end of this, whatever the kernel needs; how many bytes that is.

    The file must be writable, though nothing is written, and its filesystem is in use meanwhile.
    """
    with _mapped(path) as mapped:
        pages = sorted(_cached(mapped))
        start = _address(mapped)
        for _, run in groupby(enumerate(pages), lambda numbered: numbered[1] - numbered[0]):
            first, *_ = page_numbers = [page for _, page in run]
            _call("mlock", start + first * PAGE, len(page_numbers) * PAGE)
        yield len(pages) * PAGE


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        try:
            yield mapped
        finally:
            gc.collect()  # What `_address` made would keep it from being closed.


def _cached(mapped: mmap.mmap) -> set[int]:
    there = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
    _call("mincore", _address(mapped), len(mapped), there)
    return {page for page, flags in enumerate(there) if flags & 1}


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _call(name: str, address: int, length: int, *more: object) -> None:
    if getattr(_libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(length), *more):
        raise OSError(error := ctypes.get_errno(), f"{name}: {os.strerror(error)}")
