"""The daemon with less patience with the store's disk, for tests that see that patience end. Rule: only how
long it waits is other than in earnest; `tests/test_health.py` has the times themselves.

    python -m tests.impatient mount --config-file FILE
"""

from __future__ import annotations

import argparse
from typing import Final

from cachefs import config, daemon
from cachefs.store.health import Patience

# A loaded machine gives what a healthy disk has in this time, too.
PATIENCE: Final = Patience(
    read_s=3.0,
    read_degraded_s=0.5,
    write_s=10.0,
    landing_s=4.0,
    probe_every_s=0.5,
    probe_down_every_s=3.0,
    probe_s=3.0,
    stop_s=5.0,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["mount"])
    parser.add_argument("--config-file", required=True)
    loaded = config.load([parser.parse_args().config_file], [], {})
    loaded.log.start()
    daemon.run(loaded, PATIENCE)


if __name__ == "__main__":
    main()
