"""The cloud of the tests is a real one: what it does here is what Glance and Keystone do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

import pytest
import requests
from keystoneauth1.exceptions import (
    BadRequest,
    ConnectFailure,
    Forbidden,
    NotFound,
    Unauthorized,
    UnsupportedMediaType,
)
from keystoneauth1.session import Session

from tests.cloud import Glance, Service, ServiceDied
from tests.cloud.keystone import session_of
from tests.cloud.service import poll_until
from tests.conftest import KeystoneCloud

pytestmark = pytest.mark.cloud

_IMAGE: Final = {"service_type": "image"}
_WORD_BYTES: Final = 8


def pattern(size: int) -> bytes:
    """Every eight bytes tell their own offset."""
    return b"".join(offset.to_bytes(_WORD_BYTES, "big") for offset in range(0, size, _WORD_BYTES))


def read_range(session: Session, image: str, start: int, end: int) -> tuple[int, bytes]:
    answer = session.get(
        f"/v2/images/{image}/file", endpoint_filter=_IMAGE, headers={"Range": f"bytes={start}-{end - 1}"}
    )
    return answer.status_code, answer.content


def test_a_range_of_an_image_is_206_with_its_bytes(glance: Glance) -> None:
    data = pattern(1 << 20)
    image = glance.upload("range", data)
    assert read_range(glance.session(), image, 0x1230, 0x1250) == (206, data[0x1230:0x1250])
    assert glance.data_path(image).read_bytes() == data


def test_a_file_is_uploaded_with_its_properties(glance: Glance, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(pattern(1 << 16))
    image = glance.upload("file", path, visibility="public", hw_disk_bus="virtio")
    shown = glance.show(image)
    assert (shown["status"], shown["size"], shown["disk_format"]) == ("active", 1 << 16, "raw")
    assert (shown["visibility"], shown["hw_disk_bus"]) == ("public", "virtio")


def test_data_that_contradicts_its_format_are_refused(glance: Glance) -> None:
    with pytest.raises(UnsupportedMediaType):
        glance.upload("no qcow2", pattern(1 << 16), disk_format="qcow2")


def test_an_image_without_data_is_queued_and_a_deleted_one_is_gone(glance: Glance) -> None:
    image = glance.create("queued")
    assert glance.show(image)["status"] == "queued"
    glance.delete(image)
    with pytest.raises(NotFound):
        glance.show(image)


def test_update_replaces_and_adds(glance: Glance) -> None:
    image = glance.create("before")
    glance.update(image, name="after", os_hidden=True, colour="blue")
    shown = glance.show(image)
    assert (shown["name"], shown["os_hidden"], shown["colour"]) == ("after", True, "blue")


def test_without_keystone_a_deactivated_image_is_still_read(glance: Glance) -> None:
    image = glance.upload("deactivated", pattern(64))
    glance.deactivate(image)
    assert glance.show(image)["status"] == "deactivated"
    assert read_range(glance.session(), image, 0, 8)[0] == 206
    glance.reactivate(image)
    assert glance.show(image)["status"] == "active"


def test_many_ranges_are_refused(glance: Glance) -> None:
    image = glance.upload("two ranges", pattern(64))
    with pytest.raises(BadRequest):
        glance.session().get(
            f"/v2/images/{image}/file", endpoint_filter=_IMAGE, headers={"Range": "bytes=0-7,16-23"}
        )


def test_a_stopped_glance_refuses_connections_and_comes_back_on_its_port(private_glance: Glance) -> None:
    image = private_glance.upload("kept", pattern(64))
    endpoint = private_glance.endpoint
    for end in (private_glance.stop, private_glance.kill):
        end()
        with pytest.raises(ConnectFailure):
            private_glance.show(image)
        private_glance.start()
        assert private_glance.endpoint == endpoint
        assert read_range(private_glance.session(), image, 8, 16) == (206, pattern(64)[8:16])


def test_a_service_that_died_by_itself_can_be_stopped_and_started(tmp_path: Path) -> None:
    with Service("wsgiref.simple_server:demo_app", tmp_path, environment={}) as service:
        for _ in range(2):
            assert service.pid is not None
            os.kill(service.pid, signal.SIGKILL)
            assert poll_until(lambda: not service.running, 5)
            service.stop()
            service.start()
        assert requests.get(service.url, timeout=5).ok


def test_an_application_that_cannot_start_says_why(tmp_path: Path) -> None:
    service = Service("no.such.module:application", tmp_path, environment={}, workers=1)
    with pytest.raises(ServiceDied, match="No module named 'no'"), service:
        pass


def test_a_service_dies_with_a_killed_parent(tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from tests.cloud import Service
        service = Service("wsgiref.simple_server:demo_app", Path(sys.argv[1]), environment={})
        service.start()
        print(service.port, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).ok
        os.kill(parent.pid, signal.SIGKILL)

    def refuses() -> bool:
        try:
            requests.get(f"http://127.0.0.1:{port}/", timeout=5)
        except requests.ConnectionError:
            return True
        return False

    assert poll_until(refuses, 5)


def test_a_password_and_an_application_credential_find_glance_in_the_catalogue(
    keystone_cloud: KeystoneCloud,
) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    data = pattern(4096)
    image = glance.upload("catalogue", data)
    for options in (keystone.password_options("cachefs"), keystone.application_credential_options("cachefs")):
        session = session_of(options)
        assert session.get_endpoint(service_type="image") == glance.endpoint
        assert read_range(session, image, 16, 32) == (206, data[16:32])


def test_a_deleted_application_credential_gets_no_token(keystone_cloud: KeystoneCloud) -> None:
    keystone = keystone_cloud.keystone
    options = keystone.application_credential_options("cachefs")
    session_of(options).get_token()
    keystone.delete_application_credential("cachefs", options["application_credential_id"])
    with pytest.raises(NotFound):
        session_of(options).get_token()


def test_a_private_image_of_another_project_is_not_seen(keystone_cloud: KeystoneCloud) -> None:
    glance = keystone_cloud.glance
    image = glance.upload("private", pattern(64), user="other", visibility="private")
    assert glance.show(image, user="other")["visibility"] == "private"
    with pytest.raises(NotFound):
        glance.show(image, user="cachefs")


def test_a_reader_sees_an_image_and_may_not_read_it(keystone_cloud: KeystoneCloud) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload("seen", pattern(64))
    assert glance.show(image, user="reader")["status"] == "active"
    with pytest.raises(Forbidden):
        read_range(keystone.session("reader"), image, 0, 8)


def test_a_deactivated_image_is_read_by_admins_only(keystone_cloud: KeystoneCloud) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload("deactivated", pattern(64))
    glance.deactivate(image)
    assert read_range(keystone.session("admin"), image, 0, 8)[0] == 206
    with pytest.raises(Forbidden):
        read_range(keystone.session("cachefs"), image, 0, 8)


@pytest.mark.parametrize("everything", [False, True], ids=["this token", "all tokens of the user"])
def test_a_revoked_token_is_401_and_a_session_gets_a_new_one(
    keystone_cloud: KeystoneCloud, everything: bool
) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    image = glance.upload("revoked", pattern(64))
    session = session_of(keystone.application_credential_options("cachefs"))
    token = session.get_token()
    assert token is not None
    assert read_range(session, image, 0, 8)[0] == 206
    if everything:
        keystone.revoke_tokens("cachefs")
    else:
        keystone.revoke_token(token)
    with pytest.raises(Unauthorized):
        session.get(f"{glance.endpoint}/v2/images/{image}", authenticated=False, headers={"X-Auth-Token": token})
    assert read_range(session, image, 0, 8)[0] == 206
    assert session.get_token() != token
