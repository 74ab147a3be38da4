"""A real Keystone with projects, users and a catalogue. Rule: what bootstrap does not do, its API does.

Users: `admin` (role admin, project `images`), `cachefs` (member, `images`), `reader` (reader, `images`),
`other` (member, project `other`) and `glance` (service, project `service`), which Glance checks tokens with.

Found out about Keystone 30:

- An issued token dies at once when it is revoked itself (`revoke_token`), or when its user's password is
  set, even to what it was (`revoke_tokens`); application credentials survive that. Tokens count whole
  seconds, so one issued in the second of a revocation may be born dead.
- An application credential dies with its `DELETE`, and so do the tokens issued for it.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import requests
from keystoneauth1 import loading
from keystoneauth1.exceptions import Unauthorized
from keystoneauth1.identity.base import BaseIdentityPlugin
from keystoneauth1.loading import BaseLoader
from keystoneauth1.session import Session

from tests.cloud.service import Service, poll_until, run_tool

REQUEST_TIMEOUT_S: Final = 60.0
REGION: Final = "RegionOne"
_DOMAIN: Final = "default"
_IDENTITY: Final = {"service_type": "identity"}
_REVOCATION_TIMEOUT_S: Final = 10.0

_CONFIGURATION: Final = """\
[DEFAULT]
default_log_levels = stevedore=CRITICAL, alembic=WARNING, keystone=WARNING
[database]
connection = sqlite:///{state}/keystone.sqlite?timeout=30
[token]
expiration = {token_expiration_s}
# Real clouds add two days for the sake of long operations; here expired means expired.
allow_expired_window = 0
[fernet_tokens]
key_repository = {state}/fernet
[fernet_receipts]
key_repository = {state}/fernet
[credential]
key_repository = {state}/credential
[identity]
# The least that bcrypt takes: nobody attacks these passwords, and everybody waits for them.
password_hash_rounds = 4
[cache]
# Validating one token takes 450 SQL queries without it. It is the process's own: hence one worker, for
# two would disagree about what is revoked.
enabled = true
backend = dogpile.cache.memory
"""


@dataclass(frozen=True)
class Account:
    name: str
    project: str
    role: str
    password: str


def _accounts() -> dict[str, Account]:
    rows = [
        ("admin", "images", "admin"),
        ("cachefs", "images", "member"),
        ("reader", "images", "reader"),
        ("other", "other", "member"),
        ("glance", "service", "service"),
    ]
    return {name: Account(name, project, role, secrets.token_hex(8)) for name, project, role in rows}


class Keystone(Service):
    """One Keystone with all its state in one folder; made stopped: `start` it, or use it in a `with`."""

    def __init__(self, state: Path, *, token_expiration_s: int = 3600, threads: int = 8) -> None:
        state = state.resolve()
        super().__init__(
            "keystone.wsgi.api:application",
            state,
            environment={"OS_KEYSTONE_CONFIG_DIR": str(state)},
            ready_path="/v3",
            workers=1,
            threads=threads,
        )
        self._accounts = _accounts()
        self._user_ids: dict[str, str] = {}
        state.mkdir(parents=True, exist_ok=True)
        configuration = _CONFIGURATION.format(state=state, token_expiration_s=token_expiration_s)
        (state / "keystone.conf").write_text(configuration)

    @property
    def auth_url(self) -> str:
        return f"{self.url}/v3"

    def start(self) -> None:
        if self._user_ids:
            super().start()
            return
        self._make_database()
        super().start()
        self._make_accounts()

    def password_options(self, user: str) -> dict[str, str]:
        """What `[glance]` of a configuration file would say."""
        account = self._accounts[user]
        return {
            "auth_type": "password",
            "auth_url": self.auth_url,
            "username": account.name,
            "password": account.password,
            "user_domain_id": _DOMAIN,
            "project_name": account.project,
            "project_domain_id": _DOMAIN,
        }

    def application_credential_options(self, user: str) -> dict[str, str]:
        """The same with a new application credential."""
        credential, secret = self.application_credential(user)
        return {
            "auth_type": "v3applicationcredential",
            "auth_url": self.auth_url,
            "application_credential_id": credential,
            "application_credential_secret": secret,
        }

    def application_credential(self, user: str) -> tuple[str, str]:
        """Make one with all of the user's roles. Returns its id and its secret."""
        made = self._call(
            "POST",
            f"/users/{self._user_ids[user]}/application_credentials",
            {"application_credential": {"name": secrets.token_hex(8)}},
            user=user,
        )
        return made["application_credential"]["id"], made["application_credential"]["secret"]

    def delete_application_credential(self, user: str, credential: str) -> None:
        self._call("DELETE", f"/users/{self._user_ids[user]}/application_credentials/{credential}")

    def session(self, user: str) -> Session:
        """A new session, which will ask for a token of its own."""
        return session_of(self.password_options(user))

    def revoke_token(self, token: str) -> None:
        """Make this one token invalid at once."""
        self._session("admin").delete(
            "/auth/tokens", endpoint_filter=_IDENTITY, headers={"X-Subject-Token": token}
        )

    def revoke_tokens(self, user: str) -> None:
        """Make every token of this user invalid at once, whoever holds it. Its next one is valid."""
        same_password = {"password": self._accounts[user].password}
        self._call("PATCH", f"/users/{self._user_ids[user]}", {"user": same_password})
        if not poll_until(lambda: self._gets_a_valid_token(user), _REVOCATION_TIMEOUT_S):
            raise Unauthorized(f"{user} gets no valid token")

    def register(self, service_type: str, name: str, url: str) -> None:
        """Put an endpoint into the catalogue, in place of an earlier one of that type."""
        for service in self._call("GET", f"/services?type={service_type}")["services"]:
            self._call("DELETE", f"/services/{service['id']}")
        service_id = self._make("service", {"type": service_type, "name": name})
        endpoint = {"url": url, "region_id": REGION, "service_id": service_id}
        for interface in ("public", "internal"):
            self._make("endpoint", endpoint | {"interface": interface})

    def _make_database(self) -> None:
        # As root it wants to be told whom the keys belong to; otherwise they can only be ours.
        owner = f"--keystone-user {_root()} --keystone-group {_root_group()}" if os.geteuid() == 0 else ""
        configuration = f"--config-file {shlex.quote(str(self.state / 'keystone.conf'))}"
        commands = ["db_sync", f"fernet_setup {owner}", f"credential_setup {owner}", self._bootstrap()]
        run_tool(
            # -P: beside that script lies a module that is called `keystone`, too.
            [sys.executable, "-P", str(Path(__file__).with_name("keystone_manage.py"))]
            + [f"{configuration} {command}" for command in commands],
            self.log,
        )

    def _bootstrap(self) -> str:
        admin = self._accounts["admin"]
        return (
            f"bootstrap --bootstrap-username {admin.name} --bootstrap-password {admin.password}"
            f" --bootstrap-project-name {admin.project} --bootstrap-region-id {REGION}"
            f" --bootstrap-public-url {self.auth_url} --bootstrap-internal-url {self.auth_url}"
        )

    def _make_accounts(self) -> None:
        roles = self._ids("role")
        projects = self._ids("project")
        users = self._ids("user")
        for account in self._accounts.values():
            if account.project not in projects:
                projects[account.project] = self._make("project", {"name": account.project})
            if account.name not in users:
                wanted = {"name": account.name, "password": account.password}
                users[account.name] = self._make("user", wanted)
                grant = f"users/{users[account.name]}/roles/{roles[account.role]}"
                self._call("PUT", f"/projects/{projects[account.project]}/{grant}")
        self._user_ids = users

    def _ids(self, kind: str) -> dict[str, str]:
        return {listed["name"]: listed["id"] for listed in self._call("GET", f"/{kind}s")[f"{kind}s"]}

    def _make(self, kind: str, wanted: dict[str, str]) -> str:
        return str(self._call("POST", f"/{kind}s", {kind: wanted})[kind]["id"])

    def _gets_a_valid_token(self, user: str) -> bool:
        try:
            self.session(user).get(f"/users/{self._user_ids[user]}", endpoint_filter=_IDENTITY)
        except Unauthorized:
            return False
        return True

    @functools.cached_property
    def _session(self) -> Callable[[str], Session]:
        return functools.cache(self.session)

    def _call(self, method: str, path: str, body: object | None = None, *, user: str = "admin") -> dict[str, Any]:
        # A pooled connection to a Keystone that was restarted since is a dead one.
        answer = self._session(user).request(
            path,
            method,
            endpoint_filter=_IDENTITY,
            headers={"Connection": "close"},
            json=body,
        )
        return dict(answer.json()) if answer.content else {}


def session_of(options: Mapping[str, str]) -> Session:
    """A session for options as they stand in a configuration file."""
    plugin_options = {name: value for name, value in options.items() if name != "auth_type"}
    loader: BaseLoader[BaseIdentityPlugin] = loading.get_plugin_loader(options["auth_type"])
    plugin = loader.load_from_options(**plugin_options)
    return Session(auth=plugin, session=direct_requests(), timeout=REQUEST_TIMEOUT_S)


def direct_requests() -> requests.Session:
    """requests without the proxies and credentials of the caller's environment."""
    session = requests.Session()
    session.trust_env = False
    return session


def _root() -> str:
    return pwd.getpwuid(0).pw_name


def _root_group() -> str:
    return grp.getgrgid(0).gr_name
