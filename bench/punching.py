"""A process of its own that gives a segment's bytes back, hole by hole, as fast as it is told to: what eviction
asks of the filesystem, and nothing else. `python -m bench.punching FOLDER HOLE_BYTES BYTES_PER_SECOND`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from cachefs.store.format import Punch, SegmentNo
from cachefs.store.segments import Segments

SEGMENT = SegmentNo(1)


def beside(folder: Path, hole: int, rate: float) -> None:
    """Returns when all of the segment in `folder` is given back. `rate` in bytes per second."""
    subprocess.run([sys.executable, "-m", __name__, str(folder), str(hole), str(rate)], check=True)


def punch(folder: Path, hole: int, rate: float) -> None:
    """Each hole with one call, and never ahead of `rate`."""
    segments = Segments(folder)
    segments.open(SEGMENT)
    try:
        began_s = time.monotonic()
        for offset in range(0, segments.size(SEGMENT), hole):
            segments.punch(Punch(SEGMENT, offset, hole))
            ahead_s = began_s + (offset + hole) / rate - time.monotonic()
            if ahead_s > 0:
                time.sleep(ahead_s)
    finally:
        segments.close()


if __name__ == "__main__":
    punch(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
