"""Processes that share the tests start nothing twice. What is asked is asked of the tests that were collected."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharing import LONGEST, OF_THE_SESSION, TOGETHER, unit_of


def test_who_stands_on_the_sessions_glance_is_in_the_process_that_has_it(request: pytest.FixtureRequest) -> None:
    users = [
        item.nodeid for item in request.session.items if OF_THE_SESSION & set(getattr(item, "fixturenames", ()))
    ]
    assert [user for user in users if not user.startswith(TOGETHER)] == []
    assert len({unit_of(user) for user in users}) <= 1


def test_what_is_named_is_there() -> None:
    root = Path(__file__).parent.parent
    names = {name.partition("::")[0] for name in TOGETHER} | {f"tests/{name}.py" for name in LONGEST}
    assert [name for name in sorted(names) if not (root / name).exists()] == []
