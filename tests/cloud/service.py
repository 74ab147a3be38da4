"""Runs one WSGI application under gunicorn on loopback. Rule: nothing here knows which application it is.

A service and its workers are one process group in a session of their own. They end with `stop`, `kill` or
`close`, and also when this process ends without any of them, even by SIGKILL: see `gunicorn_conf`.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_POLL_INTERVAL_S: Final = 0.01
_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 10.0
_PROBE_TIMEOUT_S: Final = 5.0
_LOG_TAIL_BYTES: Final = 4096
_GUNICORN_CONF: Final = Path(__file__).with_name("gunicorn_conf.py")

# PR_SET_PDEATHSIG means the parent *thread*: a service that a short-lived thread started would die with
# that thread. So this one thread starts them all; it ends with the interpreter.
_SPAWNER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cloud-spawner")

# Settings of the caller's shell must not reach the service: another cloud, another gunicorn, a proxy.
_FOREIGN_PREFIXES: Final = ("OS_", "GUNICORN_", "PYTHON")
_FOREIGN_NAMES: Final = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


class ServiceDied(Exception):
    """The process ended before it was ready."""

    def __init__(self, application: str, returncode: int, log_tail: str) -> None:
        super().__init__(f"{application} ended with {returncode}:\n{log_tail}")
        self.application = application
        self.returncode = returncode
        self.log_tail = log_tail


class ServiceStuck(Exception):
    """The process did not become ready, or did not go away, in time."""

    def __init__(self, application: str, waited_s: float, log_tail: str) -> None:
        super().__init__(f"{application} is stuck after {waited_s:.0f} s:\n{log_tail}")
        self.application = application
        self.waited_s = waited_s
        self.log_tail = log_tail


class Port:
    """A loopback TCP port that stays ours while nothing listens on it.

    A bound socket that does not listen refuses connections as a free port does, keeps every other process
    from taking the port, and keeps clients that retry from connecting to themselves by chance. The service
    binds beside it thanks to SO_REUSEPORT.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: Final[int] = self._socket.getsockname()[1]

    def is_listened_on(self) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_TIMEOUT_S)
            return probe.connect_ex(("127.0.0.1", self.number)) == 0

    def release(self) -> None:
        self._socket.close()


class Service:
    """One gunicorn with one application. `stop` and `start` keep the port; `close` gives it back.

    States: stopped (as made) → `start` → running → `stop` or `kill` → stopped; `close` ends it for good.
    Every transition may be asked for twice.
    """

    def __init__(
        self,
        application: str,
        state: Path,
        *,
        environment: Mapping[str, str],
        ready_path: str = "/",
        workers: int = 2,
        threads: int = 8,
    ) -> None:
        self.application = application
        self.state = state
        self.log = state / "service.log"
        self._environment = dict(environment)
        self._ready_path = ready_path
        self._workers = workers
        self._threads = threads
        self._port = Port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        return self._port.number

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """gunicorn's first process, which is also the id of the process group."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and not _has_ended(self._process)

    def start(self) -> None:
        if self.running:
            return
        self._end_process()  # It may have died by itself, with its workers still about.
        self._process = _SPAWNER.submit(self._spawn).result()
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as an operator would: requests under way get a second to finish."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGTERM)  # Popen.terminate would reap it.
            poll_until(lambda: not self.running, _STOP_TIMEOUT_S)
        self._end_process()

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end_process()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.kill()  # Nobody is left to be polite to, and `stop` takes half a second.
        self._port.release()

    def log_tail(self) -> str:
        return tail_of(self.log)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.state.mkdir(parents=True, exist_ok=True)
        # Nothing on the command line: Keystone would take gunicorn's arguments for its own.
        arguments = ["--config", str(_GUNICORN_CONF), "--bind", f"127.0.0.1:{self.port}"]
        arguments += ["--workers", str(self._workers), "--threads", str(self._threads)]
        wishes = {
            "GUNICORN_CMD_ARGS": shlex.join(arguments),
            "CACHEFS_CLOUD_APPLICATION": self.application,
            "CACHEFS_CLOUD_PARENT": str(os.getpid()),
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gunicorn"],
                cwd=self.state,
                env=clean_environment() | self._environment | wishes,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        if not poll_until(lambda: _has_ended(process) or self._answers(), _START_TIMEOUT_S):
            raise ServiceStuck(self.application, _START_TIMEOUT_S, self.log_tail())
        if _has_ended(process):
            self._end_process()
            raise ServiceDied(self.application, process.returncode, self.log_tail())

    def _answers(self) -> bool:
        # gunicorn listens before its workers have loaded the application: the request waits for them.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", self._ready_path, headers={"Connection": "close"})
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _end_process(self) -> None:
        if self._process is None:
            return
        # Kill before reaping: until then the group's id cannot become somebody else's.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        # A dying worker still holds the listening socket, and would steal its successor's connections.
        if not poll_until(lambda: not self._port.is_listened_on(), _STOP_TIMEOUT_S):
            raise ServiceStuck(self.application, _STOP_TIMEOUT_S, self.log_tail())


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended, without reaping it, so that its id stays its own."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def poll_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """What to wait for is in another process, so there is nothing to wait *on*."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_INTERVAL_S)
    return True


def tail_of(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as lines:
        lines.seek(max(0, lines.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return lines.read().decode(errors="replace")


def clean_environment() -> dict[str, str]:
    """Our environment without what would change how a service behaves."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name.lower() not in _FOREIGN_NAMES
    }
    return inherited | {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}


def run_tool(command: list[str], log: Path) -> None:
    """Run a service's own set-up command to its end."""
    with log.open("ab") as out:
        done = subprocess.run(
            command,
            check=False,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=_START_TIMEOUT_S,
        )
    if done.returncode != 0:
        raise ServiceDied(shlex.join(command), done.returncode, tail_of(log))
