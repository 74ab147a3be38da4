"""What lets the daemon in is shown nowhere: not in its log with every library's debug messages on, nor in its
status, its metrics, its errors, a report, or what Python says at a sudden end, whether Keystone takes it or not.

The Keystone is real, and so is the Glance behind it. Planted are a password, also in a clouds.yaml, the secret of
an application credential, a token, and whatever tokens Keystone gives for them: all its tokens begin alike. What
is logged with debug messages on is all that is logged at any level.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import KeystoneCloud
from tests.node import Node, errno_of, read_direct
from tests.test_mount_metrics import Watched

pytestmark = [pytest.mark.mount, pytest.mark.cloud]

# Of Fernet tokens, which are what Keystone issues.
TOKEN: Final = re.compile(r"gAAAA[\w-]{20}")
LIBRARIES: Final = (
    "cachefs", "keystoneauth", "keystoneauth1", "keystoneclient", "glanceclient", "openstack", "requests",
    "urllib3", "urllib3.connectionpool", "http.client", "stevedore", "oslo_config", "trio", "pyfuse3",
)  # fmt: skip
LOUD: Final = {
    "debug": "true",
    "default_log_levels": ",".join(f"{library}=DEBUG" for library in LIBRARIES),
}
SIZE: Final = 1 << 20


def said_by(node: Node, watched: Watched, image: str, *, may_read: bool) -> str:
    """All that can be had from a node that was used in every way."""
    asked: list[Callable[[], object]] = [
        lambda: read_direct(node.path(image), 0, SIZE // 2),
        lambda: read_direct(node.mountpoint / "raw" / image, SIZE // 2, 4096),
        lambda: os.listdir(node.mountpoint / "images"),
        lambda: node.path("00000000-0000-4000-8000-00000000dead").stat(),
    ]
    failed = [errno_of(ask) for ask in asked]
    assert (failed[0] is None) == may_read, node.log
    os.kill(node.pid, signal.SIGUSR1)
    node.wait_for_log("Current thread")
    parts = [json.dumps(node.ask("status")), watched.exposition(), watched.get("/readyz")[1]]
    for arguments in (
        ["status"],
        ["images"],
        ["image", image],
        ["prefetch", image],
        ["doctor"],
        ["report", "-o", str(node.folder / "report.tar.gz")],
        ["config", "check"],
        ["debug", "tasks"],
        ["top"],
    ):
        done = node.cli(*arguments)
        if arguments[0] == "doctor":
            assert (done.returncode == 0) == may_read, done.stdout
        parts += [done.stdout, done.stderr]
    assert ("token" if not may_read else "DEBUG") in node.log.lower() + node.log, (
        "nothing was said that could show it"
    )
    return "\n".join(parts)


def report_of(node: Node) -> str:
    """All that is in the archive."""
    with tarfile.open(node.folder / "report.tar.gz") as archive:
        files = [archive.extractfile(entry) for entry in archive]
        return "\n".join(file.read().decode() for file in files if file is not None)


def options_of(kind: str, cloud: KeystoneCloud, folder: Path) -> tuple[dict[str, str], str]:
    """What `[glance]` says, and the secret that is in it, or in ~/.config/openstack/clouds.yaml."""
    options = cloud.keystone.password_options("cachefs")
    if "application credential" in kind or kind == "wrong secret":
        options = cloud.keystone.application_credential_options("cachefs")
    if kind == "token":
        token = cloud.keystone.session("cachefs").get_token()
        assert token is not None
        options = {name: options[name] for name in ("auth_url", "project_name", "project_domain_id")}
        return options | {"auth_type": "v3token", "token": token}, token
    name = "password" if "password" in options else "application_credential_secret"
    if kind.startswith("wrong"):
        options[name] = f"planted-{secrets.token_hex(12)}"
    if kind != "clouds.yaml":
        return options, options[name]
    path = folder / ".config" / "openstack" / "clouds.yaml"
    path.parent.mkdir(parents=True)
    auth = {key: value for key, value in options.items() if key != "auth_type"}
    path.write_text(json.dumps({"clouds": {"planted": {"auth": auth}}}))  # Which is YAML too.
    path.chmod(0o600)
    return {"cloud": "planted"}, options[name]


@pytest.mark.parametrize(
    "kind", ["password", "application credential", "clouds.yaml", "token", "wrong password", "wrong secret"]
)
def test_no_secret_is_shown_anywhere(
    kind: str, keystone_cloud: KeystoneCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    image = keystone_cloud.glance.upload(f"secrets {kind}", os.urandom(SIZE), visibility="community")
    options, secret = options_of(kind, keystone_cloud, tmp_path)
    node = Node(tmp_path, glance=options, mount={"read_deadline": 2}, default=LOUD)
    node.configure(metrics={"listen": "127.0.0.1:0"})
    with node:
        watched = Watched(node)
        said = said_by(node, watched, image, may_read=not kind.startswith("wrong"))
        said += report_of(node)
        os.kill(node.pid, signal.SIGABRT)  # As systemd's watchdog ends who is stuck.
        node.wait_for_end()
        said += node.log
        assert "Fatal Python error: Aborted" in node.log
        assert "keystoneauth" in node.log or "urllib3" in node.log, "the libraries were loud"
        node.kill()
    assert secret not in said
    assert TOKEN.search(said) is None
    configuration = (tmp_path / "cachefs.conf").read_text()
    assert configuration.count(secret) == (0 if kind == "clouds.yaml" else 1), "it is where it was planted"


def test_a_configuration_that_is_wrong_is_refused_without_its_secrets(tmp_path: Path) -> None:
    secret = f"planted-{secrets.token_hex(12)}"
    options = {"auth_type": "password", "auth_url": "http://127.0.0.1:1/v3", "username": "x", "password": secret}
    node = Node(tmp_path, glance=options, store={"max_size": "-1"})
    refusal = node.refusal()
    assert refusal.status == 1
    assert secret not in "\n".join(refusal.lines)
    done = node.cli("config", "check")
    assert done.returncode == 1
    assert secret not in done.stdout + done.stderr
