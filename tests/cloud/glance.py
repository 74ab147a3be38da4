"""A real Glance with a filesystem store. Rule: images are made and changed through its API only.

Found out about Glance 33 without a Keystone, its default paste flavour:

- Every request is made in a context with `is_admin` true, no project and *no roles*. Policies look at the
  roles only, so with its default policies (new defaults, as oslo.policy 6 has it) such a Glance refuses even
  to create an image: 403 `add_image`. `_ADMIT_EVERYBODY` is the one line that repairs this; then everything
  is allowed, `public` too.
- `deactivate` and `reactivate` work (204), and the status changes, but the data stays readable (206):
  Glance hides a deactivated image's bytes from everybody but admins, and here everybody is one. A test that
  needs the 403 needs a Keystone and a user who is no admin.
- Images belong to nobody (`owner` null) and are `shared`, if nothing else is asked for.
- A request costs 6.9 ms (64 KiB, median of 200, one client); with a Keystone it costs 5.1 ms while the token
  is cached and 9.5 ms when it is not. Without one, the context of each request makes a policy enforcer anew.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import requests
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from tests.cloud.keystone import REQUEST_TIMEOUT_S, Keystone, direct_requests
from tests.cloud.service import Service, run_tool

_CONFIGURATION: Final = """\
[DEFAULT]
enabled_backends = fast:file
# What stevedore and alembic report is the absence of stores nobody asked for.
default_log_levels = stevedore=CRITICAL, alembic=WARNING, keystonemiddleware=WARNING, glance=WARNING
[database]
connection = sqlite:///{state}/glance.sqlite?timeout=30
[glance_store]
default_backend = fast
[fast]
filesystem_store_datadir = {state}/images
[os_glance_staging_store]
filesystem_store_datadir = {state}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {state}/tasks
[oslo_concurrency]
lock_path = {state}/locks
[oslo_policy]
policy_file = {state}/policy.yaml
[image_format]
require_image_format_match = {check_formats}
[paste_deploy]
flavor = {flavor}
config_file = {state}/glance-api-paste.ini
"""

_ADMIT_EVERYBODY: Final = 'context_is_admin: "@"\n'

_TOKEN_CONFIGURATION: Final = """\
[keystone_authtoken]
www_authenticate_uri = {auth_url}
auth_type = {auth_type}
auth_url = {auth_url}
username = {username}
password = {password}
project_name = {project_name}
user_domain_id = {user_domain_id}
project_domain_id = {project_domain_id}
token_cache_time = {token_cache_s}
"""


class Glance(Service):
    """One Glance with all its state in one folder; made stopped: `start` it, or use it in a `with`.

    With a Keystone, which must be running, it enters itself into the catalogue in place of any earlier one.
    """

    def __init__(
        self,
        state: Path,
        *,
        keystone: Keystone | None = None,
        workers: int = 2,
        threads: int = 8,
        token_cache_s: int = -1,
        check_formats: bool = True,
    ) -> None:
        """`token_cache_s`: how long Glance believes a token without asking; -1 is not at all, Glance's own
        default is 300. `check_formats`: refuse an upload (415) that is not what its `disk_format` says.
        """
        state = state.resolve()
        super().__init__(
            "glance.wsgi.api:application",
            state,
            environment={"OS_GLANCE_CONFIG_DIR": str(state)},
            ready_path="/healthcheck",
            workers=workers,
            threads=threads,
        )
        self.keystone = keystone
        for folder in ("images", "staging", "tasks", "locks"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "policy.yaml").write_text(_ADMIT_EVERYBODY if keystone is None else "{}\n")
        (state / "glance-api-paste.ini").write_text(_paste_configuration())
        (state / "glance-api.conf").write_text(self._configuration(token_cache_s, check_formats))
        database = state / "glance.sqlite"
        if not database.exists():
            database.write_bytes(_empty_database())
        if keystone is not None:
            keystone.register("image", "glance", self.endpoint)

    def _configuration(self, token_cache_s: int, check_formats: bool) -> str:
        flavor = "" if self.keystone is None else "keystone"
        common = _CONFIGURATION.format(state=self.state, flavor=flavor, check_formats=check_formats)
        if self.keystone is None:
            return common
        account = self.keystone.password_options("glance")
        return common + _TOKEN_CONFIGURATION.format(token_cache_s=token_cache_s, **account)

    @property
    def endpoint(self) -> str:
        return self.url

    def session(self, user: str | None = None) -> Session:
        """A keystoneauth session as `user` (with a Keystone; `admin` unless told).

        It finds Glance with `endpoint_filter={"service_type": "image"}`, with or without a Keystone.
        """
        if self.keystone is not None:
            return self.keystone.session(user or "admin")
        return Session(auth=NoAuth(endpoint=self.endpoint), session=direct_requests(), timeout=REQUEST_TIMEOUT_S)

    def create(
        self,
        name: str,
        disk_format: str | None = "raw",
        container_format: str | None = "bare",
        *,
        user: str | None = None,
        **properties: object,
    ) -> str:
        """Make an image that is `queued`: it has no data yet. Returns its id."""
        wanted = {"name": name, "disk_format": disk_format, "container_format": container_format}
        answer = self._call("POST", "/v2/images", user, json=wanted | properties)
        return str(answer.json()["id"])

    def upload_data(self, image: str, data: bytes | Path, *, user: str | None = None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        with contextlib.ExitStack() as stack:
            body = stack.enter_context(data.open("rb")) if isinstance(data, Path) else data
            self._call("PUT", f"/v2/images/{image}/file", user, data=body, headers=headers)

    def upload(
        self,
        name: str,
        data: bytes | Path,
        disk_format: str = "raw",
        container_format: str = "bare",
        *,
        user: str | None = None,
        **properties: object,
    ) -> str:
        """Make an `active` image of these bytes (a file is streamed). Returns its id."""
        image = self.create(name, disk_format, container_format, user=user, **properties)
        self.upload_data(image, data, user=user)
        return image

    def show(self, image: str, *, user: str | None = None) -> dict[str, Any]:
        shown: dict[str, Any] = self._call("GET", f"/v2/images/{image}", user).json()
        return shown

    def update(self, image: str, *, user: str | None = None, **properties: object) -> None:
        """Replace what the image has, add what it lacks."""
        changes = [{"op": "add", "path": f"/{name}", "value": value} for name, value in properties.items()]
        headers = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
        self._call("PATCH", f"/v2/images/{image}", user, json=changes, headers=headers)

    def delete(self, image: str, *, user: str | None = None) -> None:
        self._call("DELETE", f"/v2/images/{image}", user)

    def deactivate(self, image: str, *, user: str | None = None) -> None:
        """Admins, which means everybody without a Keystone, still read its bytes."""
        self._call("POST", f"/v2/images/{image}/actions/deactivate", user)

    def reactivate(self, image: str, *, user: str | None = None) -> None:
        self._call("POST", f"/v2/images/{image}/actions/reactivate", user)

    def data_path(self, image: str) -> Path:
        """Where the filesystem store keeps its bytes: to spoil them, or to see what reading costs."""
        return self.state / "images" / image

    def _call(self, method: str, path: str, user: str | None, **request: Any) -> requests.Response:
        # A pooled connection to a Glance that was restarted since is a dead one.
        headers = {"Connection": "close"} | request.pop("headers", {})
        # Not by way of the catalogue: that names the Glance which was made last.
        return self._session(user).request(f"{self.endpoint}{path}", method, headers=headers, **request)

    @functools.cached_property
    def _session(self) -> Callable[[str | None], Session]:
        return functools.cache(self.session)


def _paste_configuration() -> str:
    """The sample that Glance's wheel installs beside the virtual environment's `bin`."""
    distribution = importlib.metadata.distribution("glance")
    for file in distribution.files or ():
        if file.name == "glance-api-paste.ini":
            return Path(str(distribution.locate_file(file))).read_text()
    raise FileNotFoundError("glance-api-paste.ini")


@functools.cache
def _empty_database() -> bytes:
    """A database with Glance's schema. Making one takes more than a second, so a process makes only one."""
    with tempfile.TemporaryDirectory(prefix="cachefs-cloud-") as folder:
        state = Path(folder)
        configuration = state / "glance-api.conf"
        configuration.write_text(f"[database]\nconnection = sqlite:///{state}/glance.sqlite\n")
        tool = Path(sys.executable).with_name("glance-manage")
        command = [sys.executable, str(tool), "--config-file", str(configuration), "db_sync"]
        run_tool(command, state / "db_sync.log")
        database = state / "glance.sqlite"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            # Kept in the file: readers and the writer no longer wait for each other.
            connection.execute("PRAGMA journal_mode=WAL")
        return database.read_bytes()
