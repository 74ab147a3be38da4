"""What a program in the cell can do, and what not. Rule: the programs here try it, with the distribution's own
python3; what they found out is on their stderr.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
import trio

from cachefs import confine
from cachefs.sandbox import LIMITS, NOBODY, SAID_MAX, Account, Ending, Limits, harmless, sandboxed
from tests.converters import children, helpers

PYTHON: Final = "/usr/bin/python3"  # Not this test's own: nobody else can read that everywhere.
SHELL: Final = "/bin/sh"
AS_ROOT: Final = os.geteuid() == 0
UIDS_OF_NONE: Final = 1 << 24  # From here on no user is to be found.


async def _run(
    command: Sequence[str], files: Sequence[int], listening: int, limits: Limits, account: Account
) -> Ending:
    async with sandboxed(command, files, listening, limits=limits, account=account) as process:
        return await process.wait()


def run(
    command: Sequence[str],
    files: Sequence[int] = (),
    listening: int = 0,
    limits: Limits = LIMITS,
    account: Account = NOBODY,
) -> Ending:
    return trio.run(_run, command, files, listening, limits, account)


def ask(
    program: str,
    files: Sequence[int] = (),
    listening: int = 0,
    limits: Limits = LIMITS,
    account: Account = NOBODY,
) -> str:
    """What `program` prints on its stderr, if it comes to its end."""
    program = f"import os, sys, socket, ctypes\nsys.stdout = sys.stderr\n{program}"
    ending = run([PYTHON, "-I", "-S", "-c", program], files, listening, limits, account)
    assert ending.status == 0, ending
    return ending.said


def _missing() -> str | None:
    if not os.path.exists(PYTHON):
        return f"there is no {PYTHON}"
    ending = run([SHELL, "-c", "exit 7"])
    return None if ending.status == 7 else f"no sandbox can be made here: {ending}"


LACKING: Final = _missing()
pytestmark = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    yield
    assert helpers() == []


# ── what it cannot reach ──


def test_there_is_no_network() -> None:
    name = f"\0cachefs-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(name)
        unix.listen()
        tried = ask(f"""
for family, address in ((socket.AF_INET, {tcp.getsockname()!r}), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError as error:
        print(error.strerror)
print([name for _, name in socket.if_nameindex()])
""")
    assert tried == "Network is unreachable Connection refused ['lo']"


def test_there_are_no_files_but_the_programs(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another tenant")
    tmp_path.chmod(0o755)
    assert ask("print(sorted(set(os.listdir('/')) - {'bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32'}))") == (
        "['etc', 'usr']"
    )
    assert ask("print(os.listdir('/etc'))") == "['ld.so.cache']"
    assert (
        ask(f"print(os.path.exists({str(tmp_path)!r}), os.path.exists('/proc'), os.getcwd())") == "False False /"
    )


def test_it_can_write_nowhere(tmp_path: Path) -> None:
    assert (
        ask("""
for path in ("/x", "/etc/x", "/usr/x", "/usr/lib/x", "/bin/x", "/etc/ld.so.cache"):
    try:
        open(path, "w")
    except OSError as error:
        print(error.errno)
""")
        == "30 30 30 30 30 30"
    )  # EROFS
    ours = tmp_path / "ours"
    with ours.open("wb") as file:  # Not even where it was given something to write to.
        ending = run([SHELL, "-c", "echo x >&3"], [file.fileno()])
    assert ending.status != 0
    assert ours.read_bytes() == b""


def test_it_sees_only_the_files_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("first")
    (tmp_path / "second").write_text("second")
    inherited = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    with (tmp_path / "first").open() as first, (tmp_path / "second").open() as second:
        # Given in an order in which each stands where another is to be.
        files = [os.dup(second.fileno()), first.fileno()]
        seen = ask(
            """
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
print([fd for fd in range(1024) if is_open(fd)], os.read(3, 10), os.read(4, 10), os.read(0, 10))
""",
            files,
        )
        os.close(files[0])
    os.close(inherited)
    assert seen == "[0, 1, 2, 3, 4] b'second' b'first' b''"


def test_sockets_are_announced_as_systemd_does() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        assert ask(
            "print(os.environ.pop('LISTEN_PID') == str(os.getpid()), os.environ.pop('LISTEN_FDS'))",
            [listener.fileno()],
            listening=1,
        ) == ("True 1")


def test_nobody_else_runs_there() -> None:
    assert ask("print(os.getpid(), os.getppid())") == "1 0"
    ask(f"try: os.kill({os.getpid()}, 0)\nexcept ProcessLookupError: pass\nelse: sys.exit(1)")


# ── who it is ──


@pytest.mark.skipif(not AS_ROOT, reason="another user needs root")
def test_it_is_nobody_on_the_whole_machine() -> None:
    ours, theirs = socket.socketpair()

    async def look() -> None:
        say_and_stay = "import os; os.write(3, b'!'); os.read(3, 1)"
        async with sandboxed([PYTHON, "-I", "-S", "-c", say_and_stay], [theirs.fileno()]):
            await trio.to_thread.run_sync(ours.recv, 1)
            await trio.to_thread.run_sync(_look_at_nobody)

    with ours, theirs:
        ours.settimeout(30)
        trio.run(look)


def _look_at_nobody() -> None:
    (helper,) = helpers()
    (child,) = children(helper)
    proc = Path(f"/proc/{child}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
    assert {status[f"Cap{kind}"].strip() for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Groups"].strip() == ""
    assert (proc / "oom_score_adj").read_text() == "1000\n"
    assert os.getsid(child) == helper
    for kind in ("net", "mnt", "pid", "ipc", "uts", "cgroup"):
        assert os.readlink(proc / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")


def test_its_ids_are_as_told_and_its_environment_is_empty() -> None:
    assert ask("print(os.getresuid(), os.getresgid())") == "(65534, 65534, 65534) (65534, 65534, 65534)"
    # What python itself adds under a C locale.
    assert ask("os.environ.pop('LC_CTYPE', None); print(dict(os.environ))") == "{}"
    assert ask("libc = ctypes.CDLL(None); print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(23, 21, 0, 0, 0))") == "1 0"
    assert Account.of("nobody").uid == 65534
    with pytest.raises(KeyError):
        Account.of("nobody-of-that-name")


def test_it_cannot_become_more() -> None:
    tried = ask("""
libc = ctypes.CDLL(None)
print(libc.setuid(0), libc.mount(b"x", b"/usr", b"tmpfs", 0, None), libc.umount2(b"/usr", 2), libc.chroot(b"/usr"))
""")
    assert tried == "-1 -1 -1 -1"


# ── how much it may use ──


def test_memory_is_bounded() -> None:
    assert ask(
        "try: bytearray(300 << 20)\nexcept MemoryError: print('no')", limits=Limits(memory_bytes=200 << 20)
    ) == ("no")


def test_cpu_time_is_bounded() -> None:
    ending = run([SHELL, "-c", "while :; do :; done"], limits=Limits(cpu_s=1))
    assert ending.status is not None
    assert ending.status < 0
    assert ending.stopped == ""
    assert 0.5 <= ending.cpu_s <= 5  # The kernel looks at ticks, and counts more finely.


def test_its_life_is_bounded_and_that_of_its_children() -> None:
    ending = run([SHELL, "-c", "sleep 1000 & sleep 1000"], limits=Limits(time_s=0.3))
    assert (ending.status, ending.stopped) == (-9, "time")
    assert str(ending) == "was killed: its time was up"


def _is_of(account: Account, proc: Path) -> bool:
    try:
        return proc.stat().st_uid == account.uid
    except FileNotFoundError:
        return False


def test_processes_are_bounded() -> None:
    # Of the same user there may be others on this machine: where that can be chosen, it is one that nobody is.
    account = Account(UIDS_OF_NONE + os.getpid(), 65534) if AS_ROOT else NOBODY
    taken = sum(len(os.listdir(proc / "task")) for proc in Path("/proc").glob("[0-9]*") if _is_of(account, proc))
    assert ask(
        """
n = 0
try:
    while n < 100:
        if os.fork() == 0:
            import signal; signal.pause()
        n += 1
except BlockingIOError:
    print(n < 20)
""",
        limits=Limits(processes_max=taken + 10),
        account=account,
    ) == ("True")


def test_open_files_are_bounded() -> None:
    assert ask(
        "try:\n while True: os.dup(0)\nexcept OSError as error: print(error.errno)", limits=Limits(files_max=20)
    ) == ("24")


def test_what_it_says_is_bounded_and_harmless() -> None:
    ending = run([SHELL, "-c", "printf '\\033[31mred\\n\\0\\377' >&2; exit 3"])
    assert (ending.status, ending.said) == (3, "[31mred")
    ending = run([SHELL, "-c", "yes '%s{x}\x1b' >&2"], limits=Limits(time_s=0.5))
    assert len(ending.said) <= SAID_MAX + 3
    assert ending.said.isprintable()
    assert harmless("a\nb\u202ec\td" + "e" * 1000) == "..." + "e" * SAID_MAX


# ── its end ──


def test_it_ends_with_the_block() -> None:
    async def leave() -> None:
        async with sandboxed([SHELL, "-c", "sleep 1000 & sleep 1000"]) as process:
            process.stop()
            process.stop()
            ending = await process.wait()
            assert (ending.status, ending.stopped) == (-9, "asked")
        async with sandboxed([SHELL, "-c", "sleep 1000"]):
            pass
        with trio.move_on_after(0.2):
            async with sandboxed([SHELL, "-c", "sleep 1000"]) as process:
                await process.wait()

    trio.run(leave)


def test_it_ends_with_the_daemon() -> None:
    """However that ends: here it is killed. The pipe is at its end when nobody has it open any more."""
    program = f"""
import os, signal, sys, trio
from cachefs.sandbox import sandboxed
async def main():
    async with sandboxed(["{SHELL}", "-c", "sleep 1000 & sleep 1000"], [int(sys.argv[1])]):
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""
    read, write = os.pipe()
    daemon = subprocess.Popen(
        [sys.executable, "-c", program, str(write)], pass_fds=[write], cwd=Path(__file__).parent.parent
    )
    os.close(write)
    assert daemon.wait(30) == -9
    assert os.read(read, 1) == b""
    os.close(read)


def test_what_cannot_begin_says_so_and_is_no_crash() -> None:
    for command in (["/usr/bin/there-is-none"], ["/etc/passwd"], [str(Path(__file__))]):
        ending = run(command)
        assert ending.status is None
        assert "FileNotFoundError" in ending.failed or "PermissionError" in ending.failed
        assert str(ending).startswith("did not begin: ")


@pytest.mark.skipif(not AS_ROOT, reason="needs root to become another user")
def test_without_root_a_user_namespace_does_it_or_nothing_runs() -> None:
    spec = confine.Spec(
        command=[SHELL, "-c", "id -u >&2; ls / >&2; cat /proc/net/dev >&2; echo x >/x; exit 5"],
        files=[], listening=0, visible=["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"],
        uid=65534, gid=65534, cpu_s=10, time_s=10.0, memory_bytes=1 << 30, files_max=64, processes_max=256,
    )  # fmt: skip
    source = Path(confine.__file__).read_text()
    control, keep = os.pipe()
    found = subprocess.run(
        [PYTHON, "-I", "-S", "-c", source, json.dumps(spec)],
        user=65533, group=65533, extra_groups=[], env={}, stdin=control, capture_output=True, check=True,
    )  # fmt: skip
    os.close(control)
    os.close(keep)
    report: confine.Report = json.loads(found.stdout)
    if report["status"] is None:
        assert "unshare" in report["failed"] or "mount" in report["failed"]
        assert found.stderr == b""
    else:
        assert report["status"] == 5
        assert found.stderr.split()[0] == b"65534"
        assert b"Read-only file system" in found.stderr
