"""The `cachefs` command without its start: a process that has imported all of it, and forks for each call. Rule: a
call has its caller's words, folder, input and outputs, and ends with the status that the command would.

    with WarmCommand(folder) as command:
        subprocess.run([command.program, "status", "--config-file", ...])

Half a second of imports for each of some fifty examples is half a minute.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.cloud.service import clean_environment

ROOT: Final = Path(__file__).parent.parent

_CALLER: Final = """\
#!{python} -SE
import json, os, socket, sys
asking = socket.socket(socket.AF_UNIX)
asking.connect({path!r})
socket.send_fds(asking, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
asking.shutdown(socket.SHUT_WR)
sys.exit(int(asking.recv(16) or b"70"))
"""


class WarmCommand:
    """`program` can be run while this is entered."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "cachefs"
        self._socket = folder / "warm.sock"

    def __enter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._socket))
        listener.listen()
        with listener:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", __name__, str(listener.fileno())],
                cwd=ROOT, env=clean_environment(), pass_fds=[listener.fileno()],
            )  # fmt: skip
        self.program.write_text(_CALLER.format(python=sys.executable, path=str(self._socket)))
        self.program.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.unlink()


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for them: the caller hears of the end itself.
    while True:
        connection, _ = listener.accept()
        with connection:
            message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _call(connection, fds, *json.loads(message))
            for fd in fds:
                os.close(fd)


def _call(connection: socket.socket, fds: list[int], folder: str, words: list[str]) -> None:
    status = 70
    try:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.chdir(folder)
        status = cli.main(words)
        sys.stdout.flush()
    except SystemExit as end:  # argparse's.
        status = int(end.code or 0)
    finally:
        connection.send(str(status).encode())
        os._exit(status)


if __name__ == "__main__":
    # Whatever a command imports on its way.
    from cachefs import cli, completion, config, doctor, report, top, trace_cli  # noqa: F401
    from cachefs.store import check, recover  # noqa: F401

    _serve(socket.socket(fileno=int(sys.argv[1])))
