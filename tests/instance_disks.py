"""Disks of instances for tests: as little of a qcow2 as names what is below it. Rule: the bytes are laid out here
once more, by the format's own text, and not by the code that reads them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

NAME_AT = 0x200


def head(
    name: bytes,
    *,
    version: int = 3,
    at: int = NAME_AT,
    length: int | None = None,
    cluster_bits: int = 16,
    magic: bytes = b"QFI\xfb",
) -> bytes:
    """The first bytes of a qcow2 that names `name`, up to the end of the name."""
    length = len(name) if length is None else length
    fields = struct.pack(">4sIQIIQ", magic, version, at, length, cluster_bits, 1 << 30)
    return fields.ljust(at, b"\0")[:at] + name if at > len(fields) else fields


def make_disk(path: Path, base: Path | bytes, **fields: Any) -> Path:
    """A disk at `path` whose backing file is `base`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head(base if isinstance(base, bytes) else str(base).encode(), **fields))
    return path
