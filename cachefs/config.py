"""oslo.config options → one frozen `Config`. Rule: nothing unknown is let through, and nothing is read twice.

Files are read once, at the start. An option or a section that nobody registered, a value out of range and a
contradiction each are a `ConfigError`: `load` raises the first, `check` gives all of them. Fields are named
as their options are; times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import pwd
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path, PurePath

from oslo_config import cfg, generator, iniparser
from oslo_log import log
from oslo_log.formatters import ContextFormatter

from cachefs import __version__
from cachefs.asking import DEFAULT_FILE, DEFAULT_SOCKET
from cachefs.errors import ConfigError
from cachefs.hiding import cloud_files, is_secret, readable_by_all
from cachefs.option_types import (
    Address,
    AddressType,
    Amount,
    AmountType,
    FileModeType,
    Hours,
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
from cachefs.plan.priorities import Rules
from cachefs.policies import NAMESPACE
from cachefs.sources import auth
from cachefs.words import size

NO_FILE = "there is no such file: write one (`cachefs config sample` shows how), or name yours with --config-file"
SMALL_STORE = 1 << 30

INSTANCES = "/var/lib/nova/instances"  # Nova's, if nobody says otherwise.

SOCKET_PATH_MAX = 107  # sun_path of unix(7), less its final zero.


# ── What the program sees ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MountConfig:
    mountpoint: str
    allow_other: bool
    uid: int
    gid: int
    file_mode: int
    read_deadline: float


@dataclass(frozen=True, slots=True)
class StoreConfig:
    path: str
    max_size: Amount
    min_free: Amount
    high_watermark: float  # These three are fractions.
    low_watermark: float
    pin_share: float
    verify_first_read: bool
    span_size: int | None  # None: the store's own, or the default of a new one.
    commit_interval: float


@dataclass(frozen=True, slots=True)
class GlanceConfig:
    auth: auth.AuthOptions
    connections: int
    connect_timeout: float
    read_timeout: float
    retries: int
    listing_ttl: float
    negative_ttl: float


@dataclass(frozen=True, slots=True)
class HydrationConfig:
    mode: str
    bandwidth: int  # Bytes per second; 0 for no bound.
    concurrency: int


@dataclass(frozen=True, slots=True)
class TraceConfig:
    seconds: float  # 0: nothing is recorded.


@dataclass(frozen=True, slots=True)
class LeasesConfig:
    folders: tuple[str, ...]
    interval: float
    grace: float
    touch_grace: float


@dataclass(frozen=True, slots=True)
class ScrubConfig:
    interval: float  # 0: only when it is asked for.
    bandwidth: int  # Bytes per second; 0 for no bound.
    hours: Hours | None  # None: at any hour.


@dataclass(frozen=True, slots=True)
class PrecacheConfig:
    policies: tuple[str, ...]  # None of them: nothing is pre-cached.
    interval: float
    share: float  # A fraction of what the store may hold.
    options: Mapping[str, Mapping[str, str]]  # Of each policy, as text.


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    user: str


@dataclass(frozen=True, slots=True)
class ControlConfig:
    socket: str


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    listen: Address | None  # None: off.


@dataclass(frozen=True, slots=True)
class LogConfig:
    """oslo.log keeps its own options: it looks at them again whenever it is set up."""

    debug: bool
    conf: cfg.ConfigOpts = field(repr=False, compare=False)

    @property
    def file(self) -> str | None:
        """The one that is written to, if it is one."""
        name: str | None = self.conf.log_file
        return os.path.join(self.conf.log_dir or "", name) if name else None

    def start(self) -> None:
        """From here on the root logger does what `[DEFAULT]` says."""
        try:
            log.setup(self.conf, "cachefs", __version__, fix_eventlet=False)
        except log.LogConfigError as e:
            raise ConfigError("DEFAULT/log_config_append", f"{e.log_config}: {e.err_msg}") from e
        except OSError as e:
            raise ConfigError("DEFAULT/log_file", f"{e.filename}: {e.strerror}") from e
        threading.excepthook = _log_end_of_thread
        for handler in logging.getLogger().handlers:
            if type(handler.formatter) is ContextFormatter:
                handler.setFormatter(_formatter(self.conf))


def _log_end_of_thread(args: threading.ExceptHookArgs) -> None:
    """As oslo.log does for the main thread: in lines that have their time."""
    name = args.thread.name if args.thread is not None else "?"
    error = args.exc_value
    if error is not None:
        logging.getLogger("cachefs").critical("unexpected end of the thread %s", name, exc_info=error)


class _OnceFormatter(ContextFormatter):
    """oslo.log's, but for two things. Where a line is written while an exception is handled, it puts that one
    behind the line as well: ours say themselves what failed. And of what has several lines it leaves all but the
    first without their time, so that a text from elsewhere could look like a line of ours."""

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        if not record.exc_info:
            record.levelno = min(level, logging.INFO)  # What it goes by; the level's name is another field.
        try:
            text = super().format(record)
        finally:
            record.levelno = level
        trace = f"\n{record.exc_text}" if record.exc_text else ""  # That has it on each line.
        said = text.removesuffix(trace)
        if "\n" not in said:
            return text
        if not hasattr(record, "asctime"):
            record.asctime = self.formatTime(record, self.datefmt)
        prefix = self.conf.logging_exception_prefix.replace(" ERROR ", " %(levelname)s ") % vars(record)
        return said.replace("\n", f"\n{prefix}") + trace


def _formatter(conf: cfg.ConfigOpts) -> ContextFormatter:
    return _OnceFormatter(project="cachefs", version=__version__, datefmt=conf.log_date_format, config=conf)


@dataclass(frozen=True, slots=True)
class Config:
    mount: MountConfig
    store: StoreConfig
    glance: GlanceConfig
    hydration: HydrationConfig
    leases: LeasesConfig
    trace: TraceConfig
    scrub: ScrubConfig
    precache: PrecacheConfig
    priorities: Rules
    convert: ConvertConfig
    control: ControlConfig
    metrics: MetricsConfig
    log: LogConfig


# ── Options ───────────────────────────────────────────────────────────────────────────────────────────

_ID_MAX = 2**32 - 2  # The last one means "unchanged" to chown(2).

_OPTIONS: dict[str, list[cfg.Opt]] = {
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
    "store": [
        cfg.Opt(
            "path",
            PathType(),
            default="/var/lib/cachefs",
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


_SECTION_HELP = {
    "mount": "The tree of images, as the hypervisor sees it.",
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
    shown = {**_OPTIONS, "glance": auth.sample_options() + _OPTIONS["glance"]}
    return [(cfg.OptGroup(section, help=_SECTION_HELP[section]), opts) for section, opts in shown.items()]


# What one needs most comes first; oslo.log's many options last.
_SAMPLE_ORDER = (
    "glance", "store", "mount", "hydration", "leases", "precache", "priorities", "trace", "scrub", "metrics",
    "control", "convert", "DEFAULT",
)  # fmt: skip


def _log_options() -> list[cfg.Opt]:
    # By entry point, as the generator does: oslo.log has no other public list that includes old names.
    (point,) = entry_points(group="oslo.config.opts", name="oslo.log")
    return [opt for _, opts in point.load()() for opt in opts]


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────


def load(argv_files: Sequence[str], config_dirs: Sequence[str], overrides: Mapping[str, str]) -> Config:
    """What the files say, unless `overrides` names the `section/option`. Raises the first `ConfigError`."""
    config, faults = _read(argv_files, config_dirs, overrides)
    if config is None:
        raise faults[0]
    return config


def check(
    files: Sequence[str], config_dirs: Sequence[str] = (), overrides: Mapping[str, str] | None = None
) -> list[ConfigError]:
    """All that would stop a start with these files."""
    return _read(files, config_dirs, overrides or {})[1]


def warnings(files: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """What does not stop a start and is hardly meant, one line each."""
    faults: list[ConfigError] = []
    paths = list(_paths(files, config_dirs, faults))
    found = list(_secrets_for_all(paths))
    config, faults = _read(files, config_dirs, {})
    if config is None:
        return found
    most = config.store.max_size
    if not most.is_percent and most.of(0) < SMALL_STORE:
        found.append(
            f"store/max_size: {size(most.of(0))} is less than most images have: hardly anything stays cached "
            "(write 200G for GiB, or 80%)"
        )
    if config.glance.auth.verify is False:
        found.append("glance/insecure: whoever is between this node and Glance can give it other bytes")
    installed = sorted(policy.name for policy in entry_points(group=NAMESPACE))
    for name in config.precache.policies:
        if name not in installed:
            found.append(f"precache/policies: {name} is not installed (there are {', '.join(installed)})")
    return found


def files_read(files: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """Those that count, in the order in which later ones win; without those that cannot be looked for."""
    return list(_paths(files, config_dirs, []))


def plain_options() -> set[tuple[str, str]]:
    """(section, name) of those whose values anybody may see."""
    shown = [(group.name, opt) for group, opts in list_opts() for opt in opts]
    shown += [("DEFAULT", opt) for opt in _log_options()]
    return {(section, name) for section, opt in shown if not opt.secret for _, name in _names(section, [opt])} - {
        ("precache", "option")  # A plug-in's: it may be anything.
    }


def _secrets_for_all(paths: Iterable[str]) -> Iterator[str]:
    """Files with a secret that everybody may read."""
    clouds = False
    for path in paths:
        names = [line.name for line in _lines(path, []) if line.section == auth.GROUP and line.name is not None]
        clouds = clouds or "cloud" in names
        secrets = [name for name in names if is_secret(name)]
        if secrets and readable_by_all([Path(path)]):
            yield f"{path}: everybody on this node can read {secrets[0]}: chmod 0600 {path} (0640 for a group)"
    for file in readable_by_all(cloud_files()) if clouds else ():
        yield f"{file}: everybody on this node can read its credentials: chmod 0600 {file}"


def sample() -> str:
    """A commented file with every option and its default."""
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(
        ["--namespace", "cachefs", "--namespace", "oslo.log", "--wrap-width", "100"],
        project="cachefs",
        default_config_files=[],
        default_config_dirs=[],
    )
    text = io.StringIO()
    generator.generate(conf, text)
    parts = re.split(r"^(?=\[\w+\]$)", text.getvalue(), flags=re.MULTILINE)
    known = {part.partition("]")[0][1:]: part.strip() for part in parts if part.strip()}
    ordered = [known.pop(section) for section in _SAMPLE_ORDER] + list(known.values())
    head = (
        f"# {DEFAULT_FILE}: the configuration of cachefs {__version__}.\n"
        "# Only [glance] is needed; look at [store] max_size. Mode 0600, or 0640 for the daemon's group: it\n"
        "# has a secret. `cachefs config check` names what is wrong, `cachefs doctor` tries it.\n"
    )
    return "\n\n\n".join([head, *ordered]) + "\n"


def _read(
    files: Sequence[str], config_dirs: Sequence[str], overrides: Mapping[str, str]
) -> tuple[Config | None, list[ConfigError]]:
    faults: list[ConfigError] = []
    paths = list(_paths(files, config_dirs, faults))
    lines = [line for path in paths for line in _lines(path, faults)]
    if faults:  # What else is wrong depends on what could not be read.
        return None, faults
    reading = _Reading(paths, lines, overrides)
    if not paths and reading.faults:  # They all are one: nobody has said anything yet.
        reading.faults.insert(0, ConfigError(DEFAULT_FILE, NO_FILE))
    return reading.config(), reading.faults


def _paths(files: Sequence[str], config_dirs: Sequence[str], faults: list[ConfigError]) -> Iterator[str]:
    """In the order in which later ones win."""
    if not files and os.path.exists(DEFAULT_FILE):
        yield DEFAULT_FILE
    yield from (os.path.abspath(os.path.expanduser(path)) for path in files)
    for folder in config_dirs:
        try:
            yield from sorted(str(path) for path in Path(folder).absolute().iterdir() if path.suffix == ".conf")
        except OSError as e:
            faults.append(ConfigError(folder, f"cannot be read: {e.strerror}"))


@dataclass(frozen=True, slots=True)
class _Line:
    """`name` in `section` at a place in a file; a section's own head has no name."""

    section: str
    name: str | None
    where: str


class _Parser(iniparser.BaseParser):
    """oslo.config's own grammar, but it remembers the place of each assignment."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.lines = path, list[_Line]()

    def new_section(self, section: str) -> None:
        self._add(section, None, self.lineno)

    def assignment(self, key: str, value: list[str]) -> None:
        number = self.lineno - len(value)  # Called at the line that ends it: the value may have had several.
        if not self.lines:
            raise self.parse_exc("a section must come before the first option", number, key)
        self._add(self.lines[-1].section, key, number)

    def _add(self, section: str, name: str | None, number: int) -> None:
        # oslo.config takes sections in any case, except DEFAULT.
        self.lines.append(
            _Line(section if section == "DEFAULT" else section.lower(), name, f"{self.path}:{number}")
        )


def _lines(path: str, faults: list[ConfigError]) -> list[_Line]:
    parser = _Parser(path)
    try:
        # An empty line at the end, so that the last assignment ends as all others do.
        parser.parse([*Path(path).read_text(encoding="utf-8").split("\n"), ""])
    except PermissionError as e:
        faults.append(ConfigError(path, f"cannot be read: {e.strerror} (it may hold a secret: try sudo)"))
    except OSError as e:
        faults.append(ConfigError(path, f"cannot be read: {e.strerror}"))
    except UnicodeDecodeError as e:
        faults.append(ConfigError(path, f"is not UTF-8 at byte {e.start}"))
    except iniparser.ParseError as e:
        faults.append(ConfigError(path, f"line {e.lineno}: {e.msg}"))  # Not the line: it may be a password.
    return parser.lines


class _Reading:
    """One pass from files to `Config`; `faults` grows on the way."""

    def __init__(self, paths: list[str], lines: list[_Line], overrides: Mapping[str, str]) -> None:
        self.faults: list[ConfigError] = []
        self._lines, self._overrides = lines, dict(overrides)
        self._conf = cfg.ConfigOpts()
        self._conf([], project="cachefs", default_config_files=paths, default_config_dirs=[])
        self._known: dict[str, list[cfg.Opt]] = {}
        for section, opts in {"DEFAULT": _log_options(), **_OPTIONS}.items():
            self._conf.register_opts(opts, group=_group(section))
            self._learn(section, opts)
        self._learn(auth.GROUP, auth.register(self._conf))
        # Only now is it known which plugin of keystoneauth has been chosen.
        self._learn(auth.GROUP, auth.register_plugin(self._conf))
        self._refuse_unknown()
        named = {fault.option for fault in self.faults}
        for fault in [*_contradictions(self._conf), *auth.validate(self._conf)]:
            if fault.option not in named:  # A bad value has become a default by now: no second complaint.
                self.faults.append(fault)

    def config(self) -> Config | None:
        return None if self.faults else _config(self._conf)

    def _learn(self, section: str, opts: list[cfg.Opt]) -> None:
        """Applies overrides; puts the default where a value is bad, so that reading can go on."""
        self._known.setdefault(section, []).extend(opts)
        group = _group(section)
        for opt in opts:
            if opt.dest not in (self._conf if group is None else self._conf[group]):
                continue  # Known, but not of the plugin that was chosen.
            where = self._where(section, opt)
            try:
                if (text := self._overrides.pop(f"{section}/{opt.dest}", None)) is not None:
                    where = "given at the start"
                    self._conf.set_override(opt.dest, text, group)
                value = self._conf[opt.dest] if group is None else self._conf[group][opt.dest]
                if value is None and opt.default is not None:  # oslo.config's numbers take "" for None.
                    raise ValueError("has no value")
            except (cfg.Error, ValueError) as e:
                self.faults.append(ConfigError(f"{section}/{opt.dest}", f"{where}: {_reason(opt, e)}"))
                self._conf.set_override(opt.dest, opt.default, group)

    def _where(self, section: str, opt: cfg.Opt) -> str:
        """The last place that sets it: that is the one that counts."""
        names = set(_names(section, [opt]))
        places = [line.where for line in self._lines if (line.section, line.name) in names]
        return places[-1] if places else "environment"

    def _refuse_unknown(self) -> None:
        known = {name for section, opts in self._known.items() for name in _names(section, opts)}
        for line in self._lines:
            if line.section not in self._known:
                if line.name is None:
                    hint = _hint(line.section, self._known)
                    self.faults.append(ConfigError(f"[{line.section}]", f"{line.where}: unknown section{hint}"))
            elif line.name is not None and (line.section, line.name) not in known:
                self._refuse(line.section, line.name, line.where)
        for option in self._overrides:  # Those that no option has taken.
            section, _, name = option.rpartition("/")
            self._refuse(section or "DEFAULT", name, "given at the start")

    def _refuse(self, section: str, name: str, where: str) -> None:
        reason = auth.explain(self._conf, name) if section == auth.GROUP else None
        if reason is None:
            elsewhere = [s for s, opts in self._known.items() if any(opt.dest == name for opt in opts)]
            here = [opt.dest for opt in self._known.get(section, [])]
            hint = f": it belongs into [{elsewhere[0]}]" if elsewhere else _hint(name, here)
            reason = f"unknown option{hint}"
        self.faults.append(ConfigError(f"{section}/{name}", f"{where}: {reason}"))


def _group(section: str) -> str | None:
    return None if section == "DEFAULT" else section


def _names(section: str, opts: Iterable[cfg.Opt]) -> Iterator[tuple[str, str]]:
    """All that a file may call them, names of old included."""
    for opt in opts:
        yield section, opt.dest
        for old in opt.deprecated_opts:
            yield old.group or section, old.name or opt.dest


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


def _reason(opt: cfg.Opt, error: Exception) -> str:
    if isinstance(error, (cfg.NoSuchOptError, cfg.TemplateSubstitutionError)):
        # Their text quotes a part of the value, which may be a password.
        return "$ begins the name of an option: a literal one is written $$"
    cause = error.__context__ if isinstance(error, cfg.ConfigSourceValueError) else error
    return "has no valid value" if opt.secret else str(cause)


# ── Meaning ───────────────────────────────────────────────────────────────────────────────────────────


def _contradictions(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    mountpoint, store, socket = conf.mount.mountpoint, conf.store.path, conf.control.socket
    try:
        pwd.getpwnam(conf.convert.user)
    except KeyError:
        yield ConfigError("convert/user", f"there is no user {conf.convert.user} here")
    if conf.store.low_watermark >= conf.store.high_watermark:
        yield ConfigError("store/low_watermark", "is not below high_watermark: eviction would never end")
    if PurePath(store).is_relative_to(mountpoint):
        yield ConfigError("store/path", f"{store} would lie under the mount itself, {mountpoint}")
    elif PurePath(mountpoint).is_relative_to(store):
        yield ConfigError("mount/mountpoint", f"{mountpoint} would lie inside the store, {store}")
    for folder in conf.leases.folders:
        if folder != INSTANCES and PurePath(folder).is_relative_to(mountpoint):
            yield ConfigError("leases/folders", f"{folder} would lie under the mount itself, {mountpoint}")
    if PurePath(socket).is_relative_to(mountpoint):
        yield ConfigError("control/socket", f"{socket} would lie under the mount itself, {mountpoint}")
    if len(os.fsencode(socket)) > SOCKET_PATH_MAX:
        yield ConfigError("control/socket", f"is longer than the {SOCKET_PATH_MAX} bytes that a socket can have")
    yield from _policy_contradictions(conf.precache)


def _policy_contradictions(precache: cfg.ConfigOpts.GroupAttr) -> Iterator[ConfigError]:
    for policy, name in (("name", "name_patterns"), ("static", "static_images")):
        if policy in precache.policies and not precache[name]:
            yield ConfigError(f"precache/{name}", f"is empty: the policy {policy} would hold nothing")
    for option in precache.option or ():
        if option.policy not in precache.policies:
            yield ConfigError("precache/option", f"{option.policy} is not among the policies")
        elif option.policy in _OWN_OPTIONS:
            yield ConfigError("precache/option", f"{option.policy} has options of its own in [precache]")


# The options of the policies that come with cachefs, as they are given to them.
_OWN_OPTIONS: dict[str, dict[str, str]] = {
    "property": {},
    "name": {"patterns": "name_patterns"},
    "most-used": {"count": "most_used_count"},
    "newest": {"count": "newest_count", "pattern": "newest_pattern"},
    "static": {"images": "static_images"},
}


def _policy_options(precache: cfg.ConfigOpts.GroupAttr) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {policy: {} for policy in precache.policies}
    for policy, names in _OWN_OPTIONS.items():
        for name, option in names.items() if policy in found else ():
            value = precache[option]
            if value is not None:
                found[policy][name] = ", ".join(value) if isinstance(value, list) else str(value)
    for given in precache.option or ():
        found[given.policy][given.name] = given.value
    return found


def _config(conf: cfg.ConfigOpts) -> Config:
    mount, store, glance, scrub = conf.mount, conf.store, conf.glance, conf.scrub
    return Config(
        mount=MountConfig(
            mountpoint=mount.mountpoint,
            allow_other=mount.allow_other,
            uid=os.geteuid() if mount.uid is None else mount.uid,
            gid=os.getegid() if mount.gid is None else mount.gid,
            file_mode=mount.file_mode,
            read_deadline=mount.read_deadline,
        ),
        store=StoreConfig(
            path=store.path,
            max_size=store.max_size,
            min_free=store.min_free,
            high_watermark=store.high_watermark,
            low_watermark=store.low_watermark,
            pin_share=store.pin_share,
            verify_first_read=store.verify_first_read,
            span_size=store.span_size,
            commit_interval=store.commit_interval,
        ),
        glance=GlanceConfig(
            auth=auth.resolve(
                conf,
                connections=glance.connections,
                connect_timeout=glance.connect_timeout,
                read_timeout=glance.read_timeout,
            ),
            connections=glance.connections,
            connect_timeout=glance.connect_timeout,
            read_timeout=glance.read_timeout,
            retries=glance.retries,
            listing_ttl=glance.listing_ttl,
            negative_ttl=glance.negative_ttl,
        ),
        hydration=HydrationConfig(conf.hydration.mode, conf.hydration.bandwidth, conf.hydration.concurrency),
        trace=TraceConfig(conf.trace.seconds),
        leases=LeasesConfig(
            tuple(dict.fromkeys(conf.leases.folders)),
            conf.leases.interval,
            conf.leases.grace,
            conf.leases.touch_grace,
        ),
        scrub=ScrubConfig(scrub.interval, scrub.bandwidth, scrub.hours),
        precache=PrecacheConfig(
            policies=tuple(dict.fromkeys(conf.precache.policies)),
            interval=conf.precache.interval,
            share=conf.precache.share,
            options=_policy_options(conf.precache),
        ),
        priorities=Rules(
            critical=tuple(conf.priorities.critical),
            normal=tuple(conf.priorities.normal),
            low=tuple(conf.priorities.low),
            trust=tuple(conf.priorities.trust_properties),
        ),
        convert=ConvertConfig(conf.convert.user),
        control=ControlConfig(socket=conf.control.socket),
        metrics=MetricsConfig(conf.metrics.listen or None),
        log=LogConfig(debug=conf.debug, conf=conf),
    )
