"""What is secret in a configuration, and any text without it. Rule: what is not known to be harmless is hidden.

The values themselves are looked for, however they came into the text, and then whatever looks like a secret.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
# Shorter ones would be found in every other word; where a name says that it is one, 3 will do.
VALUE_MIN, NAMED_MIN = 8, 3

_SECRET_NAME = re.compile(r"pass|secret|token|otp|assertion|private|api_?key", re.IGNORECASE)
_LOOKS = (
    (re.compile(r"gAAAA[\w-]{20,}={0,2}"), HIDDEN),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{HIDDEN}@"),
    (
        re.compile(r"""((?:password|passcode|secret|[-_]token)["']?\s*[:=]\s*["']?)[^\s"',}]+""", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
)
_IN_YAML = re.compile(r"""([\w-]+)["']?\s*:\s*("[^"]*"|'[^']*'|[^\s,}#][^,}#\n]*)""")
_OPTION = re.compile(r"([^\s\[#;=:][^=:]*?)\s*[=:]\s*(.*)")


def is_secret(name: str) -> bool:
    """By the name of an option alone."""
    return _SECRET_NAME.search(name) is not None


class Hiding:
    """Takes secrets out of texts, once it was told of them."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def know(self, value: str, least: int = NAMED_MIN) -> None:
        """`value` is secret."""
        bare = value.strip()
        for text in {bare, bare.strip("\"'"), bare.replace("$$", "$")}:
            if len(text) >= least:
                self._values |= {text, json.dumps(text)[1:-1], quote(text), quote(text, safe=""), repr(text)[1:-1]}

    def know_environment(self, environment: Mapping[str, str]) -> None:
        for name, value in environment.items():
            if is_secret(name):
                self.know(value)

    def know_clouds(self, text: str) -> None:
        """Of a clouds.yaml or secure.yaml."""
        for found in _IN_YAML.finditer(text):
            if is_secret(found[1]):
                self.know(found[2])
        for name, value in _leaves(_parsed(text)):
            if is_secret(name):
                self.know(value)

    def config(self, text: str, plain: Collection[tuple[str, str]]) -> str:
        """A configuration file without comments; values of options (section, name) that are not `plain` are
        hidden, and known from now on."""
        shown: list[str] = []
        section, hides, least = "DEFAULT", True, VALUE_MIN
        for line in text.splitlines():
            bare = line.strip()
            if not bare or bare[0] in "#;":
                continue
            if line[0].isspace():  # The last option's value goes on.
                if hides:
                    self.know(bare, least)
                shown.append(f"    {HIDDEN if hides else bare}")
            elif bare[0] == "[":
                section, hides = bare.strip("[]"), True
                section = section if section == "DEFAULT" else section.lower()
                shown.append(f"[{section}]")
            elif option := _OPTION.fullmatch(bare):
                name, value = option.groups()
                hides = (section, name) not in plain or is_secret(name)
                least = NAMED_MIN if is_secret(name) else VALUE_MIN
                if hides:
                    self.know(value, least)
                    self.know(value.partition("=")[2], least)  # What a plug-in's option has within it.
                shown.append(f"{name} = {HIDDEN if hides else value}")
            else:
                hides = True
                shown.append("(a line that is no option)")
        return "\n".join(shown)

    def clean(self, text: str) -> str:
        """The text without what is known, and without what looks like a secret."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        for looks, instead in _LOOKS:
            text = looks.sub(instead, text)
        return text


def _parsed(text: str) -> Any:
    try:
        import yaml  # Comes with openstacksdk, which reads these files.

        return yaml.safe_load(text)
    except Exception:  # noqa: BLE001  # Broken YAML was looked through line by line.
        return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, str(key) if not is_secret(name) else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    elif value is not None:
        yield name, str(value)


def cloud_files(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The files that openstacksdk takes credentials from, as far as they are there."""
    named = [environment.get("OS_CLIENT_CONFIG_FILE"), environment.get("OS_CLIENT_SECURE_FILE")]
    folders = [Path.cwd(), Path(os.path.expanduser("~/.config/openstack")), Path("/etc/openstack")]
    found = [Path(path) for path in named if path]
    found += [folder / f"{name}.yaml" for folder in folders for name in ("clouds", "secure")]
    return [path for path in dict.fromkeys(found) if _is_file(path)]


def _is_file(path: Path) -> bool:
    """Not for who may not look: the home of another account, as under sudo."""
    try:
        return path.is_file()
    except OSError:
        return False


def readable_by_all(paths: Iterable[Path]) -> list[Path]:
    """Those that everybody on this node may read."""
    found = []
    for path in paths:
        try:
            if path.stat().st_mode & 0o004:
                found.append(path)
        except OSError:
            pass
    return found
