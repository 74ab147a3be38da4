"""gunicorn's configuration. Rule: what all services share is here, what differs is in the environment.

gunicorn runs this file in its first process, so this is also where that process ties its life to ours.
"""

import ctypes
import os
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # It ended before the kernel knew that we care.
        os.kill(os.getpid(), signal.SIGKILL)


_die_with(int(os.environ["CACHEFS_CLOUD_PARENT"]))


def post_fork(server: Any, worker: Any) -> None:
    _die_with(server.pid)  # The kernel clears the wish in a forked child.


wsgi_app = os.environ["CACHEFS_CLOUD_APPLICATION"]
worker_class = "gthread"
reuse_port = True  # The port's reservation is another socket on it: see `service.Port`.
keepalive = 5  # Seconds, as Apache's default: gunicorn's own 2 makes idle pools look broken.
graceful_timeout = 1
timeout = 120  # Seconds: a loaded test machine is no reason to kill a worker.
control_socket_disable = True  # Its default path is one for the whole account.
