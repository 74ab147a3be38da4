"""One compressed cluster, unpacked. Rule: never more than a cluster of output, whatever the bytes promise.

For threads: it is the only part of the formats that takes longer than a few microseconds, and the libraries let
go of the interpreter while they work. ISA-L unpacks some three times as fast as zlib; where there is none for a
processor (see pyproject.toml), zlib does the same.
"""

from __future__ import annotations

import zlib
from types import ModuleType

from cachefs.errors import FormatError
from cachefs.formats.qcow2_header import Compression

igzip: ModuleType | None = None
try:
    from isal import igzip_lib

    igzip = igzip_lib
except ImportError:
    pass

# No zlib header, and the window that qemu writes and reads with: 4 KiB.
_ZLIB_WINDOW_BITS = -12
# What the zstd format asks every reader to take, in bytes; nothing gains from more in clusters of 2 MiB.
_ZSTD_WINDOW_MAX = 8 << 20

_EXPANDS = "a compressed cluster would expand beyond its cluster"
_ENDS = "a compressed cluster ends before its cluster is full"
_BROKEN = "a compressed cluster cannot be decompressed"


def decompress(kind: Compression, data: bytes | memoryview, cluster_size: int) -> bytes:
    """Exactly one cluster from `data`, which may go on behind its compressed bytes (the format counts them in
    whole sectors). Raises FormatError."""
    if kind is Compression.ZSTD:
        return _zstd(data, cluster_size)
    return _zlib(data, cluster_size)


def _zlib(data: bytes | memoryview, cluster_size: int) -> bytes:
    if igzip is not None:
        # The whole cluster in one go. `isal_zlib` begins with less room, and lets go of the interpreter and waits
        # for it again each time that it makes more: a quarter slower, and more beside a busy loop.
        stream = igzip.IgzipDecompressor(flag=igzip.DECOMP_DEFLATE, hist_bits=-_ZLIB_WINDOW_BITS)
        try:
            cluster: bytes = stream.decompress(data, cluster_size)
            if len(cluster) == cluster_size and stream.eof:
                return cluster
        except igzip.error:
            pass
    # ISA-L reads on behind a cluster that has no end, and minds what it finds there: zlib has the last word.
    return _inflated(data, cluster_size)


def _inflated(data: bytes | memoryview, cluster_size: int) -> bytes:
    stream = zlib.decompressobj(_ZLIB_WINDOW_BITS)
    try:
        cluster = stream.decompress(data, cluster_size)
    except zlib.error as error:
        raise FormatError(_BROKEN) from error
    if len(cluster) < cluster_size:
        raise FormatError(_ENDS)
    if not stream.eof:
        _check_no_more(stream)
    return cluster


def _check_no_more(stream: zlib._Decompress) -> None:
    """A cluster that is full needs no proper end (qemu asks for none), but nothing may follow."""
    try:
        more = stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error:
        return
    if more:
        raise FormatError(_EXPANDS)


def _zstd(data: bytes | memoryview, cluster_size: int) -> bytes:
    import zstandard  # Few images need it, and it takes milliseconds.

    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).stream_reader(data)
    try:
        # Ends with its frame: what follows in the last sector is another cluster's.
        cluster = reader.read(cluster_size + 1)
    except zstandard.ZstdError as error:
        raise FormatError(_BROKEN) from error
    if len(cluster) > cluster_size:
        raise FormatError(_EXPANDS)
    if len(cluster) < cluster_size:
        raise FormatError(_ENDS)
    return cluster
