"""What systemd is told, where it cannot be told."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

WITHOUT_DESCRIPTORS: Final = """
import os, resource
from cachefs.notify import notify
os.environ["NOTIFY_SOCKET"] = "@nobody"
resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
notify(STATUS="x")
os.write(1, b"went on")
"""


def test_a_process_without_descriptors_goes_on() -> None:
    command = [sys.executable, "-c", WITHOUT_DESCRIPTORS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "went on", done.stderr
