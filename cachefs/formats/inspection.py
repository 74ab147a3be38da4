"""Whether an image may be served as what it is said to be, before its first byte is. Rule: it asks for few bytes,
believes none of them, and says what it found in its own words.

Two lines stand one behind the other, and both must agree: oslo.utils' inspectors, which Nova and Glance use, and
this project's own parsers, which know what those leave out. Whoever has the bytes drives it:

    while (extent := inspection.wants()) is not None:
        inspection.feed(extent.start, await read(extent))
    verdict = inspection.verdict
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cachefs.errors import FormatError
from cachefs.formats import first_line, ploop, probe, vdi, vhd, vhdx, vmdk
from cachefs.formats.pieces import Lacking, Pieces
from cachefs.formats.qcow2_header import HEAD_MAX, Header
from cachefs.plan.extents import Extent

HEAD_BYTES = HEAD_MAX
"""The first piece: one block. The farthest mark is that of an ISO, which ends at 34 KiB."""

BYTES_MAX = 4 << 20
FEEDS_MAX = 16
REASON_MAX = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the inspection came to.

    `virtual_size`: of the disk inside, in bytes; None when not `ok`. `real_format`: what the content is, in
    Glance's words where it has one, `gpt` for a raw disk with partitions; None when it cannot be told, or is
    several at once. `matches`: it is what `disk_format` says, safe or not. `reason`: why not `ok`, for people,
    after "refused: "; printable ASCII.
    """

    ok: bool
    virtual_size: int | None
    real_format: str | None
    matches: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """`accepts`: the real formats that are what the disk_format says. `size`: the second line, whose answer is the
    size of the disk; None where the file is the disk. `lenient`: safety checks of the first line that do not
    count. `subject`: what the file is to a reader of the reason."""

    accepts: frozenset[str]
    size: Callable[[Pieces], int] | None = None
    lenient: frozenset[str] = frozenset()
    subject: str = "its content"


def _qcow2_size(pieces: Pieces) -> int:
    return Header.parse(_head(pieces), pieces.size).size


# What a hypervisor that probes takes for raw. Nova wants an ISO to be said to be one; as raw it is as harmless.
RAW = frozenset({"raw", "gpt", "iso"})
# Kernels and ramdisks have boot sectors of their own, and those of guests' disks were never Nova's business.
NO_PARTITIONS = frozenset({"mbr"})

RULES = {
    "raw": Rule(RAW),
    "ami": Rule(RAW),
    "aki": Rule(RAW, lenient=NO_PARTITIONS),
    "ari": Rule(RAW, lenient=NO_PARTITIONS),
    "iso": Rule(frozenset({"iso"})),
    # The first line does not know extended L2 entries; the second knows every feature there is.
    "qcow2": Rule(frozenset({"qcow2"}), _qcow2_size, frozenset({"unknown_features"})),
    "vmdk": Rule(frozenset({"vmdk"}), vmdk.virtual_size),
    "vhd": Rule(frozenset({"vhd"}), vhd.virtual_size),
    "vhdx": Rule(frozenset({"vhdx"}), vhdx.virtual_size),
    "vdi": Rule(frozenset({"vdi"}), vdi.virtual_size),
    "ploop": Rule(frozenset({"ploop"}), ploop.virtual_size),
}
GUEST_DISK = Rule(RAW, lenient=NO_PARTITIONS, subject="the disk inside it")

SAFETY = {
    "backing_file": "it has a backing file",
    "data_file": "its data is in another file",
    "unknown_features": "it has features that are not known",
    "descriptor": "its descriptor is not that of one file that stands alone",
    "footer": "its footer contradicts its header",
    "mbr": "its partition table cannot be one",
}


class Inspection:
    """Of one file: an image of Glance's `disk_format`, by its rule if none is given. `file_size` in bytes. Nothing
    is fetched or awaited here; what it holds is at most BYTES_MAX, and it ends after at most FEEDS_MAX pieces."""

    def __init__(self, disk_format: str | None, file_size: int, rule: Rule | None = None) -> None:
        self._disk_format = disk_format or ""
        self._rule = rule or RULES.get(self._disk_format)
        self._pieces = Pieces(file_size)
        self._feeds = 0
        self._wanted: Extent | None = None
        self.verdict: Verdict | None = None
        self._advance()

    def wants(self) -> Extent | None:
        """The bytes that are needed next, all inside the file; None when there is a verdict."""
        return self._wanted

    def feed(self, offset: int, data: bytes) -> None:
        """Bytes of the file from `offset`, which hold at least those that `wants` named; the others are not kept.
        Raises ValueError when they do not."""
        wanted = self._wanted
        if wanted is None or offset > wanted.start or offset + len(data) < wanted.end:
            raise ValueError(f"{len(data)} bytes at {offset} are not what was wanted: {wanted}")
        self._pieces.add(wanted, bytes(data[wanted.start - offset : wanted.end - offset]))
        self._feeds += 1
        self._advance()

    def _advance(self) -> None:
        """To the next want, or the verdict."""
        self._wanted = None
        if self._rule is None:
            self.verdict = Verdict(False, None, None, False, "its disk_format is none that can be inspected")
            return
        finding = Finding()
        try:
            size = _judge(self._rule, self._disk_format, self._pieces, finding)
        except Lacking as lacking:
            if self._feeds < FEEDS_MAX and self._pieces.held + lacking.extent.length <= BYTES_MAX:
                self._wanted = lacking.extent
                return
            refused = "too much of it would have to be read to make it out"
        except FormatError as error:
            refused = error.reason
        else:
            self.verdict = Verdict(True, size, finding.real, True)
            return
        self.verdict = Verdict(False, None, finding.real, finding.matches, _printable(refused))


def guest_disk_inspection(size: int) -> Inspection:
    """Of the disk inside an image, after translation: it must be what a hypervisor that probes takes for raw."""
    return Inspection("raw", size, GUEST_DISK)


@dataclass(slots=True)
class Finding:
    """What is known by the time that the judgement ends, however it ends."""

    real: str | None = None
    matches: bool = False


def _judge(rule: Rule, disk_format: str, pieces: Pieces, finding: Finding) -> int:
    """The size of the disk. Raises FormatError and Lacking."""
    head = _head(pieces)
    inspectors = first_line.matching(head)
    finding.real = _real_format(set(inspectors) | probe.marked(head), rule, pieces)
    if finding.real not in rule.accepts:
        raise FormatError(f"{rule.subject} is {finding.real}, not {disk_format}")
    finding.matches = True
    # The second line goes before the first one's last word: it asks for what both need in fewer pieces, and its
    # reasons say more.
    size = rule.size(pieces) if rule.size is not None else pieces.size
    if finding.real in inspectors:
        inspector = inspectors[finding.real]
        if inspector is None:
            raise FormatError("the inspector of its format cannot make it out")
        failed = sorted(first_line.failures(inspector, pieces) - rule.lenient)
        if failed:
            raise FormatError(SAFETY.get(failed[0], f"it fails the safety check {failed[0]}"))
    return size


def _head(pieces: Pieces) -> bytes:
    return pieces.get(0, min(HEAD_BYTES, pieces.size), "header")


def _real_format(found: set[str], rule: Rule, pieces: Pieces) -> str:
    """The one format that the content is. Raises FormatError when it is several, and Lacking."""
    if "vhd" in rule.accepts and "vhd" not in found and vhd.is_fixed(pieces):
        # A fixed disk is a raw one with a footer behind it, so what it holds must be a disk too.
        found = {"vhd"} | (found - RAW)
    if found == {"iso", "gpt"}:
        return "iso"  # One that also boots from a stick.
    if len(found) > 1:
        raise FormatError(f"{rule.subject} is several formats at once: " + ", ".join(sorted(found)))
    return found.pop() if found else "raw"


def _printable(reason: str) -> str:
    """Our own words with an image's numbers; cut and cleaned all the same, because it goes to a log."""
    return "".join(c if " " <= c <= "~" else "?" for c in reason[:REASON_MAX])
