"""What `cachefs.conf` may say, what stops a start, and that it is named. Nothing here leaves this machine."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import requests
from keystoneauth1 import exceptions, loading
from keystoneauth1.identity import V3ApplicationCredential, generic
from keystoneauth1.noauth import NoAuth

from cachefs import asking, config
from cachefs.config import Config
from cachefs.config_sample import sample
from cachefs.errors import ConfigError
from cachefs.option_types import Address, Amount
from cachefs.sources.auth import SPARE_CONNECTIONS

SECRET = "correct-horse-battery"

NONE = "[glance]\nauth_type = none\nendpoints = http://127.0.0.1:9292\n"

PASSWORD = f"""\
[glance]
auth_type = password
auth_url = http://127.0.0.1:5000/v3
username = cachefs
password = {SECRET}
project_name = service
user_domain_name = Default
project_domain_name = Default
"""

APPLICATION_CREDENTIAL = f"""\
[glance]
auth_type = v3applicationcredential
auth_url = http://127.0.0.1:5000/v3
application_credential_id = 41
application_credential_secret = {SECRET}
"""

CLOUDS = f"""\
clouds:
  here:
    auth:
      auth_url: http://127.0.0.1:5000/v3
      username: cachefs
      password: {SECRET}
      project_name: service
      user_domain_name: Default
      project_domain_name: Default
    region_name: north
    interface: internal
    cacert: /etc/ssl/here.pem
  there:
    regions: [north, south]
    auth:
      auth_url: http://127.0.0.1:5000/v3
      application_credential_id: '41'
      application_credential_secret: {SECRET}
    auth_type: v3applicationcredential
  alone:
    auth_type: none
    image_endpoint_override: http://127.0.0.1:9292/v2/
  nowhere:
    auth_type: none
  bare:
    auth: {{auth_url: 'http://127.0.0.1:5000/v3'}}
    auth_type: v3applicationcredential
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("OS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(asking, "DEFAULT_FILE", str(tmp_path / "absent.conf"))
    (tmp_path / "clouds.yaml").write_text(CLOUDS)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachefs.conf"


def load(file: Path, text: str, overrides: Mapping[str, str] | None = None) -> Config:
    file.write_text(text)
    return config.load([str(file)], [], overrides or {})


def faults(file: Path, text: str) -> list[str]:
    file.write_text(text)
    return [str(fault).replace(str(file), "FILE") for fault in config.check([str(file)])]


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_those_of_the_documentation(file: Path) -> None:
    c = load(file, NONE)
    assert c.mount == config.MountConfig("/mnt/cachefs", True, os.geteuid(), os.getegid(), 0o444, 60.0)
    assert c.store == config.StoreConfig(
        "/var/lib/cachefs", Amount(80, True), Amount(5, True), 0.95, 0.85, 0.5, True, None, 1.0
    )
    assert c.scrub == config.ScrubConfig(604800.0, 100 << 20, None)
    assert c.leases == config.LeasesConfig(("/var/lib/nova/instances",), 300.0, 86400.0, 86400.0)
    assert c.control == config.ControlConfig("/run/cachefs/control.sock")
    assert c.metrics == config.MetricsConfig(Address("127.0.0.1", 19292))
    g = c.glance
    assert (g.connections, g.connect_timeout, g.read_timeout, g.retries) == (8, 5.0, 20.0, 4)
    assert (g.listing_ttl, g.negative_ttl) == (60.0, 10.0)
    assert g.auth.interface == ("internal", "public")
    assert g.auth.service_type == "image"


def test_folders_with_disks(file: Path) -> None:
    assert load(file, f"{NONE}[leases]\nfolders =\n").leases.folders == ()
    found = load(file, f"{NONE}[leases]\nfolders = /a//b/, /c/../d,/a/b\ngrace = 60\ntouch_grace = 0\n").leases
    assert found == config.LeasesConfig(("/a/b", "/d"), 300.0, 60.0, 0.0)
    for bad in ("folders = relative", "grace = 59", "interval = 0", "touch_grace = -1"):
        with pytest.raises(ConfigError):
            load(file, f"{NONE}[leases]\n{bad}\n")


def test_where_metrics_are_listened_for(file: Path) -> None:
    for text, address in (
        ("0.0.0.0:9", Address("0.0.0.0", 9)),
        ("[::1]:19292", Address("::1", 19292)),
        ("[fe80:0::1]:0", Address("fe80::1", 0)),
        ("", None),
        ("  ", None),
    ):
        assert load(file, f"{NONE}[metrics]\nlisten = {text}\n").metrics.listen == address
    assert str(Address("::1", 7)) == "[::1]:7"


def test_shares_rates_and_hours(file: Path) -> None:
    c = load(
        file,
        f"{NONE}[store]\nhigh_watermark = 50 %\nlow_watermark = 2.5%\n[scrub]\nbandwidth = 1.5G\nhours = 22 - 6\n",
    )
    assert (c.store.high_watermark, c.store.low_watermark) == (0.5, 0.025)
    assert c.scrub.bandwidth == 3 << 29
    assert c.scrub.hours is not None
    assert [hour for hour in range(24) if c.scrub.hours.include(hour)] == [0, 1, 2, 3, 4, 5, 22, 23]
    same_day = load(file, f"{NONE}[scrub]\nhours = 0-24\nhours = 9-17\n").scrub.hours
    assert same_day is not None
    assert [hour for hour in range(24) if same_day.include(hour)] == list(range(9, 17))


@pytest.mark.parametrize(
    ("section", "line", "fault"),
    [
        ("store", "high_watermark = 95", "is no share"),
        ("store", "high_watermark = 0%", "is no share"),
        ("store", "pin_share = 101%", "is no share"),
        ("store", "low_watermark = 96%", "not below high_watermark"),
        ("scrub", "bandwidth = 5%", "is no rate"),
        ("scrub", "bandwidth = fast", "is no size"),
        ("scrub", "hours = 25-6", "are no hours"),
        ("scrub", "hours = 6-6", "are no hours"),
        ("scrub", "hours = 6", "are no hours"),
        ("convert", "user = nobody-at-all", "there is no user"),
    ],
)
def test_wrong_shares_rates_and_hours(file: Path, section: str, line: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load(file, f"{NONE}[{section}]\n{line}\n" if section != "glance" else NONE)


@pytest.mark.parametrize(
    ("text", "of_a_terabyte"),
    [
        ("1048576", 1 << 20),
        ("200G", 200 << 30),
        ("200g", 200 << 30),
        ("200GiB", 200 << 30),
        ("1.5 T", 3 << 39),
        ("0.5K", 512),
        ("60%", 6 * 10**11),
        ("5 %", 5 * 10**10),
        ("2.5%", 25 * 10**9),
        ("100%", 10**12),
    ],
)
def test_sizes(file: Path, text: str, of_a_terabyte: int) -> None:
    assert load(file, f"{NONE}[store]\nmax_size = {text}\n").store.max_size.of(10**12) == of_a_terabyte


def test_novas_folder_belongs_to_nova_where_there_is_such_an_account(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = {"nobody": pwd.getpwnam("nobody")}

    def getpwnam(name: str) -> pwd.struct_passwd:
        return accounts[name]

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)
    assert load(file, f"{NONE}[mount]\nuid = 7\ngid = 8\n").nova == config.NovaConfig(True, 7, 8, "raw")
    accounts["nova"] = pwd.struct_passwd(("nova", "x", 64060, 64061, "", "/var/lib/nova", "/bin/false"))
    assert load(file, f"{NONE}[mount]\nuid = 7\ngid = 8\n").nova == config.NovaConfig(True, 64060, 64061, "raw")
    assert load(file, f"{NONE}[nova]\nuid = 9\n").nova == config.NovaConfig(True, 9, 64061, "raw")


@pytest.mark.parametrize(
    ("section", "line", "field", "value"),
    [
        ("mount", "mountpoint = /srv//images/", "mountpoint", "/srv/images"),
        ("mount", "allow_other = no", "allow_other", False),
        ("mount", "uid = 64055", "uid", 64055),
        ("mount", "gid = 0", "gid", 0),
        ("mount", "file_mode = 0440", "file_mode", 0o440),
        ("mount", "file_mode = 400", "file_mode", 0o400),
        ("mount", "read_deadline = 2.5", "read_deadline", 2.5),
        ("nova", "enabled = no", "enabled", False),
        ("nova", "uid = 42436", "uid", 42436),
        ("nova", "gid = 42436", "gid", 42436),
        ("nova", "view = images", "view", "images"),
        ("store", "span_size = 4M", "span_size", 4 << 20),
        ("store", "span_size = 1048576", "span_size", 1 << 20),
        ("store", "span_size = 64 MiB", "span_size", 64 << 20),
        ("store", "min_free = 0", "min_free", Amount(0)),
        ("store", "commit_interval = 0.1", "commit_interval", 0.1),
        ("glance", "connections = 64", "connections", 64),
        ("glance", "retries = 0", "retries", 0),
        ("glance", "listing_ttl = 0", "listing_ttl", 0.0),
    ],
)
def test_values(file: Path, section: str, line: str, field: str, value: object) -> None:
    c = load(file, f"{NONE}[{section}]\n{line}\n")
    assert getattr(getattr(c, section), field) == value


@pytest.mark.parametrize(
    ("section", "line", "reason"),
    [
        ("mount", "mountpoint = images", "'images' is no absolute path"),
        ("mount", "allow_other = perhaps", "Unexpected boolean value 'perhaps'"),
        ("mount", "uid = root", "'root' is no whole number"),
        ("mount", "uid = -1", "greater than or equal to 0"),
        ("nova", "uid = nova", "'nova' is no whole number"),
        ("nova", "view = qcow2", "'qcow2'"),
        ("mount", "file_mode = 0644", "'0644' has write bits: images are read-only"),
        ("mount", "file_mode = 0222", "has write bits"),
        ("mount", "file_mode = 4755", "is no octal mode"),
        ("mount", "file_mode = rrr", "is no octal mode"),
        ("mount", "read_deadline = 0", "greater than or equal to 0.1"),
        ("mount", "read_deadline = nan", "is no time"),
        ("mount", "read_deadline = inf", "less than or equal to 3600"),
        ("mount", "read_deadline =", "is no time"),
        ("store", "path = cache", "is no absolute path"),
        ("store", "max_size = 0", "leaves no room at all"),
        ("store", "max_size = 0%", "leaves no room at all"),
        ("store", "max_size = -5G", "is no size"),
        ("store", "max_size = 101%", "more than the filesystem"),
        ("store", "max_size = 200GB", "is no size: write bytes, 200G for GiB"),
        ("store", "max_size = much", "is no size"),
        ("store", "max_size =", "is no size"),
        ("store", "min_free = 100%", "all of the filesystem"),
        ("store", "span_size = 3M", "no power of two between 1M and 64M"),
        ("store", "span_size = 512K", "no power of two between 1M and 64M"),
        ("store", "span_size = 128M", "no power of two between 1M and 64M"),
        ("store", "span_size = 4%", "no power of two"),
        ("store", "commit_interval = 0", "greater than or equal to"),
        ("glance", "connections = 0", "greater than or equal to 1"),
        ("glance", "connections = 65", "less than or equal to 64"),
        ("glance", "connections =", "has no value"),
        ("glance", "connect_timeout = soon", "'soon' is no number"),
        ("glance", "retries = 21", "less than or equal to 20"),
        ("glance", "negative_ttl = -1", "greater than or equal to 0"),
        ("glance", "region_name = $nowhere", "a literal one is written $$"),
        ("control", "socket = control.sock", "is no absolute path"),
        ("metrics", "listen = 19292", "is no address to listen at: write 127.0.0.1:19292"),
        ("metrics", "listen = localhost:19292", "is no address to listen at"),
        ("metrics", "listen = 127.0.0.1", "is no address to listen at"),
        ("metrics", "listen = ::1:19292", "is no address to listen at"),
        ("metrics", "listen = [127.0.0.1]:19292", "is no address to listen at"),
        ("metrics", "listen = 127.0.0.1:65536", "is no address to listen at"),
        ("metrics", "listen = 127.0.0.1:١٩", "is no address to listen at"),
        ("DEFAULT", "debug = perhaps", "Unexpected boolean value"),
    ],
)
def test_a_bad_value_is_named_with_its_place(file: Path, section: str, line: str, reason: str) -> None:
    (fault,) = faults(file, f"{NONE}[{section}]\n{line}\n")
    assert fault.startswith(f"{section}/{line.split()[0]}: FILE:5: ")
    assert reason in fault
    with pytest.raises(ConfigError, match=line.split()[0]):
        config.load([str(file)], [], {})


# ── The unknown ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "[mount]\nmount_point = /x\n",
            "mount/mount_point: FILE:5: unknown option: did you mean mountpoint?",
        ),
        ("[mount]\nzzz = 1\n", "mount/zzz: FILE:5: unknown option"),
        ("[mount]\nmax_size = 5G\n", "mount/max_size: FILE:5: unknown option: it belongs into [store]"),
        ("[stroe]\npath = /x\n", "[stroe]: FILE:4: unknown section: did you mean store?"),
        ("[precaching]\n", "[precaching]: FILE:4: unknown section: did you mean precache?"),
        ("[DEFAULT]\ndebgu = true\n", "DEFAULT/debgu: FILE:5: unknown option: did you mean debug?"),
        ("[DEFAULT]\nconfig_source = remote\n", "DEFAULT/config_source: FILE:5: unknown option"),
        ("[glance]\nauth-url = x\n", "glance/auth-url: FILE:5: unknown option"),
        (
            "[glance]\ntimeout = 5\n",
            "glance/timeout: FILE:5: is no option of cachefs: use connect_timeout and read_timeout",
        ),
        ("[glance]\nversion = 2\n", "glance/version: FILE:5: is no option of cachefs: it would change nothing"),
        ("[glance]\nusername = x\n", "glance/username: FILE:5: is no option of auth_type = none"),
    ],
)
def test_the_unknown_is_named(file: Path, text: str, fault: str) -> None:
    assert faults(file, NONE + text) == [fault]


def test_all_faults_are_found_at_once_and_each_once(file: Path) -> None:
    text = "[glance]\nauth_type = password\npassword = a$b\nretires = 3\n[store]\nmin_free = 100%\n[x]\n"
    assert [fault.split(":")[0] for fault in faults(file, text)] == [
        "store/min_free",
        "glance/password",
        "glance/retires",
        "[x]",
        "glance/auth_url",
        "glance/username",
    ]


def test_names_of_old_are_known(file: Path) -> None:
    c = load(file, PASSWORD.replace("project_name", "tenant_name").replace("auth_type", "auth_plugin"))
    assert c.glance.auth.method == "password"


def test_an_override_wins_and_may_choose_the_plugin(file: Path) -> None:
    overrides = {"mount/mountpoint": "/elsewhere", "DEFAULT/debug": "true", "glance/auth_type": "none"}
    c = load(file, "[mount]\nmountpoint = /x\n[glance]\nendpoints = http://127.0.0.1:1\n", overrides)
    assert (c.mount.mountpoint, c.log.debug, c.glance.auth.method) == ("/elsewhere", True, "none")


@pytest.mark.parametrize(
    ("option", "text", "fault"),
    [
        ("mount/mountpont", "/x", "mount/mountpont: given at the start: unknown option: did you mean mountpoint?"),
        ("store/max_size", "0", "store/max_size: given at the start: '0' leaves no room at all"),
    ],
)
def test_a_bad_override_is_named(file: Path, option: str, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        load(file, NONE, {option: text})


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"debug = true\n", "FILE: line 1: a section must come before the first option"),
        (f"[glance]\npassword {SECRET}\n".encode(), "FILE: line 2: No ':' or '=' found in assignment"),
        (b"[glance\n", "FILE: line 1: Invalid section (must end with ])"),
        (b"[glance]\n# \xff\n", "FILE: is not UTF-8 at byte 11"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named(file: Path, content: bytes, fault: str) -> None:
    file.write_bytes(content)
    assert [str(e).replace(str(file), "FILE") for e in config.check([str(file)])] == [fault]


def test_a_file_and_a_folder_that_are_not_there_are_named(tmp_path: Path) -> None:
    found = config.check([str(tmp_path / "a.conf"), str(tmp_path)], [str(tmp_path / "b")])
    assert sorted(str(fault).removeprefix(f"{tmp_path}/") for fault in found) == [
        f"{tmp_path}: cannot be read: Is a directory",
        "a.conf: cannot be read: No such file or directory",
        "b: cannot be read: No such file or directory",
    ]


def test_later_files_win_and_folders_come_last_in_order(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    (folder / "20-b.conf").write_text("[glance]\nretries = 2\n")
    (folder / "10-a.conf").write_text("[glance]\nretries = 1\nconnections = 3\n")
    (folder / "30-c.conf.bak").write_text("nonsense")
    file.write_text(NONE + "retries = 0\nconnections = 2\nlisting_ttl = 7\n")
    c = config.load([str(file)], [str(folder)], {})
    assert (c.glance.retries, c.glance.connections, c.glance.listing_ttl) == (2, 3, 7.0)


def test_the_default_file_is_read_if_it_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "DEFAULT_FILE", str(file))
    with pytest.raises(ConfigError, match="there is no such file: write one"):
        config.load([], [], {})
    assert [fault.option for fault in config.check([])] == [str(file)], "what else is missing follows from it"
    file.write_text(NONE)
    assert config.load([], [], {}).glance.auth.endpoints == ("http://127.0.0.1:9292",)


def test_the_place_of_a_value_of_several_lines_is_where_it_begins(file: Path) -> None:
    text = NONE.replace("http:", "http://127.0.0.1:1,\n    ftp:").replace("[glance]", "[glance]\nretries = x")
    assert faults(file, text)[0] == "glance/retries: FILE:2: 'x' is no whole number"
    assert "'ftp://127.0.0.1:9292' is no http(s) URL" in faults(file, text)[1]


# ── Contradictions ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "glance/auth_type: is missing"),
        ("[glance]\nauth_type = none\n", "glance/endpoints: is missing: auth_type = none needs it"),
        ("[glance]\nauth_type = passwort\n", "no plugin 'passwort': did you mean password?"),
        ("[glance]\ncloud = here\nauth_type = password\n", "glance/cloud: contradicts auth_type = password"),
        ("[glance]\ncloud = here\nauth_url = http://x\n", "glance/auth_url: FILE:3: contradicts cloud = here"),
        (PASSWORD.replace("auth_url", "# "), "glance/auth_url: is missing: auth_type = password needs it"),
        (PASSWORD.replace("password = correct", "# "), "glance/password: is missing"),
        (PASSWORD.replace("username", "# "), "glance/username: is missing"),
        (
            PASSWORD.replace("auth_type = password", "auth_type = v3password").replace("user_domain_name", "# "),
            "glance/auth_type: v3password: You have provided a username",
        ),
        (
            APPLICATION_CREDENTIAL.replace("application_credential_secret", "# "),
            "glance/application_credential_secret: is missing",
        ),
        (
            APPLICATION_CREDENTIAL.replace("application_credential_id", "# "),
            "must provide either an application credential ID",
        ),
        (NONE + "endpoint_override = http://127.0.0.1:1\n", "glance/endpoint_override: contradicts endpoints"),
        (NONE + "endpoint = http://127.0.0.1:1\n", "glance/endpoint: contradicts endpoints"),
        ("[glance]\nauth_type = none\nendpoint = here\n", "glance/endpoint: 'here' is no http(s) URL"),
        (NONE.replace("http:", "file:"), "glance/endpoints: 'file://127.0.0.1:9292' is no http(s) URL"),
        (NONE.replace("9292", "port"), "glance/endpoints: 'http://127.0.0.1:port' is no http(s) URL"),
        (NONE.replace("127", f"me:{SECRET}@127"), "glance/endpoints: a URL cannot carry credentials here"),
        (NONE.replace("9292", "9292/?a=b"), "has a query"),
        (NONE + "interface = private\n", "glance/interface: 'private' is none of public, internal, admin"),
        (NONE + "interface = public\nvalid_interfaces = admin\n", "glance/interface: contradicts"),
        (NONE + "cafile = /etc/hostname\ninsecure = true\n", "glance/cafile: contradicts insecure = true"),
        (NONE + "cafile = /no/such/file\n", "glance/cafile: /no/such/file cannot be read"),
        (NONE + "keyfile = /etc/hostname\n", "glance/keyfile: needs certfile"),
        (NONE + "[mount]\nmountpoint = /var\n", "store/path: /var/lib/cachefs would lie under the mount"),
        (NONE + "[mount]\nmountpoint = /var/lib/cachefs/x\n", "would lie inside the store"),
        (
            NONE + "[leases]\nfolders = /x, /mnt/cachefs/raw\n",
            "leases/folders: /mnt/cachefs/raw would lie under the",
        ),
        (NONE + "[mount]\nmountpoint = /run\n", "control/socket: /run/cachefs/control.sock would lie under"),
        (NONE + f"[control]\nsocket = /run/{'x' * 120}\n", "control/socket: is longer than the 107 bytes"),
    ],
)
def test_a_contradiction_is_named(file: Path, text: str, fault: str) -> None:
    (found,) = faults(file, text)
    assert fault in found
    assert SECRET not in found


@pytest.mark.parametrize("plugin", sorted(loading.get_available_plugin_names()))
def test_every_plugin_names_what_it_lacks_and_each_once(file: Path, plugin: str) -> None:
    options = [fault.split(":")[0] for fault in faults(file, f"[glance]\nauth_type = {plugin}\n")]
    assert options
    assert len(options) == len(set(options))


# ── Credentials ───────────────────────────────────────────────────────────────────────────────────────


def test_no_authentication_needs_no_catalog(file: Path) -> None:
    auth = load(
        file, NONE.replace("\n[", "[").replace("9292", "9292/v2/, http://127.0.0.1:9293/image/")
    ).glance.auth
    assert auth.endpoints == ("http://127.0.0.1:9292", "http://127.0.0.1:9293/image")
    assert isinstance(auth.session().auth, NoAuth)


def test_an_override_of_the_endpoint_is_a_list_of_one(file: Path) -> None:
    auth = load(file, NONE.replace("endpoints", "endpoint_override")).glance.auth
    assert auth.endpoints == ("http://127.0.0.1:9292",)


def test_a_password(file: Path) -> None:
    auth = load(file, PASSWORD + "region_name = north\nvalid_interfaces = admin, public\n").glance.auth
    assert auth.endpoints == ()
    assert auth.endpoint_filter == {
        "service_type": "image",
        "service_name": None,
        "region_name": "north",
        "interface": ["admin", "public"],
    }
    assert isinstance(auth.session().auth, generic.Password)


def test_an_application_credential(file: Path) -> None:
    assert isinstance(load(file, APPLICATION_CREDENTIAL).glance.auth.session().auth, V3ApplicationCredential)


@pytest.mark.parametrize("text", [PASSWORD, APPLICATION_CREDENTIAL, "[glance]\ncloud = here\n"])
def test_secrets_are_not_shown(file: Path, text: str) -> None:
    c = load(file, text)
    assert SECRET not in f"{c!r} {c} {c.glance.auth!r} {c.log!r}"


def test_the_configuration_is_frozen(file: Path) -> None:
    c = load(file, NONE)
    for part in (c, c.mount, c.store, c.glance, c.glance.auth, c.control, c.log):
        with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
            part.anything = 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "here",
            {
                "method": "cloud here",
                "endpoints": (),
                "region_name": "north",
                "interface": ("internal",),
                "verify": "/etc/ssl/here.pem",
            },
        ),
        ("here\nvalid_interfaces = admin", {"interface": ("admin",)}),
        ("here\ninsecure = true", {"verify": False}),
        ("here\ncafile = /etc/hostname", {"verify": "/etc/hostname"}),
        ("here\nendpoints = http://127.0.0.1:1", {"endpoints": ("http://127.0.0.1:1",)}),
        ("there\nregion_name = south", {"region_name": "south", "verify": True}),
        ("alone", {"endpoints": ("http://127.0.0.1:9292",)}),
    ],
)
def test_clouds_yaml(file: Path, text: str, expected: dict[str, Any]) -> None:
    auth = load(file, f"[glance]\ncloud = {text}\n").glance.auth
    assert {name: getattr(auth, name) for name in expected} == expected
    assert auth.session().auth is auth.plugin


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("everywhere", "glance/cloud: everywhere: Cloud everywhere was not found."),
        ("nowhere", "glance/endpoints: is missing: the cloud nowhere has auth_type none"),
        ("bare", "glance/cloud: bare: "),
        ("there\nregion_name = west", "glance/cloud: there: Region west is not a valid region"),
    ],
)
def test_a_cloud_that_cannot_be_used_is_named(file: Path, text: str, fault: str) -> None:
    (found,) = faults(file, f"[glance]\ncloud = {text}\n")
    assert found.startswith(fault)


# ── The session ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mute() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_server_is_given_up_after_the_read_timeout(file: Path, mute: str) -> None:
    auth = load(file, f"[glance]\nauth_type = none\nendpoints = {mute}\nread_timeout = 0.1\n").glance.auth
    with pytest.raises(exceptions.ConnectTimeout):
        auth.session().get(auth.endpoints[0])


def test_a_silent_keystone_is_given_up_as_well(file: Path, mute: str) -> None:
    auth = load(file, PASSWORD.replace("http://127.0.0.1:5000", mute) + "read_timeout = 0.1\n").glance.auth
    with pytest.raises((exceptions.ConnectTimeout, exceptions.DiscoveryFailure)):
        auth.session().get_token()


def test_the_pool_holds_all_connections_and_keeps_them_alive(file: Path) -> None:
    session = load(file, NONE + "connections = 23\ntls_min_version = 1.3\n").glance.auth.session()
    for scheme in ("http://", "https://"):
        adapter = session.adapters[scheme]
        assert isinstance(adapter, requests.adapters.HTTPAdapter)
        wire = adapter.poolmanager.connection_pool_kw
        assert wire["maxsize"] == 23 + SPARE_CONNECTIONS
        assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in wire["socket_options"]
        assert wire["ssl_context"].minimum_version.name == "TLSv1_3"


# ── The sample ────────────────────────────────────────────────────────────────────────────────────────


def test_the_sample_is_accepted_with_every_default_written_out(file: Path) -> None:
    shown = sample()
    written = re.sub(r"^#(\w+ =(?! <None>))", r"\1", shown, flags=re.MULTILINE)
    assert written.count("\nretries = 4\n") == 1
    overrides = {"glance/auth_type": "none", "glance/endpoint_override": "http://127.0.0.1:9292"}
    c = load(file, written, overrides)
    plain = load(file, NONE)
    assert c.mount == plain.mount
    assert c.store.span_size == 4 << 20
    assert c.glance.retries == plain.glance.retries


def test_every_option_of_the_sample_is_known(file: Path) -> None:
    """Whichever plugin is chosen: each option that the sample shows is known to one of them."""
    names = {
        (section, name)
        for section, body in re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", sample(), re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^#(\w+) =", body, re.MULTILINE)
    }
    assert {section for section, _ in names} == {
        "DEFAULT",
        "mount",
        "nova",
        "store",
        "glance",
        "hydration",
        "trace",
        "leases",
        "scrub",
        "precache",
        "priorities",
        "convert",
        "control",
        "metrics",
    }
    for section, name in sorted(names):
        complaints = [
            any(f"{section}/{name}: FILE" in fault and "unknown option" in fault for fault in faults(file, text))
            for head in (PASSWORD, APPLICATION_CREDENTIAL)
            for text in [f"{head}[{section}]\n{name} = \n"]
        ]
        assert not all(complaints), f"[{section}] {name}"


def test_the_sample_names_what_an_operator_needs() -> None:
    shown = sample()
    for option in ("cloud", "auth_type", "auth_url", "password", "application_credential_secret", "cafile"):
        assert f"\n#{option} =" in shown
    for left_out in ("timeout", "connect_retries", "collect_timing"):
        assert f"\n#{left_out} =" not in shown


# ── Pre-caching ───────────────────────────────────────────────────────────────────────────────────────


def test_policies_get_their_options_as_text(file: Path) -> None:
    text = """
[precache]
policies = name, team, newest, name
name_patterns = pin:golden-*, ubuntu-*
newest_pattern = ^(\\w+)-
option = team.teams = blue, green
option = team.empty=
[priorities]
critical = owner:1, name:golden-*
low = tag:ci
trust_properties = public, owner:1
"""
    c = load(file, NONE + text.replace("\\\\", "\\"))
    assert c.precache.policies == ("name", "team", "newest")
    assert c.precache.options == {
        "name": {"patterns": "pin:golden-*, ubuntu-*"},
        "team": {"teams": "blue, green", "empty": ""},
        "newest": {"count": "1", "pattern": "^(\\w+)-"},
    }
    assert [str(rule) for rule in c.priorities.critical] == ["owner:1", "name:golden-*"]
    assert c.priorities.trust == ("public", "owner:1")
    plain = load(file, NONE)
    assert (plain.precache.policies, plain.precache.share, plain.priorities.trust) == ((), 0.5, ("public",))
    assert load(file, NONE + "[priorities]\ntrust_properties =\n").priorities.trust == ()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("policies = name", "precache/name_patterns: is empty: the policy name would hold nothing"),
        ("policies = static", "precache/static_images: is empty: the policy static would hold nothing"),
        ("policies = a/b", "precache/policies: FILE:5: 'a/b' is no name of a policy: letters, digits, _ and -"),
        ("interval = 59", "precache/interval: FILE:5: Should be greater than or equal to 60"),
        ("share = 0%", "precache/share: FILE:5: '0%' is no share"),
        ("newest_pattern = ((", "precache/newest_pattern: FILE:5: '((' is no regular expression: missing )"),
        ("option = team", "precache/option: FILE:5: 'team' is no option of a policy: write POLICY.NAME = VALUE"),
        ("option = team.teams = blue", "precache/option: team is not among the policies"),
        ("policies = newest\noption = newest.count = 2", "precache/option: newest has options of its own"),
        ("[priorities]\nlow = ci", "priorities/low: FILE:6: 'ci' is no rule: write owner:ID, tag:TAG"),
        ("[priorities]\ntrust_properties = me", "priorities/trust_properties: FILE:6: 'me' is nobody to trust"),
    ],
)
def test_what_cannot_be_of_pre_caching_is_named(file: Path, text: str, fault: str) -> None:
    (found,) = faults(file, f"{NONE}[precache]\n{text}\n")
    assert found.startswith(fault)
