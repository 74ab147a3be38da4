"""Where the daemon listens: what a command finds by itself is what the whole configuration says, or nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from cachefs import asking, config
from tests.cloud.service import clean_environment
from tests.node import ROOT

GLANCE: Final = "[glance]\nauth_type = none\nendpoints = http://127.0.0.1:1\n"

# What is as plain as it mostly is.
PLAIN: Final = {
    "nothing": "",
    "an option": "[control]\nsocket = /run/x/a.sock\n",
    "a colon": "[control]\nsocket: /run/x/a.sock\n",
    "no spaces": "[control]\nsocket=/run/x/a.sock\n",
    "the last one counts": "[control]\nsocket = /run/a.sock\n[mount]\nuid = 0\n[control]\nsocket = /run/b.sock\n",
    "another case": "[Control]\nsocket = /run/x/a.sock\n",
    "comments": "# [control]\n[control]\n#socket = /run/no.sock\n; socket = /run/no.sock\nsocket = /run/a.sock\n",
    "another section's": "[control]\nsocket = /run/x/a.sock\n[metrics]\nlisten = 127.0.0.1:1\n",
    "continued elsewhere": "[glance]\nregion_name = a\n  b\n[control]\nsocket = /run/x/a.sock\n\n",
    "odd characters": "[control]\nsocket = /run/ä b=c/a.sock  \n",
}
# Who reads the whole has to say what these mean.
NOT_PLAIN: Final = {
    "a reference": "[control]\nsocket = $state/a.sock\n",
    "quotes": '[control]\nsocket = "/run/x/a.sock"\n',
    "relative": "[control]\nsocket = a.sock\n",
    "empty": "[control]\nsocket =\n",
    "several lines": "[control]\nsocket = /run/x/a.sock\n  /b\n",
}


@pytest.mark.parametrize("text", PLAIN.values(), ids=list(PLAIN))
def test_what_is_plain_is_found_as_the_whole_configuration_has_it(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cachefs.conf"
    file.write_text(text + GLANCE)
    assert asking.socket_path([str(file)], []) == config.load([str(file)], [], {}).control.socket


@pytest.mark.parametrize("text", NOT_PLAIN.values(), ids=list(NOT_PLAIN))
def test_where_it_is_not_plain_nothing_is_said(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cachefs.conf"
    file.write_text(text + GLANCE)
    assert asking.socket_path([str(file)], []) is None


def test_later_files_win_and_those_of_folders_come_last(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    for path, name in (
        (tmp_path / "1", "a"),
        (tmp_path / "2", "b"),
        (folder / "b.conf", "d"),
        (folder / "a.conf", "c"),
    ):
        path.write_text(f"[control]\nsocket = /run/{name}.sock\n")
    (folder / "z.txt").write_text("[control]\nsocket = /run/no.sock\n")
    files = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert asking.socket_path(files, []) == "/run/b.sock"
    assert asking.socket_path(files, [str(folder)]) == "/run/d.sock"


def test_what_cannot_be_read_and_the_environment_are_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cachefs.conf"
    file.write_bytes(b"[control]\nsocket = /run/\xff.sock\n")
    assert asking.socket_path([str(file)], []) is None
    assert asking.socket_path([str(tmp_path / "none")], []) is None
    file.write_text("[control]\nsocket = /run/a.sock\n")
    monkeypatch.setenv("OS_CONTROL__SOCKET", "/run/b.sock")
    assert asking.socket_path([str(file)], []) is None


def test_a_command_that_asks_imports_nothing_that_a_daemon_needs(tmp_path: Path) -> None:
    file = tmp_path / "cachefs.conf"
    file.write_text(f"[control]\nsocket = {tmp_path}/none.sock\n")
    script = (
        "import sys; from cachefs import cli; "
        f"status = cli.main(['status', '--config-file', {str(file)!r}]); "
        "print(status, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    status, *modules = done.stdout.split()
    assert status == "1"
    assert "no daemon answers there" in done.stderr
    assert not {"trio", "oslo_config", "keystoneauth1", "requests", "pyfuse3", "lmdb", "xxhash"} & set(modules)
