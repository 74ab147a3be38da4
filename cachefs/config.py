"""Files → one frozen `Config`, or what stops a start. Rule: nothing contradictory is let through, and nothing is
read twice.

Files are read once, at the start. An option or a section that nobody registered, a value out of range and a
contradiction each are a `ConfigError`: `load` raises the first, `check` gives all of them. Fields are named
as their options are; times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from oslo_config import cfg

from cachefs import asking, log_lines, options
from cachefs.config_files import Reading, lines_of, paths_of
from cachefs.errors import ConfigError
from cachefs.option_types import Address, Amount, Hours
from cachefs.plan.priorities import Rules
from cachefs.sources import auth

NO_FILE: Final = (
    "there is no such file: write one (`cachefs config sample` shows how), or name yours with --config-file"
)

NOVA_ACCOUNT: Final = "nova"  # As the distributions name it.
SOCKET_PATH_MAX: Final = 107  # sun_path of unix(7), less its final zero.


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
class NovaConfig:
    enabled: bool
    uid: int
    gid: int
    view: str


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
        log_lines.start(self.conf)


@dataclass(frozen=True, slots=True)
class Config:
    mount: MountConfig
    nova: NovaConfig
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


def _read(
    files: Sequence[str], config_dirs: Sequence[str], overrides: Mapping[str, str]
) -> tuple[Config | None, list[ConfigError]]:
    faults: list[ConfigError] = []
    paths = list(paths_of(files, config_dirs, faults))
    lines = [line for path in paths for line in lines_of(path, faults)]
    if faults:  # What else is wrong depends on what could not be read.
        return None, faults
    reading = Reading(paths, lines, overrides)
    reading.refuse([*_contradictions(reading.conf), *auth.validate(reading.conf)])
    if not paths and reading.faults:  # What is missing is one fault: nobody has said anything yet.
        said = [
            fault for fault in reading.faults if fault.reason.startswith(("environment: ", "given at the start: "))
        ]
        reading.faults[:] = [ConfigError(asking.DEFAULT_FILE, NO_FILE), *said]
    return None if reading.faults else _config(reading.conf), reading.faults


def store_path(files: Sequence[str], config_dirs: Sequence[str]) -> str:
    """Where the store lies, for who needs nothing else of the configuration: Glance's options are not looked at.
    Raises ConfigError where anything else is not understood: half of a word may have been `[store] path`."""
    faults: list[ConfigError] = []
    paths = list(paths_of(files, config_dirs, faults))
    lines = [line for path in paths for line in lines_of(path, faults)]
    if not faults:
        reading = Reading(paths, lines, {})
        faults = [fault for fault in reading.faults if not fault.option.startswith(f"{auth.GROUP}/")]
        path = str(reading.conf.store.path)
        if not faults and (paths or path != options.STORE):
            return path
    raise faults[0] if faults else ConfigError(asking.DEFAULT_FILE, f"{NO_FILE}, or the store with --store")


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
        if folder != options.INSTANCES and PurePath(folder).is_relative_to(mountpoint):
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


def _nova(conf: cfg.ConfigOpts, mount: MountConfig) -> NovaConfig:
    try:
        account = pwd.getpwnam(NOVA_ACCOUNT)
        uid, gid = account.pw_uid, account.pw_gid
    except KeyError:
        uid, gid = mount.uid, mount.gid
    nova = conf.nova
    uid, gid = uid if nova.uid is None else nova.uid, gid if nova.gid is None else nova.gid
    return NovaConfig(nova.enabled, uid, gid, nova.view)


def _mount(mount: cfg.ConfigOpts.GroupAttr) -> MountConfig:
    return MountConfig(
        mountpoint=mount.mountpoint,
        allow_other=mount.allow_other,
        uid=os.geteuid() if mount.uid is None else mount.uid,
        gid=os.getegid() if mount.gid is None else mount.gid,
        file_mode=mount.file_mode,
        read_deadline=mount.read_deadline,
    )


def _config(conf: cfg.ConfigOpts) -> Config:
    mount, store, glance, scrub = _mount(conf.mount), conf.store, conf.glance, conf.scrub
    return Config(
        mount=mount,
        nova=_nova(conf, mount),
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
