"""oslo.config options → one frozen `Config`. Rule: nothing unknown is let through, and nothing is read twice.

Files are read once, at the start. An option or a section that nobody registered, a value out of range and a
contradiction each are a `ConfigError`: `load` raises the first, `check` gives all of them. Fields are named
as their options are; times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import difflib
import io
import os
import pwd
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path, PurePath

from oslo_config import cfg, generator, iniparser
from oslo_log import log

from cachefs import __version__
from cachefs.errors import ConfigError
from cachefs.option_types import (
    Amount,
    AmountType,
    FileModeType,
    Hours,
    HoursType,
    PathType,
    RateType,
    SecondsType,
    ShareType,
    SpanSizeType,
)
from cachefs.sources import auth

DEFAULT_FILE = "/etc/cachefs/cachefs.conf"

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
class ScrubConfig:
    interval: float  # 0: only when it is asked for.
    bandwidth: int  # Bytes per second; 0 for no bound.
    hours: Hours | None  # None: at any hour.


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    user: str


@dataclass(frozen=True, slots=True)
class ControlConfig:
    socket: str


@dataclass(frozen=True, slots=True)
class LogConfig:
    """oslo.log keeps its own options: it looks at them again whenever it is set up."""

    debug: bool
    conf: cfg.ConfigOpts = field(repr=False, compare=False)

    def start(self) -> None:
        """From here on the root logger does what `[DEFAULT]` says."""
        try:
            log.setup(self.conf, "cachefs", __version__, fix_eventlet=False)
        except log.LogConfigError as e:
            raise ConfigError("DEFAULT/log_config_append", f"{e.log_config}: {e.err_msg}") from e
        except OSError as e:
            raise ConfigError("DEFAULT/log_file", f"{e.filename}: {e.strerror}") from e


@dataclass(frozen=True, slots=True)
class Config:
    mount: MountConfig
    store: StoreConfig
    glance: GlanceConfig
    hydration: HydrationConfig
    scrub: ScrubConfig
    convert: ConvertConfig
    control: ControlConfig
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
            help="How long a connection may be without a byte. Whole answers may take longer.",
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
            default="/run/cachefs/control.sock",
            help="Unix socket on which the daemon answers the cachefs command.",
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
    "scrub": "When and how fast everything that is cached is compared with its digests.",
    "convert": "How the disks of vmdk, vhd, vhdx, vdi and ploop images are read: by qemu-nbd in a sandbox, where "
    "qemu-utils is installed.",
    "control": "How the cachefs command reaches the daemon.",
}


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For oslo.config's generator: every section but `[DEFAULT]`, which is oslo.log's."""
    shown = {**_OPTIONS, "glance": auth.sample_options() + _OPTIONS["glance"]}
    return [(cfg.OptGroup(section, help=_SECTION_HELP[section]), opts) for section, opts in shown.items()]


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
    return f"# {DEFAULT_FILE}: the configuration of cachefs {__version__}\n\n{text.getvalue()}"


def _read(
    files: Sequence[str], config_dirs: Sequence[str], overrides: Mapping[str, str]
) -> tuple[Config | None, list[ConfigError]]:
    faults: list[ConfigError] = []
    paths = list(_paths(files, config_dirs, faults))
    lines = [line for path in paths for line in _lines(path, faults)]
    if faults:  # What else is wrong depends on what could not be read.
        return None, faults
    reading = _Reading(paths, lines, overrides)
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
    if PurePath(socket).is_relative_to(mountpoint):
        yield ConfigError("control/socket", f"{socket} would lie under the mount itself, {mountpoint}")
    if len(os.fsencode(socket)) > SOCKET_PATH_MAX:
        yield ConfigError("control/socket", f"is longer than the {SOCKET_PATH_MAX} bytes that a socket can have")


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
        scrub=ScrubConfig(scrub.interval, scrub.bandwidth, scrub.hours),
        convert=ConvertConfig(conf.convert.user),
        control=ControlConfig(socket=conf.control.socket),
        log=LogConfig(debug=conf.debug, conf=conf),
    )
