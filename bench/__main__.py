"""argv → benchmarks → one table. Rule: it measures and never judges: the exit status tells only whether all could
run. 0 all ran, 1 one could not, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from bench import (
    big_index,
    boot,
    cold_4k,
    evict,
    first_read,
    herd,
    hydration,
    layouts,
    many_images,
    memory,
    metrics,
    random_cold,
    raw,
    scrub,
    sequential_cold,
    start,
    status_outage,
    warm,
)
from bench.lab import Lab
from bench.table import Row, table

BENCHMARKS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "cold-4k": cold_4k.run,
    "random-cold": random_cold.run,
    "herd": herd.run,
    "sequential-cold": sequential_cold.run,
    "warm": warm.run,
    "many-images": many_images.run,
    "memory": memory.run,
    "layouts": layouts.run,
    "big-index": big_index.run,
    "evict": evict.run,
    "scrub": scrub.run,
    "first-read": first_read.run,
    "metrics": metrics.run,
    "start": start.run,
    "status-outage": status_outage.run,
    "raw-first": raw.first,
    "raw-sequential": raw.sequential,
    "raw-warm": raw.warm,
    "boot-cold": boot.cold,
    "boot-trace": boot.traced,
    "boot-four": boot.four,
    "boot-qcow2": boot.packed,
    "hydration": hydration.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures cachefs on this machine.")
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and samples there, too")
    parser.add_argument("--quick", action="store_true", help="smaller images, fewer repetitions")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on a real disk: %(default)s")  # noqa: S108
    arguments = parser.parse_args()
    unknown = [name for name in arguments.name if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, _interrupt)  # So that everything is cleaned up.
    rows: list[Row] = []
    failed = []
    with Lab(arguments.dir, arguments.quick) as lab:
        for name in arguments.name or BENCHMARKS:
            lab.say(name)
            try:
                for row in BENCHMARKS[name](lab):
                    lab.say(" | ".join(row.cells()))
                    rows.append(row)
            except Exception:  # noqa: BLE001  # The others can still run.
                traceback.print_exc()
                failed.append(name)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=1))
    if failed:
        print(f"could not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
