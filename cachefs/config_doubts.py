"""What is hardly meant in a configuration that stops no start. Rule: a line names the option or the file, and what
to do; never a value that may be a secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from cachefs import config
from cachefs.config_files import files_read, lines_of
from cachefs.errors import ConfigError
from cachefs.hiding import cloud_files, is_secret, readable_by_all
from cachefs.policies import NAMESPACE
from cachefs.sources import auth
from cachefs.words import size

SMALL_STORE: Final = 1 << 30


def warnings(files: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """One line each. Of files that stop a start, only what everybody may read."""
    found = list(_secrets_for_all(files_read(files, config_dirs)))
    try:
        loaded = config.load(files, config_dirs, {})
    except ConfigError:
        return found
    most = loaded.store.max_size
    if not most.is_percent and most.of(0) < SMALL_STORE:
        found.append(
            f"store/max_size: {size(most.of(0))} is less than most images have: hardly anything stays cached "
            "(write 200G for GiB, or 80%)"
        )
    if loaded.glance.auth.verify is False:
        found.append("glance/insecure: whoever is between this node and Glance can give it other bytes")
    nova, mount = loaded.nova, loaded.mount
    if nova.enabled and not mount.allow_other and nova.uid not in (0, os.geteuid()):
        found.append(
            f"mount/allow_other: is off, so Nova (user {nova.uid}) cannot look into nova/ (set it, or "
            "nova/enabled = false)"
        )
    installed = sorted(policy.name for policy in entry_points(group=NAMESPACE))
    for name in loaded.precache.policies:
        if name not in installed:
            found.append(f"precache/policies: {name} is not installed (there are {', '.join(installed)})")
    return found


def _secrets_for_all(paths: Iterable[str]) -> Iterator[str]:
    """Files with a secret that everybody may read."""
    clouds = False
    for path in paths:
        names = [line.name for line in lines_of(path, []) if line.section == auth.GROUP and line.name is not None]
        clouds = clouds or "cloud" in names
        secrets = [name for name in names if is_secret(name)]
        if secrets and readable_by_all([Path(path)]):
            yield f"{path}: everybody on this node can read {secrets[0]}: chmod 0600 {path} (0640 for a group)"
    for file in readable_by_all(cloud_files()) if clouds else ():
        yield f"{file}: everybody on this node can read its credentials: chmod 0600 {file}"
