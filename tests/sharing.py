"""How processes share the tests (`-n` of pytest-xdist). Rule: nothing is started twice where once is enough.

A file is one process's, and so is everything that stands on the session's Glance or Keystone.
"""

from __future__ import annotations

from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling

# Fixtures that start what takes seconds, for the whole session; and all who use one, by what their ids begin with.
OF_THE_SESSION: Final = {"glance", "keystone_cloud"}
TOGETHER: Final = (
    "tests/test_cloud.py",
    "tests/test_examples.py",
    "tests/test_glance_source.py",
    "tests/test_mount_nova.py::test_a_base",
    "tests/test_mount_precache.py",
    "tests/test_mount_raw.py::test_with_a_real_glance",
    "tests/test_nova_itself.py",
    "tests/test_outages.py",
    "tests/test_package.py",
    "tests/test_request_ids.py",
    "tests/test_secrets.py",
)
# Begun first, whatever else there is: what is short fills the gaps at the end.
LONGEST: Final = ("test_outages", "test_bad_disk", "test_mount_raw", "test_guest", "test_demo", "test_mount_life")


def unit_of(test: str) -> str:
    """Tests with the same answer are one process's."""
    return "cloud" if test.startswith(TOGETHER) else test.partition("::")[0]


class Sharing(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types.
    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """The order of files otherwise stays what it is, and that of tests in a file."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
