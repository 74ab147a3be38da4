"""Fixtures that more than one test file needs. Rule: a fixture that starts something ends it, whatever failed.

Nothing starts before a test asks for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import Scheduling

from tests import sharing
from tests.cloud import Glance, Keystone
from tests.node import missing_for_loops, missing_for_mounts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this machine cannot do is skipped, and the reason names what it lacks."""
    for marker, lacking in (("mount", missing_for_mounts()), ("loop", missing_for_loops())):
        for item in items:
            if lacking is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=lacking))
    sharing.longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return sharing.Sharing(config, log)


@dataclass(frozen=True)
class KeystoneCloud:
    """A Keystone, and a Glance that asks it about every token."""

    keystone: Keystone
    glance: Glance


@contextmanager
def _bytes_dropped_from(state: Path) -> Iterator[Path]:
    # pytest keeps the folders of its last runs: logs are worth keeping, images are not.
    try:
        yield state
    finally:
        shutil.rmtree(state / "images", ignore_errors=True)


@pytest.fixture(scope="session")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Glance]:
    """The session's Glance, without a Keystone. It is everybody's: do not stop it, nor count its images."""
    with _bytes_dropped_from(tmp_path_factory.mktemp("glance")) as state, Glance(state) as running:
        yield running


@pytest.fixture
def private_glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Glance]:
    """One test's own Glance, to stop, kill and start again."""
    with _bytes_dropped_from(tmp_path_factory.mktemp("glance")) as state, Glance(state) as running:
        yield running


@pytest.fixture(scope="session")
def keystone_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeystoneCloud]:
    """The session's Keystone and a Glance behind it. They are everybody's, too: do not stop them."""
    with (
        Keystone(tmp_path_factory.mktemp("keystone")) as keystone,
        _bytes_dropped_from(tmp_path_factory.mktemp("glance")) as state,
        Glance(state, keystone=keystone) as running,
    ):
        yield KeystoneCloud(keystone, running)
