"""What lets the daemon in is shown nowhere: not in its log with every library's debug messages on, nor in its
status, its metrics or its errors, whether Keystone takes it or not.

The Keystone is real, and so is the Glance behind it. Planted are a password, the secret of an application
credential, and whatever tokens Keystone gives for them: all of its tokens begin alike.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
from collections.abc import Callable, Mapping
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
        ["status", "--json"],
        ["images"],
        ["image", image],
        ["prefetch", image],
        ["doctor"],
        ["doctor", "--json"],
        ["report"],
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


@pytest.mark.parametrize("kind", ["password", "application credential", "wrong password", "wrong secret"])
def test_no_secret_is_shown_anywhere(kind: str, keystone_cloud: KeystoneCloud, tmp_path: Path) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload(f"secrets {kind}", os.urandom(SIZE), visibility="community")
    options: Mapping[str, str]
    options = keystone.password_options("cachefs")
    if "password" not in kind:
        options = keystone.application_credential_options("cachefs")
    name = "password" if "password" in kind else "application_credential_secret"
    if kind.startswith("wrong"):
        options = {**options, name: f"planted-{secrets.token_hex(12)}"}
    secret = options[name]
    node = Node(tmp_path, glance=dict(options), mount={"read_deadline": 2}, default=LOUD)
    node.configure(metrics={"listen": "127.0.0.1:0"})
    with node:
        watched = Watched(node)
        said = said_by(node, watched, image, may_read=not kind.startswith("wrong"))
    said += node.log
    assert "keystoneauth" in node.log or "urllib3" in node.log, "the libraries were loud"
    assert secret not in said
    assert TOKEN.search(said) is None
    assert secret not in (tmp_path / "cachefs.conf").read_text().replace(f"{name} = {secret}", "")


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
