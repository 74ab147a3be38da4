"""Plug-ins as they are installed: the package of docs/precaching.md, and some that break in every way. One process
of its own loads them all, from a folder with what pip would have put there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs import config
from cachefs.policies import NAMESPACE, Decision, Image, Node
from tests.cloud.service import clean_environment

ROOT: Final = Path(__file__).parent.parent

BROKEN: Final = """
import sys, time
from cachefs.policies import Decision, Keep

class Options:
    def __init__(self, options):
        raise KeyError("teams")

class Base:
    def __init__(self, options):
        pass

class Raises(Base):
    def decide(self, node):
        return [1 / 0]

class RaisesLate(Base):
    def decide(self, node):
        yield Decision(node.images[0].id, Keep.HOLD, "r")
        raise RuntimeError("second\\nthought\\x1b[2J")

class Exits(Base):
    def decide(self, node):
        sys.exit("no more")

class Interrupts(Base):
    def decide(self, node):
        raise KeyboardInterrupt

class NoList(Base):
    def decide(self, node):
        return None

class Texts(Base):
    def decide(self, node):
        return ["hold it"]

class Types(Base):
    def decide(self, node):
        return [Decision(node.images[0].id, "hold", "r")]

class Endless(Base):
    def decide(self, node):
        while True:
            yield Decision("x", Keep.HOLD, "r")

class Sleeps(Base):
    def decide(self, node):
        time.sleep(1000)

class Changes(Base):
    def decide(self, node):
        node.images[0].properties["x"] = "y"

class Dirty(Base):
    def decide(self, node):
        return [Decision(node.images[0].id.upper(), Keep.HOLD, "a\\x1b[31m\\n" + "b" * 1000)]

no_policy = object
"""

SCRIPT: Final = """
import json, sys, trio
from types import MappingProxyType
from cachefs.policies import Image, Node
from cachefs.policy_host import PolicyFailed, PolicyHost

DAY_S = 86400

def image(n, team, age_days, opens=0.0):
    return Image(
        id=f"abcdef00-0000-4000-8000-00000000000{n}", name=f"image {n}", size=1, disk_format="raw", owner="o",
        visibility="public", hidden=False, tags=frozenset(), properties=MappingProxyType({"cachefs_team": team}),
        created_s=(1000 - age_days) * DAY_S, updated_s=0, trusted=True, priority="normal", cached=0, used_s=0,
        opens=opens, leased=False, pinned=False, held=False,
    )

images = image(1, "blue", 3), image(2, "red", 1), image(3, "green", 2, 5.0), image(4, "blue", 99)
node = Node(images, 1000 * DAY_S, 1)

async def main():
    answers = {}
    for name, options, limit_s in json.load(sys.stdin):
        host = PolicyHost(name, options, limit_s)
        answers[name] = []
        for _ in range(2):
            try:
                said = [[d.image, d.keep, d.reason, d.owners_word] for d in await host.ask(node)]
            except PolicyFailed as error:
                said = str(error)
            answers[name].append(said)
    json.dump(answers, sys.stdout)

trio.run(main)
"""


def documented() -> tuple[str, str]:
    """The example's pyproject.toml and module."""
    said = (ROOT / "docs" / "precaching.md").read_text()
    (project,) = re.findall(r"```toml\n(.*?)```", said, re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?)```", said, re.DOTALL)
    return project, module


@pytest.mark.parametrize("number", range(2))
def test_the_configurations_of_the_documentation_are_sound(number: int, tmp_path: Path) -> None:
    said = (ROOT / "docs" / "precaching.md").read_text()
    found = re.findall(r"```(?:ini)?\n(\[precache\].*?)```", said, re.DOTALL)
    assert len(found) == 2
    file = tmp_path / "cachefs.conf"
    file.write_text("[glance]\nauth_type = none\nendpoints = http://127.0.0.1:9292\n" + found[number])
    assert config.check([str(file)]) == []


def test_every_field_that_a_policy_sees_or_says_is_documented() -> None:
    said = (ROOT / "docs" / "precaching.md").read_text()
    for kind in (Image, Node, Decision):
        for field in fields(kind):
            assert f"`{field.name}`" in said, field.name


def install(folder: Path, project: dict[str, Any], modules: dict[str, str]) -> None:
    """What `pip install --target folder` leaves of a package of modules, without building it."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{point} = {where}" for point, where in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("site")
    text, module = documented()
    example = tomllib.loads(text)
    (module_name,) = example["tool"]["setuptools"]["py-modules"]
    install(folder, example["project"], {module_name: module})
    classes = re.findall(r"^class (\w+)\(Base\)", BROKEN, re.MULTILINE)
    points = {name.lower(): f"broken:{name}" for name in classes}
    points |= {"options": "broken:Options", "absent": "broken:Absent", "unimportable": "unimportable:X",
               "nopolicy": "broken:no_policy", "twice": "broken:Raises"}  # fmt: skip
    broken = {"name": "broken", "version": "1", "entry-points": {NAMESPACE: points}}
    install(folder, broken, {"broken": BROKEN, "unimportable": "import nothing_of_that_name\n"})
    again = {"name": "again", "version": "1", "entry-points": {NAMESPACE: {"twice": "broken:Texts"}}}
    install(folder, again, {})
    asked = [("team", {"teams": "blue green", "days": "14"}, 30.0), ("nosuch", {}, 30.0)]
    asked += [(name, {}, 0.3 if name == "sleeps" else 30.0) for name in points]
    environment = clean_environment() | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(asked), env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


def test_the_package_of_the_documentation_works_as_it_says(answers: dict[str, list[Any]]) -> None:
    green = ["abcdef00-0000-4000-8000-000000000003", "hold and pin", "of team green", True]
    blue = ["abcdef00-0000-4000-8000-000000000001", "hold", "of team blue", True]
    assert answers["team"] == [[green, blue]] * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "nosuch",
            "LookupError: nothing that is installed has an entry point nosuch in cachefs.precache.policies",
        ),
        ("twice", "LookupError: 2 entry points in cachefs.precache.policies have the name twice"),
        ("unimportable", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("absent", "AttributeError: module 'broken' has no attribute 'Absent'"),
        ("nopolicy", "TypeError: object() takes no arguments"),
        ("options", "KeyError: 'teams'"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("raiseslate", "RuntimeError: second�thought�[2J"),
        ("exits", "SystemExit: no more"),
        ("interrupts", "KeyboardInterrupt: "),
        ("nolist", "TypeError: 'NoneType' object is not iterable"),
        ("texts", "TypeError: it answered with 'hold it', which is no Decision"),
        ("endless", "ValueError: it answered with more than 10000 decisions"),
        ("changes", "TypeError: 'mappingproxy' object does not support item assignment"),
    ],
)
def test_whatever_a_plug_in_does_is_told_in_words(answers: dict[str, list[Any]], name: str, why: str) -> None:
    assert answers[name] == [why, why]


def test_fields_of_other_types_are_no_decision(answers: dict[str, list[Any]]) -> None:
    assert answers["types"][0].startswith("TypeError: it answered with Decision(image='abcdef00-")


def test_one_that_does_not_come_back_is_left_behind_and_not_asked_again(answers: dict[str, list[Any]]) -> None:
    assert answers["sleeps"] == [
        "no answer within 0.3 s",
        "it has not come back from an earlier time that it was asked",
    ]


def test_what_is_answered_is_cleaned(answers: dict[str, list[Any]]) -> None:
    ((image, keep, reason, owners_word),) = answers["dirty"][0]
    assert (image, keep, owners_word) == ("abcdef00-0000-4000-8000-000000000001", "hold", False)
    assert reason == "a�[31m�" + "b" * 193
