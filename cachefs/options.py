"""Every option that cachefs.conf may have: its section, name, type, default and help. Rule: no file is read here.

The documents and the sample are made of these, so what a help text says is what an operator reads. Times are in
seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Final

from oslo_config import cfg

from cachefs.asking import DEFAULT_SOCKET
from cachefs.option_types import (
    AddressType,
    AmountType,
    FileModeType,
    HoursType,
    PathType,
    PolicyOptionType,
    PolicyType,
    RateType,
    RegexType,
    RuleType,
    SecondsType,
    ShareType,
    SpanSizeType,
    TrustType,
)
from cachefs.sources import auth

STORE: Final = "/var/lib/cachefs"
INSTANCES: Final = "/var/lib/nova/instances"  # Nova's, if nobody says otherwise.

_ID_MAX: Final = 2**32 - 2  # The last one means "unchanged" to chown(2).

OPTIONS: Final[dict[str, list[cfg.Opt]]] = {
    "mount": [
        cfg.Opt("mountpoint", PathType(), default="/mnt/cachefs", help="Where the tree of images appears."),
        cfg.BoolOpt(
            "allow_other",
            default=True,
            help="Let other accounts than the daemon's read, as the hypervisor's must. Without root this "
            "needs user_allow_other in /etc/fuse.conf.",
        ),
        cfg.IntOpt("uid", min=0, max=_ID_MAX, help="Owner that files show; the daemon's own if unset."),
        cfg.IntOpt("gid", min=0, max=_ID_MAX, help="Group that files show; the daemon's own if unset."),
        cfg.Opt("file_mode", FileModeType(), default="0444", help="Permissions that files show."),
        cfg.Opt(
            "read_deadline",
            SecondsType(0.1, 3600),
            default=60.0,
            help="How long a read waits for bytes that are not cached, before it fails with EIO. Cached "
            "bytes never wait.",
        ),
    ],
    "nova": [
        cfg.BoolOpt(
            "enabled",
            default=True,
            help="Have a folder nova in the mount: what Nova expects in its _base folder, and can be bound to it.",
        ),
        cfg.IntOpt(
            "uid",
            min=0,
            max=_ID_MAX,
            help="Owner of that folder, who may write there: Nova's. If unset, the account nova; where there is "
            "none, the owner that files show.",
        ),
        cfg.IntOpt("gid", min=0, max=_ID_MAX, help="Group of that folder, if unset as for uid."),
        cfg.StrOpt(
            "view",
            default="raw",
            choices=[
                ("raw", "the disk inside an image, as Nova has it with force_raw_images"),
                ("images", "Glance's bytes, for force_raw_images = False"),
            ],
            help="What of an image Nova finds there.",
        ),
    ],
    "store": [
        cfg.Opt(
            "path",
            PathType(),
            default=STORE,
            help="Folder of the store, on a local filesystem.",
        ),
        cfg.Opt(
            "max_size",
            AmountType(zero=False, whole=True),
            default="80%",
            help="The store never grows beyond this.",
        ),
        cfg.Opt(
            "min_free",
            AmountType(zero=True, whole=False),
            default="5%",
            help="What the store leaves free on its filesystem, whoever else fills it.",
        ),
        cfg.Opt(
            "high_watermark",
            ShareType(),
            default="95%",
            help="Above this share of what the store may hold, eviction begins in the background.",
        ),
        cfg.Opt(
            "low_watermark",
            ShareType(),
            default="85%",
            help="Eviction in the background ends when the store is down to this share.",
        ),
        cfg.Opt(
            "pin_share",
            ShareType(),
            default="50%",
            help="Pinned images may claim this share of what the store may hold, by their whole sizes.",
        ),
        cfg.BoolOpt(
            "verify_first_read",
            default=True,
            help="Compare each chunk with its digest when it is first read since the daemon's start. Off, rot on "
            "the disk reaches guests until the scrubber meets it.",
        ),
        cfg.Opt(
            "span_size",
            SpanSizeType(),
            sample_default="4M",
            help="Unit of indexing and of eviction: a power of two from 1M to 64M. It is fixed when the "
            "store is made; if unset it is the store's own, and 4M for a new one.",
        ),
        cfg.Opt(
            "commit_interval",
            SecondsType(0.01, 60),
            default=1.0,
            help="How long fetched bytes may wait for their commit. A crash within that time costs fetching "
            "them again.",
        ),
    ],
    "glance": [
        cfg.IntOpt("connections", default=8, min=1, max=64, help="Requests to Glance at the same time."),
        cfg.Opt("connect_timeout", SecondsType(0.1, 600), default=5.0, help="How long a connection may take."),
        cfg.Opt(
            "read_timeout",
            SecondsType(0.1, 3600),
            default=20.0,
            help="How long a connection may be without a byte, and a body may take for 64 KiB. Whole answers may "
            "take longer.",
        ),
        cfg.IntOpt(
            "retries",
            default=4,
            min=0,
            max=20,
            help="Tries after the first, of a request that brought nothing. While a read waits, an origin that "
            "is away is tried until the read's deadline.",
        ),
        cfg.Opt(
            "listing_ttl",
            SecondsType(0, 86400),
            default=60.0,
            help="How old a listing of images may be before Glance is asked again.",
        ),
        cfg.Opt(
            "negative_ttl",
            SecondsType(0, 86400),
            default=10.0,
            help="How long an image that Glance does not know stays unknown.",
        ),
    ],
    "hydration": [
        cfg.StrOpt(
            "mode",
            default="on-open",
            choices=[
                ("on-open", "opening or pinning an image fetches all of it"),
                ("manual", "only cachefs prefetch does"),
            ],
            help="When images are fetched to their last byte in the background.",
        ),
        cfg.Opt(
            "bandwidth",
            RateType(),
            default="0",
            help="Bytes per second that is fetched in the background at most; 0 for what guests leave.",
        ),
        cfg.IntOpt("concurrency", default=2, min=1, max=16, help="Requests at the same time in the background."),
    ],
    "trace": [
        cfg.Opt(
            "seconds",
            SecondsType(0, 3600),
            default=120.0,
            help="How long after an open it is recorded which parts of an image are read first, so that the next "
            "guest has them sooner; 0 for never. Traces that are known are used all the same.",
        ),
    ],
    "leases": [
        cfg.ListOpt(
            "folders",
            item_type=PathType(),
            default=[INSTANCES],
            help="Folders with the disks of instances. Images of this mount that a qcow2 there has as its backing "
            "file are never evicted.",
        ),
        cfg.Opt(
            "interval",
            SecondsType(1, 86400),
            default=300.0,
            help="Seconds from the end of one look at those folders to the next. There is one at the start, too, "
            "and one soon after an image was closed.",
        ),
        cfg.Opt(
            "grace",
            SecondsType(60, 366 * 86400),
            default=86400.0,
            help="How long an image stays leased after the last disk that stood on it is gone.",
        ),
        cfg.Opt(
            "touch_grace",
            SecondsType(0, 366 * 86400),
            default=86400.0,
            help="How long an image stays leased after somebody set the times of its file, as Nova does.",
        ),
    ],
    "scrub": [
        cfg.Opt(
            "interval",
            SecondsType(0, 366 * 86400),
            default=604800.0,
            help="Seconds from the beginning of one scrub to that of the next; 0 for none but those that "
            "cachefs scrub asks for.",
        ),
        cfg.Opt(
            "bandwidth",
            RateType(),
            default="100M",
            help="Bytes per second that a scrub reads at most; 0 for no bound but that no guest waits.",
        ),
        cfg.Opt(
            "hours",
            HoursType(),
            help="Local hours in which a scrub by interval may work, as in 22-6; any hour if unset.",
        ),
    ],
    "precache": [
        cfg.ListOpt(
            "policies",
            item_type=PolicyType(),
            default=[],
            help="Which policies say what this node should hold, in order of preference: property, name, "
            "most-used, newest, static, or a plug-in's. None: nothing is pre-cached.",
        ),
        cfg.Opt(
            "interval",
            SecondsType(60, 30 * 86400),
            default=3600.0,
            help="Seconds between two times that they are asked, give or take a tenth. Each costs one listing.",
        ),
        cfg.Opt(
            "share",
            ShareType(),
            default="50%",
            help="What they may hold of what the store may hold, by the whole sizes of images.",
        ),
        cfg.ListOpt(
            "name_patterns",
            default=[],
            help="For name: shell patterns of names, as in ubuntu-24.04-*. pin: before one pins what it finds.",
        ),
        cfg.IntOpt("most_used_count", default=5, min=1, max=1000, help="For most-used: how many."),
        cfg.IntOpt("newest_count", default=1, min=1, max=100, help="For newest: how many of each family."),
        cfg.Opt(
            "newest_pattern",
            RegexType(),
            help="For newest: a regular expression that finds the family in a name, by its group family or its "
            "first group. If unset, a family is one os_distro on one architecture.",
        ),
        cfg.ListOpt(
            "static_images",
            default=[],
            help="For static: ids or names of images. pin: before one pins it.",
        ),
        cfg.MultiOpt(
            "option",
            item_type=PolicyOptionType(),
            help="An option of a plug-in's policy, as in POLICY.NAME = VALUE. May be repeated.",
        ),
    ],
    "priorities": [
        cfg.ListOpt(
            "critical",
            item_type=RuleType(),
            default=[],
            help="Images that are fetched first and evicted last: owner:ID, tag:TAG, name:PATTERN, id:UUID. Tags "
            "and names count for images that trust_properties trusts.",
        ),
        cfg.ListOpt(
            "normal",
            item_type=RuleType(),
            default=[],
            help="Images that are neither, whatever low and their properties say.",
        ),
        cfg.ListOpt(
            "low",
            item_type=RuleType(),
            default=[],
            help="Images that are fetched last and evicted first.",
        ),
        cfg.ListOpt(
            "trust_properties",
            item_type=TrustType(),
            default=["public"],
            help="Whose images may say of themselves, by properties, tags and names, that they are critical or "
            "are to be pre-cached: public (those that everybody sees), owner:ID, all.",
        ),
    ],
    "convert": [
        cfg.StrOpt(
            "user",
            default="nobody",
            help="Account as which qemu-nbd reads images in other formats than raw and qcow2; best one that "
            "nothing else runs as. Without root it stays the daemon's.",
        ),
    ],
    "control": [
        cfg.Opt(
            "socket",
            PathType(),
            default=DEFAULT_SOCKET,
            help="Unix socket on which the daemon answers the cachefs command.",
        ),
    ],
    "metrics": [
        cfg.Opt(
            "listen",
            AddressType(),
            default="127.0.0.1:19292",
            help="Address and port of /metrics, /healthz and /readyz, for whoever can reach it; nothing for off.",
        ),
    ],
}

_SECTION_HELP: Final = {
    "mount": "The tree of images, as the hypervisor sees it.",
    "nova": "The folder nova of the mount, for nova-compute. Where its disks are in Ceph (images_type = rbd), it "
    "must not be bound to _base: see the documentation.",
    "store": "What is cached, and how much of it.",
    "glance": "Where images come from. There are three ways to be let in: auth_type with its own options "
    "(password and v3applicationcredential are shown below; keystoneauth has more), cloud, or "
    "auth_type = none with endpoints.",
    "hydration": "How images come whole, so that instances do not need Glance again.",
    "trace": "Boot traces: what guests read first of an image.",
    "leases": "What is kept for instances, running or stopped.",
    "scrub": "When and how fast everything that is cached is compared with its digests.",
    "precache": "What is fetched before anybody asks for it, and by which policies.",
    "priorities": "Which images matter most. The rest is normal.",
    "convert": "How the disks of vmdk, vhd, vhdx, vdi and ploop images are read: by qemu-nbd in a sandbox, where "
    "qemu-utils is installed.",
    "control": "How the cachefs command reaches the daemon.",
    "metrics": "What Prometheus, and whoever else watches the node, can ask over HTTP.",
}


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For oslo.config's generator: every section but `[DEFAULT]`, which is oslo.log's."""
    shown = {**OPTIONS, "glance": auth.sample_options() + OPTIONS["glance"]}
    return [(cfg.OptGroup(section, help=_SECTION_HELP[section]), opts) for section, opts in shown.items()]


def log_options() -> list[cfg.Opt]:
    """oslo.log's, which are the section `[DEFAULT]`."""
    # By entry point, as the generator does: oslo.log has no other public list that includes old names.
    (point,) = entry_points(group="oslo.config.opts", name="oslo.log")
    return [opt for _, opts in point.load()() for opt in opts]


def names(section: str, opts: Iterable[cfg.Opt]) -> Iterator[tuple[str, str]]:
    """(section, name) of all that a file may call these options of a section, names of old included."""
    for opt in opts:
        yield section, opt.dest
        for old in opt.deprecated_opts:
            yield old.group or section, old.name or opt.dest


def plain_options() -> set[tuple[str, str]]:
    """(section, name) of those whose values anybody may see."""
    shown = [(group.name, opt) for group, opts in list_opts() for opt in opts]
    shown += [("DEFAULT", opt) for opt in log_options()]
    return {(section, name) for section, opt in shown if not opt.secret for _, name in names(section, [opt])} - {
        ("precache", "option")  # A plug-in's: it may be anything.
    }
