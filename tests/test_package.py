"""What is installed: the wheel by pip, the Debian package by dpkg in a machine of its own, from its first day to
its last. The package is built as `make deb` does it, but for what the compiler optimises."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

from cachefs import __version__
from tests.cloud import Glance
from tests.cloud.service import clean_environment, poll_until
from tests.node import ROOT
from tests.own_systemd import Systemd, missing_for_systemd

# With what sed would take for something else. Lintian believes no example.org.
MAINTAINER: Final = {"DEBFULLNAME": "Zoë O'Neill & Co.", "DEBEMAIL": "images@cachefs.invalid"}
BUILD_TIMEOUT_S: Final = 600.0
MIB: Final = 1 << 20
SIZE: Final = 12 * MIB + 4711
BIND: Final = "var-lib-nova-instances-_base.mount"
CONFIGURATION: Final = "/etc/cachefs/cachefs.conf"
ENDED_TIMEOUT_S: Final = 60.0
# dpkg's, adduser's and systemd's own; and what each program that looks for plug-ins notes in the home of its user.
OF_OTHERS: Final = ("/var/lib/dpkg/", "/etc/.pwd.lock", "/run/", "/root/.cache/python-entrypoints")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Both of its outputs; an exit status other than 0 fails the test with them."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=BUILD_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ── The wheel ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_wheel_has_all_of_it_and_its_commands_run(tmp_path: Path) -> None:
    # From a copy: setuptools would take what an earlier build has left beside the source.
    source, wheels, environment = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    shutil.copytree(ROOT / "cachefs", source / "cachefs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {str(path.relative_to(source)) for path in (source / "cachefs").rglob("*") if path.is_file()}

    # What it depends on is taken from where the tests have it; cachefs itself is not to be found there.
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run(python, "-c", "import cachefs; print(cachefs.__path__[0])", cwd=tmp_path) == f"{site}/cachefs\n"
    assert run(environment / "bin/cachefs", "--version", cwd=tmp_path) == f"cachefs {__version__}\n"
    assert "prefetch" in run(environment / "bin/cachefs", "--help", cwd=tmp_path)
    sample = tmp_path / "sample.conf"
    sample.write_text(run(environment / "bin/cachefs", "config", "sample", cwd=tmp_path))
    assert "[glance]" in sample.read_text()
    for helper in ("mount.cachefs", "mount.fuse.cachefs"):
        assert run(environment / "bin" / helper, sample, tmp_path, "-f", "-o", "ro", cwd=tmp_path) == ""


# ── The Debian package ────────────────────────────────────────────────────────────────────────────────


def missing_for_package() -> str | None:
    """What this machine lacks for building one, in words; None where it can."""
    if shutil.which("dpkg-buildpackage") is None:
        return "there is no dpkg-buildpackage: setup/install deb"
    done = subprocess.run(["dpkg-checkbuilddeps"], cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{done.stderr.strip()}: setup/install deb" if done.returncode else None


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all tests: half a minute of a processor, and what pip has to fetch."""
    if (lacking := missing_for_package()) is not None:
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("package")
    run(
        "env",
        *(f"{name}={value}" for name, value in MAINTAINER.items()),
        ROOT / "setup/package",
        "--quick",
        folder,
    )
    architecture = run("dpkg", "--print-architecture").strip()
    return folder / f"cachefs_{__version__}_{architecture}.deb"


def test_the_package_is_of_the_programs_version() -> None:
    first = (ROOT / "debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"cachefs ({__version__}) ")


def test_its_maintainer_is_who_builds_it(package: Path, tmp_path: Path) -> None:
    name, address = MAINTAINER.values()
    assert run("dpkg-deb", "--field", package, "Maintainer").strip() == f"{name} <{address}>"
    run("dpkg-deb", "--extract", package, tmp_path)
    changes = gzip.decompress((tmp_path / "usr/share/doc/cachefs/changelog.gz").read_bytes()).decode()
    assert re.findall(r"^ -- (.*)  ", changes, re.MULTILINE)[0] == f"{name} <{address}>"


def test_without_a_name_the_maintainer_is_an_address_that_leads_nowhere() -> None:
    nowhere = "cachefs maintainers <maintainers@cachefs.invalid>"
    assert f"\nMaintainer: {nowhere}\n" in (ROOT / "debian/control").read_text()
    written = run("dpkg-parsechangelog", "-l", ROOT / "debian/changelog", "-S", "Maintainer")
    assert written.strip() == nowhere


@pytest.mark.parametrize(
    ("name", "address"), [("A B", ""), ("A", "a@b@c"), ("A\nDepends: evil", "a@b"), ("A", "no address")]
)
def test_what_is_no_maintainer_is_refused_before_anything_is_built(
    name: str, address: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(ROOT / "setup/package"), "--quick", str(tmp_path)],
        env=clean_environment() | {"DEBFULLNAME": name, "DEBEMAIL": address},
        capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "package: DEBFULLNAME" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_lintian_finds_no_error(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("there is no lintian: setup/install deb")
    root = ["--allow-root"] if os.geteuid() == 0 else []
    assert "E: " not in run("lintian", *root, "--fail-on", "error", package)


def test_it_holds_what_it_is_to_hold_and_nothing_names_the_machine_that_built_it(
    package: Path, tmp_path: Path
) -> None:
    run("dpkg-deb", "--extract", package, tmp_path)
    environment = tmp_path / "usr/lib/cachefs"
    for name in ("cachefs", "mount.cachefs", "mount.fuse.cachefs"):
        assert (environment / "bin" / name).read_text().startswith("#!/usr/lib/cachefs/bin/python3\n")
    assert str((environment / "bin/python3").readlink()) in ("/usr/bin/python3", "../../../bin/python3")
    assert {path.name for path in (environment / "bin").iterdir()} == {
        "cachefs", "mount.cachefs", "mount.fuse.cachefs", "python3",
    }  # fmt: skip
    assert (environment / "pyvenv.cfg").read_text() == "home = /usr/bin\ninclude-system-site-packages = false\n"
    for page in (ROOT / "build/man").glob("*.[1-8]"):
        assert (tmp_path / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz").exists()
    assert {path.name for path in (tmp_path / "lib/systemd/system").iterdir()} == {"cachefs.service", BIND}
    left = [path for path in environment.rglob("*") if path.suffix == ".pyc" or path.name == "direct_url.json"]
    assert left == []
    for path in environment.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert os.fsencode(ROOT) not in path.read_bytes(), path


def newer(package: Path, folder: Path) -> Path:
    """The same package, as of the next version; one module of it says so."""
    tree = folder / "tree"
    run("dpkg-deb", "--raw-extract", package, tree)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}\n", f"Version: {__version__}+next\n"))
    (marked,) = tree.glob("usr/lib/cachefs/lib/python3.*/site-packages/cachefs/__init__.py")
    marked.write_text(marked.read_text().replace(__version__, f"{__version__}+next"))
    run("dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "--build", tree, folder)
    shutil.rmtree(tree)
    (built,) = folder.glob("*+next*.deb")
    return built


class Machine(Systemd):
    """With dpkg, and what is asked of the installed program."""

    def dpkg(self, *words: str | Path) -> str:
        done = self.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", *map(str, words))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def stat(self, path: str) -> str:
        return self.ask("stat", "--format", "%a %U:%G", path).strip()

    @property
    def mounts(self) -> list[str]:
        lines = self.path("/proc/1/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if " fuse.cachefs " in line]

    @property
    def processes(self) -> list[str]:
        """Those of the program."""
        said = self.ask("ps", "-e", "-o", "args").splitlines()
        return [line for line in said if "/usr/lib/cachefs" in line or "/usr/bin/cachefs" in line]

    def names(self) -> set[str]:
        """Of every file and folder that a package could leave something in."""
        folders = ("/etc", "/usr", "/var", "/mnt", "/run", "/opt", "/srv", "/home", "/root")
        found = self.ask("find", *folders, "-xdev", "-path", "/var/*tmp", "-prune", "-o", "-print")
        return set(found.splitlines())


@pytest.mark.mount
@pytest.mark.cloud
def test_its_life(package: Path, glance: Glance, tmp_path: Path) -> None:
    if (lacking := missing_for_systemd()) is not None:
        pytest.skip(lacking)
    data = random.Random(6).randbytes(SIZE)
    image = glance.upload("life", data)
    next_package = newer(package, tmp_path)
    shutil.copy(package, tmp_path)
    with Machine(tmp_path) as machine:
        before = machine.names()
        the_first_day(machine, tmp_path / package.name)
        it_serves(machine, glance, image, data)
        it_is_upgraded(machine, next_package, image, data)
        it_is_mounted_by_mount(machine, image, data)
        it_goes(machine)
        # What is there outside was made outside: that machine is the layer below.
        left = {name for name in machine.names() - before if not os.path.lexists(name)}
        assert {name for name in left if "cachefs" in name} == set()
        assert {name for name in left if not name.startswith(OF_OTHERS)} == set()


def the_first_day(machine: Machine, package: Path) -> None:
    said = machine.dpkg("--install", package)
    assert "enabled, and not started" in said
    assert machine.systemctl("is-enabled", "cachefs").strip() == "enabled"
    assert machine.run("systemctl", "is-active", "cachefs").stdout.strip() == "inactive"
    assert machine.run("systemctl", "is-enabled", BIND).stdout.strip() == "disabled"
    assert machine.stat("/etc/cachefs") == "750 root:cachefs"
    assert machine.stat(CONFIGURATION) == "640 root:cachefs"
    refused = machine.run("cachefs", "config", "check")
    assert refused.returncode == 1
    assert "glance" in refused.stderr


def it_serves(machine: Machine, glance: Glance, image: str, data: bytes) -> None:
    machine.write(
        CONFIGURATION,
        f"[glance]\nauth_type = none\nendpoints = {glance.endpoint}\n"
        "[store]\nmin_free = 0\nmax_size = 1G\n[metrics]\nlisten =\n[hydration]\nmode = manual\n"
        "[leases]\nfolders =\n",
        0o640,
    )
    machine.ask("cachefs", "config", "check")
    machine.systemctl("start", "cachefs")
    assert machine.mounts == ["/mnt/cachefs"]
    assert machine.path(f"/mnt/cachefs/images/{image}").read_bytes() == data


def it_is_upgraded(machine: Machine, package: Path, image: str, data: bytes) -> None:
    """The daemon and what is open on its mount go on; the next daemon has the store of the one before."""
    daemon = machine.show("cachefs", "MainPID")
    path = machine.path(f"/mnt/cachefs/images/{image}")
    with path.open("rb", buffering=0) as guest:
        said = machine.dpkg("--install", package)
        os.posix_fadvise(guest.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert guest.read(MIB) == data[:MIB]
    assert "systemctl restart cachefs" in said
    assert machine.show("cachefs", "MainPID") == daemon
    assert machine.ask("cachefs", "--version") == f"cachefs {__version__}+next\n"
    machine.systemctl("restart", "cachefs")
    assert machine.show("cachefs", "MainPID") != daemon
    assert path.read_bytes() == data
    # Whoever wants Nova to use it enables the bind; the next restart is of both.
    machine.systemctl("enable", "--now", BIND)
    base = machine.path(f"/var/lib/nova/instances/_base/{hashlib.sha1(image.encode()).hexdigest()}")
    assert base.read_bytes() == data
    machine.systemctl("restart", "cachefs")
    assert poll_until(lambda: machine.mounts == ["/mnt/cachefs", "/var/lib/nova/instances/_base"], ENDED_TIMEOUT_S)
    assert base.read_bytes() == data
    reads = json.loads(machine.ask("cachefs", "status", "--json"))["reads"]
    assert {outcome for outcome, count in reads["by_outcome"].items() if count} <= {"disk", "hit"}, reads


def it_is_mounted_by_mount(machine: Machine, image: str, data: bytes) -> None:
    """As a line of fstab does it; and while somebody reads, the package does not go."""
    machine.systemctl("stop", "cachefs")
    assert machine.mounts == []
    machine.path("/var/lib/nova/instances/_base").rmdir()
    machine.path("/var/lib/nova/instances").rmdir()
    machine.path("/var/lib/nova").rmdir()
    assert machine.processes == []
    machine.ask("mount", "-t", "fuse.cachefs", CONFIGURATION, "/mnt/cachefs")
    assert machine.mounts == ["/mnt/cachefs"]
    with machine.path(f"/mnt/cachefs/images/{image}").open("rb") as guest:
        refused = machine.run("dpkg", "--remove", "cachefs")
        assert refused.returncode != 0
        assert "a mount is in use" in refused.stderr
        assert guest.read() == data


def it_goes(machine: Machine) -> None:
    machine.dpkg("--remove", "cachefs")
    assert machine.mounts == []
    assert poll_until(lambda: not machine.processes, ENDED_TIMEOUT_S), machine.processes
    # A package that comes back finds what it had.
    for kept in (CONFIGURATION, "/var/lib/cachefs/index"):
        assert os.path.lexists(machine.path(kept))
    assert not os.path.lexists(machine.path("/usr/lib/cachefs"))
    machine.dpkg("--purge", "cachefs")
    for name in ("passwd", "group"):
        assert machine.run("getent", name, "cachefs").returncode == 2
