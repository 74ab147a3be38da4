"""What a hypervisor would take a disk for that it may probe. Rule: recognises, and judges nothing.

These are the marks by which QEMU's drivers know their files when nobody names a format, each taken a little
wider than QEMU takes it (no version, no length): what nearly is another format is no raw disk either. oslo.utils
knows fewer of them.
"""

from __future__ import annotations

import re

MARKS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb", "qcow2"),  # Version 1 as well, which QEMU calls qcow.
    (0, b"QED\x00", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vhd"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "ploop"),
    (0, b"WithouFreSpacExt", "ploop"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)

# A VMDK may be a text that names other files: comments and blank lines, then its version.
VMDK_TEXT = re.compile(rb"(?:#[^\n]*\n| *\r?\n)*version=[0-9]", re.IGNORECASE)


def marked(head: bytes) -> set[str]:
    """The formats, in Glance's words where it has one, whose marks the first bytes of a file carry."""
    found = {name for offset, mark, name in MARKS if head[offset : offset + len(mark)] == mark}
    if VMDK_TEXT.match(head):
        found.add("vmdk")
    return found
