"""A commented cachefs.conf with every option and its default. Rule: what it says of an option is the option's own
text; only the order and the first lines are from here.
"""

from __future__ import annotations

import io
import re
from typing import Final

from oslo_config import cfg, generator

from cachefs import __version__
from cachefs.asking import DEFAULT_FILE

# What one needs most comes first; oslo.log's many options last.
_ORDER: Final = (
    "glance", "store", "mount", "nova", "hydration", "leases", "precache", "priorities", "trace", "scrub",
    "metrics", "control", "convert", "DEFAULT",
)  # fmt: skip


def sample() -> str:
    """A commented file with every option and its default."""
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(
        ["--namespace", "cachefs", "--namespace", "oslo.log", "--wrap-width", "100"],
        project="cachefs",
        default_config_files=[],
        default_config_dirs=[],
    )
    text = io.StringIO()
    generator.generate(conf, text)
    parts = re.split(r"^(?=\[\w+\]$)", text.getvalue(), flags=re.MULTILINE)
    known = {part.partition("]")[0][1:]: part.strip() for part in parts if part.strip()}
    ordered = [known.pop(section) for section in _ORDER] + list(known.values())
    head = (
        f"# {DEFAULT_FILE}: the configuration of cachefs {__version__}.\n"
        "# Only [glance] is needed; look at [store] max_size. Mode 0600, or 0640 for the daemon's group: it\n"
        "# has a secret. `cachefs config check` names what is wrong, `cachefs doctor` tries it.\n"
    )
    return "\n\n\n".join([head, *ordered]) + "\n"
