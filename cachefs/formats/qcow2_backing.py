"""The name of the file below a qcow2, out of its first bytes. Rule: the name is found, never followed; what cannot
be is refused.

`qcow2_header` reads images that are to be served and refuses those that have a backing file. This reads the disks
of instances, which have one: whatever else their headers say does not matter here.
"""

from __future__ import annotations

import struct

from cachefs.errors import FormatError
from cachefs.formats.qcow2_header import CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, MAGIC
from cachefs.plan.extents import Extent

HEAD_BYTES = 4096
"""From the start of the file: where qemu-img puts the name, behind some hundred bytes of header extensions."""

NAME_BYTES_MAX = 1023
"""qemu's own bound."""

# magic, version, backing file's name (offset, bytes), cluster bits: the same in versions 2 and 3.
_HEAD = struct.Struct(">4sIQII")


def backing_extent(head: bytes) -> Extent | None:
    """Where in the file the name is; None for what is no qcow2, or has nothing below it. `head`: the first
    HEAD_BYTES of the file, or all. Raises FormatError for a header that cannot be."""
    if head[: len(MAGIC)] != MAGIC:
        return None
    if len(head) < _HEAD.size:
        raise FormatError("its header is cut short")
    _, version, at, length, cluster_bits = _HEAD.unpack_from(head)
    if version not in (2, 3):
        raise FormatError(f"its qcow2 version {version} is neither 2 nor 3")
    if not at or not length:
        return None
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise FormatError(f"a cluster size of 2^{cluster_bits} bytes is not within 2^9 and 2^21")
    if length > NAME_BYTES_MAX:
        raise FormatError(f"the name of a backing file has {length} bytes")
    if at < _HEAD.size or at + length > 1 << cluster_bits:
        raise FormatError(f"the name of its backing file lies at byte {at}, outside of its first cluster")
    return Extent(at, at + length)
