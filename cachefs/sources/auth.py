"""How this node proves itself to Keystone, and over which wire. Rule: nothing here asks for an image.

keystoneauth's options are registered from its own loaders, so that `[glance]` reads as in every other
OpenStack service. Those that this version would not act on are left out, and `explain` says what to write
instead: an option that is accepted and ignored is worse than one that is refused.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from keystoneauth1 import exceptions, loading
from keystoneauth1.session import Session, TCPKeepAliveAdapter
from oslo_config import cfg

from cachefs import __version__
from cachefs.errors import ConfigError
from cachefs.sources import request_ids

if TYPE_CHECKING:
    import requests
    from keystoneauth1.plugin import BaseAuthPlugin
    from openstack.config.cloud_region import CloudRegion

GROUP = "glance"

INTERFACES = ("public", "internal", "admin")
DEFAULT_INTERFACES = ("internal", "public")  # As Nova's own [glance]: a hypervisor sits on the inner network.

# For metadata, beside the data: a pool that is too small closes good connections, and warns each time.
SPARE_CONNECTIONS = 4

# What the sample shows. keystoneauth's other plugins work as well.
SAMPLE_PLUGINS = ("password", "v3applicationcredential")

# Options of keystoneauth that would not do here what they say, and what does.
REPLACED = {
    "auth_section": "the options themselves, in [glance]",
    "timeout": "connect_timeout and read_timeout",  # One number cannot tell a dead host from a slow one.
    "connect_retries": "retries",
    "connect_retry_delay": "retries",
    "status_code_retries": "retries",
    "status_code_retry_delay": "retries",
    "retriable_status_codes": "retries",
}
# Images are read by v2 of the API only; and a record of the time of every call is a leak in a daemon.
MEANINGLESS = ("version", "min_version", "max_version", "collect_timing")


@dataclass(frozen=True, slots=True)
class AuthOptions:
    """What `[glance]` and clouds.yaml say about reaching Glance. Times are in seconds."""

    method: str  # The auth_type, or "cloud NAME": what a log may show.
    endpoints: tuple[str, ...]  # Without /v2, tried in turn. Empty: ask the catalog with `endpoint_filter`.
    interface: tuple[str, ...]  # In order of preference.
    region_name: str | None
    service_type: str
    service_name: str | None
    verify: bool | str
    cert: str | tuple[str, str] | None
    connections: int
    connect_timeout: float
    read_timeout: float
    split_loggers: bool
    tls: Mapping[str, str] = field(hash=False)
    plugin: BaseAuthPlugin = field(repr=False, compare=False)  # Knows the secrets, and the token.

    @property
    def endpoint_filter(self) -> dict[str, Any]:
        """How to find Glance in the catalog, in keystoneauth's words."""
        return {
            "service_type": self.service_type,
            "service_name": self.service_name,
            "region_name": self.region_name,
            "interface": list(self.interface),
        }

    def session(self) -> Session:
        """A new session with its own pool of connections; all share one token. Asks the network nothing."""
        session = _Session(
            auth=self.plugin,
            verify=self.verify,
            cert=self.cert,
            split_loggers=self.split_loggers,
            app_name="cachefs",
            app_version=__version__,
        )
        pool = self.connections + SPARE_CONNECTIONS
        wire = _Wire((self.connect_timeout, self.read_timeout), pool_maxsize=pool, **self.tls)
        for scheme in list(session.adapters):
            session.mount(scheme, wire)
        return session


class _Session(Session):
    """One that asks Keystone for nothing while Glance is asked: a token that Glance refused is renewed apart from
    the request that it was for, so that it is clear whose a failure is.

    And one that gets no token in order to get a token: where something before Keystone answers 401 to the question
    which versions there are, keystoneauth would ask for one, and wait for its own lock for ever, and all threads
    with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._of_thread = threading.local()

    def get_auth_headers(self, auth: BaseAuthPlugin | None = None, **options: Any) -> dict[str, str] | None:
        if getattr(self._of_thread, "gets_token", False):
            raise exceptions.AuthorizationFailure("Keystone wants a token before it gives one")
        self._of_thread.gets_token = True
        try:
            headers: dict[str, str] | None = super().get_auth_headers(auth, **options)
            return headers
        finally:
            self._of_thread.gets_token = False

    def get_token(self, auth: BaseAuthPlugin | None = None) -> str | None:
        return (self.get_auth_headers(auth) or {}).get("X-Auth-Token")

    def request(self, url: str, method: str, **options: Any) -> requests.Response:  # type: ignore[override]
        options.setdefault("allow_reauth", False)
        answer: requests.Response = super().request(url, method, **options)
        return answer


class _Wire(TCPKeepAliveAdapter):
    """keystoneauth's adapter, with a time-out and an id on every request, those to Keystone included.

    `Session(timeout=...)` takes a single number, and requests would use it for connecting and for reading.
    """

    def __init__(self, timeout: tuple[float, float], **options: Any) -> None:
        super().__init__(**options)
        self._timeout = timeout

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        if timeout is None:  # A caller who names one means it.
            timeout = self._timeout
        exchange = request_ids.current()
        if exchange is not None:
            exchange.sends(request.headers)
        answer = super().send(request, stream, timeout, verify, cert, proxies)
        if exchange is not None:
            exchange.receives(answer.headers)
        return answer


# ── Options ───────────────────────────────────────────────────────────────────────────────────────────


def options() -> list[cfg.Opt]:
    """Those of `[glance]` that are there whatever the plugin."""
    own: list[cfg.Opt] = [
        cfg.StrOpt(
            "cloud",
            help="Name of a cloud in clouds.yaml that carries the credentials, in place of auth_type and all "
            "that belongs to it. OS_CLIENT_CONFIG_FILE names that file; otherwise it is looked for in ., "
            "~/.config/openstack and /etc/openstack.",
        ),
        cfg.ListOpt(
            "endpoints",
            default=[],
            help="Base URLs of Glance, without /v2: where one fails, the next one is asked. Empty: the image "
            "endpoint of Keystone's catalog.",
        ),
    ]
    theirs = [
        *loading.get_auth_common_conf_options(),
        *loading.get_session_conf_options(),
        *loading.get_adapter_conf_options(),
    ]
    for opt in theirs:
        if opt.dest == "service_type":
            opt.default = "image"
        elif opt.dest == "valid_interfaces":
            opt.default = list(DEFAULT_INTERFACES)
        elif opt.dest == "insecure":
            opt.help = "Do not verify the certificates of HTTPS."  # Their text says the contrary.
    return own + [opt for opt in theirs if opt.dest not in REPLACED and opt.dest not in MEANINGLESS]


def sample_options() -> list[cfg.Opt]:
    """`options`, and those of the plugins that nearly everyone uses."""
    shown = {opt.dest: opt for opt in options()}
    for opt in _sample_plugin_options():
        shown.setdefault(opt.dest, opt)
    return list(shown.values())


def register(conf: cfg.ConfigOpts) -> list[cfg.Opt]:
    """Registers `options` and gives them."""
    known = options()
    conf.register_opts(known, group=GROUP)
    return known


def register_plugin(conf: cfg.ConfigOpts) -> list[cfg.Opt]:
    """Registers the options of the chosen plugin and gives them.

    With no plugin, or one that does not exist, it gives those of the sample's: that one mistake is what is
    to be named, not every line that would have been right without it.
    """
    if conf[GROUP].cloud:
        return []
    loader = _loader(conf)
    if loader is None:
        return list(_sample_plugin_options())
    known = loading.get_auth_plugin_conf_options(loader)
    conf.register_opts(known, group=GROUP)
    return known


def explain(conf: cfg.ConfigOpts, name: str) -> str | None:
    """Why an option that other services have in this section is unknown here; None where it simply is."""
    if name in REPLACED:
        return f"is no option of cachefs: use {REPLACED[name]}"
    if name in MEANINGLESS:
        return "is no option of cachefs: it would change nothing"
    if any(opt.dest == name for opt in _sample_plugin_options()):
        c = conf[GROUP]
        return f"contradicts cloud = {c.cloud}" if c.cloud else f"is no option of auth_type = {c.auth_type}"
    return None


def _sample_plugin_options() -> Iterator[cfg.Opt]:
    for plugin in SAMPLE_PLUGINS:
        yield from loading.get_auth_plugin_conf_options(plugin)


def _loader(conf: cfg.ConfigOpts) -> loading.BaseLoader[Any] | None:
    try:
        return loading.get_plugin_loader(conf[GROUP].auth_type) if conf[GROUP].auth_type else None
    except exceptions.NoMatchingPlugin:
        return None


# ── Contradictions ────────────────────────────────────────────────────────────────────────────────────


def validate(conf: cfg.ConfigOpts) -> list[ConfigError]:
    """All that stands in the way of `resolve`, as far as it can be known without asking the network."""
    faults = [*_endpoint_faults(conf), *_tls_faults(conf), *_interface_faults(conf)]
    c = conf[GROUP]
    if c.cloud and c.auth_type:
        faults.append(
            _fault("cloud", f"contradicts auth_type = {c.auth_type}: one of them carries the credentials")
        )
    elif c.cloud:
        faults += _cloud_faults(conf)
    elif c.auth_type:
        faults += _plugin_faults(conf)
    else:
        faults.append(_fault("auth_type", "is missing: set it (or cloud; auth_type = none needs endpoints)"))
    return faults


def _fault(name: str, reason: str) -> ConfigError:
    return ConfigError(f"{GROUP}/{name}", reason)


def _endpoint_faults(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    c = conf[GROUP]
    named = [("endpoints", url) for url in c.endpoints]
    for name in ("endpoint_override", "endpoint"):  # The last one is the none plugin's own.
        if url := getattr(c, name, None):
            if named:
                yield _fault(name, f"contradicts {named[0][0]}: it means a list of one")
            named.append((name, url))
    for name, text in named:
        try:
            parts = urlsplit(text)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            yield _fault(name, f"{text!r} is no http(s) URL")
        elif parts.username or parts.password:
            yield _fault(name, "a URL cannot carry credentials here: it is shown in logs")
        elif parts.query or parts.fragment:
            yield _fault(name, f"{text!r} has a query: the base of Glance's URLs is wanted")


def _tls_faults(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    c = conf[GROUP]
    if c.insecure and c.cafile:
        yield _fault("cafile", "contradicts insecure = true, which would ignore it")
    if c.keyfile and not c.certfile:
        yield _fault("keyfile", "needs certfile")
    for name in ("cafile", "certfile", "keyfile"):
        if c[name] and not os.access(c[name], os.R_OK):
            yield _fault(name, f"{c[name]} cannot be read")


def _interface_faults(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    c = conf[GROUP]
    if c.interface and _is_set(conf, "valid_interfaces"):
        yield _fault("interface", "contradicts valid_interfaces, which takes its place")
    for name in ("valid_interfaces", "interface"):
        for one in [c[name]] if isinstance(c[name], str) else c[name] or []:
            if one.removesuffix("URL") not in INTERFACES:
                yield _fault(name, f"{one!r} is none of {', '.join(INTERFACES)}")


def _plugin_faults(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    c = conf[GROUP]
    loader = _loader(conf)
    if loader is None:
        near = difflib.get_close_matches(c.auth_type, loading.get_available_plugin_names(), n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        yield _fault("auth_type", f"keystoneauth has no plugin {c.auth_type!r}{hint}")
        return
    if not loader.available:
        yield _fault("auth_type", f"the plugin {c.auth_type} needs packages that are not installed")
        return
    missing = list(_missing(conf, loader))
    for name in missing:
        yield _fault(name, f"is missing: auth_type = {c.auth_type} needs it")
    if missing:
        return
    try:
        _plugin(conf)
    except exceptions.OptionError as e:
        yield _fault("auth_type", f"{c.auth_type}: {e}")


def _missing(conf: cfg.ConfigOpts, loader: loading.BaseLoader[Any]) -> Iterator[str]:
    """Without these the plugin could only fail later: what it calls required, and what it should."""
    c = conf[GROUP]
    theirs = {opt.dest: opt for opt in loader.get_options()}
    yield from (name for name, opt in theirs.items() if opt.required and not c[name])
    if "password" in theirs and "username" in theirs:
        if not theirs["password"].required and not c.password:
            yield "password"
        if not theirs["username"].required and not (c.username or getattr(c, "user_id", None)):
            yield "username"
    if "auth_url" not in theirs and not _endpoints(conf, None):
        yield "endpoints"  # Without Keystone there is no catalog.


def _cloud_faults(conf: cfg.ConfigOpts) -> Iterator[ConfigError]:
    from openstack.exceptions import ConfigException

    c = conf[GROUP]
    try:
        region = _region(conf)
        if region.get_auth() is None:
            yield _fault("cloud", f"{c.cloud}: clouds.yaml gives it no credentials")
        elif region.config.get("auth_type") == "none" and not _endpoints(conf, region):
            yield _fault("endpoints", f"is missing: the cloud {c.cloud} has auth_type none, so no catalog")
    except (ConfigException, exceptions.OptionError, exceptions.NoMatchingPlugin) as e:
        yield _fault("cloud", f"{c.cloud}: {e}")
    except OSError as e:
        yield _fault("cloud", f"{c.cloud}: {e.filename} cannot be looked at: {e.strerror}")


def _is_set(conf: cfg.ConfigOpts, name: str) -> bool:
    """Whether someone said so, in contrast to the default."""
    at = conf.get_location(name, GROUP)
    return at is not None and at.location not in (cfg.Locations.opt_default, cfg.Locations.set_default)


# ── What is meant ─────────────────────────────────────────────────────────────────────────────────────


def resolve(conf: cfg.ConfigOpts, *, connections: int, connect_timeout: float, read_timeout: float) -> AuthOptions:
    """The frozen form of a conf in which `validate` found no fault."""
    c = conf[GROUP]
    region = _region(conf) if c.cloud else None
    verify, cert = _trust(conf, region)
    return AuthOptions(
        method=f"cloud {c.cloud}" if c.cloud else c.auth_type,
        endpoints=_endpoints(conf, region),
        interface=_interface(conf, region),
        region_name=region.get_region_name("image") if region else c.region_name,
        service_type=_named(conf, "service_type", region and region.get_service_type("image")),
        service_name=_named(conf, "service_name", region and region.get_service_name("image")),
        verify=verify,
        cert=cert,
        connections=connections,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        split_loggers=c.split_loggers,
        # Not in every keystoneauth that we accept.
        tls={name: text for name in ("tls_ciphers", "tls_min_version") if (text := getattr(c, name, None))},
        plugin=_cloud_plugin(region) if region else _plugin(conf),
    )


def _plugin(conf: cfg.ConfigOpts) -> BaseAuthPlugin:
    loader = _loader(conf)
    assert loader is not None
    plugin: BaseAuthPlugin = loader.load_from_options_getter(lambda opt: conf[GROUP][opt.dest])
    return plugin


def _cloud_plugin(region: CloudRegion) -> BaseAuthPlugin:
    plugin = region.get_auth()
    assert plugin is not None
    return plugin


def _region(conf: cfg.ConfigOpts) -> CloudRegion:
    # Here and not above: openstacksdk costs a third of a second, and only nodes with a clouds.yaml need it.
    from openstack.config import OpenStackConfig

    c = conf[GROUP]
    return OpenStackConfig(app_name="cachefs", app_version=__version__).get_one(
        cloud=c.cloud, region_name=c.region_name
    )


def _named(conf: cfg.ConfigOpts, name: str, of_cloud: Any) -> Any:
    """What `[glance]` says; where it is silent, what the cloud says; else the default."""
    return conf[GROUP][name] if _is_set(conf, name) or not of_cloud else of_cloud


def _interface(conf: cfg.ConfigOpts, region: CloudRegion | None) -> tuple[str, ...]:
    c = conf[GROUP]
    # openstacksdk fills in "public" where clouds.yaml is silent: the same as most of its users expect.
    said = c.interface or _named(conf, "valid_interfaces", region and region.get_interface("image"))
    return (said,) if isinstance(said, str) else tuple(said)


def _endpoints(conf: cfg.ConfigOpts, region: CloudRegion | None) -> tuple[str, ...]:
    c = conf[GROUP]
    one = c.endpoint_override or getattr(c, "endpoint", None)
    if region and not one:
        one = region.get_endpoint("image")
    return tuple(dict.fromkeys(_unversioned(url) for url in c.endpoints or ([one] if one else [])))


def _unversioned(url: str) -> str:
    return re.sub(r"(/v2(\.\d+)?)?/*$", "", url.rstrip("/"))


def _trust(conf: cfg.ConfigOpts, region: CloudRegion | None) -> tuple[bool | str, str | tuple[str, str] | None]:
    """Which server certificates are believed, and which of ours is shown."""
    c = conf[GROUP]
    verify, cert = region.get_requests_verify_args() if region else (True, None)
    if c.certfile:
        cert = (c.certfile, c.keyfile) if c.keyfile else c.certfile
    if c.insecure or not verify:
        return False, cert
    return c.cafile or verify, cert
