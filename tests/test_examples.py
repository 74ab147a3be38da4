"""Every command that the documents show is run, as it stands there, beside a real Glance and a real mount.

A block marked `sh` is a script; in one marked `console` a line after `$` is a command, and what follows is what it
prints: the same headings and keys have to come. The examples of `--help` are in docs/man/cachefs.8.md, so they are
run as well.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from cachefs import cli
from docs.reference import DOCS, commands, examples
from tests.cloud import Glance
from tests.cloud.service import clean_environment, poll_until
from tests.node import ROOT, Node, read_direct
from tests.origin import pattern
from tests.warm_command import WarmCommand

MIB: Final = 1 << 20
SIZE: Final = 8 * MIB
COMMANDS: Final = dict(commands(cli.parser()))
DOCUMENTS: Final = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# By document and first line: what is not run here, and why.
ELSEWHERE: Final = {
    ("docs/quickstart.md", "make demo"): "tests/test_demo.py runs it",
    (
        "docs/quickstart.md",
        f"make deb{'':38}# dist/cachefs_<version>_<arch>.deb; takes some minutes",
    ): "tests/test_package.py builds it and installs it",
    (
        "docs/quickstart.md",
        "git clone <this repository> /opt/cachefs && cd /opt/cachefs",
    ): "installs packages, by apt",
    ("docs/quickstart.md", "openstack application credential create cachefs"): "takes a Keystone, and its client",
    ("docs/quickstart.md", "mkdir -p /mnt/cachefs"): "takes systemd, and this machine's own mountpoint",
    (
        "docs/quickstart.md",
        "systemctl disable --now cachefs",
    ): "takes systemd, and removes this machine's own store",
    (
        "docs/operations.md",
        "mount -t fusectl fusectl /sys/fs/fuse/connections",
    ): "sets limits of this machine's kernel",
    ("docs/man/cachefs.8.md", "cachefs mount /mnt/cachefs"): "does not return: each node of the tests is one",
}


@dataclass(frozen=True)
class Block:
    """`kind` is the word behind the backticks."""

    document: str
    kind: str
    text: str

    @property
    def name(self) -> tuple[str, str]:
        return self.document, self.text.splitlines()[0]

    @property
    def wants_store(self) -> bool:
        return re.search(r"\bcachefs check\b", self.text) is not None

    def steps(self) -> list[tuple[str, list[str]]]:
        """Scripts, each with what it is said to print."""
        if self.kind == "sh":
            return [(self.text, [])]
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith(("$ ", "# ")):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found


def blocks() -> list[Block]:
    return [
        Block(str(path.relative_to(ROOT)), kind, text)
        for path in DOCUMENTS
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    ]


EXAMPLES: Final = [block for block in blocks() if block.kind in ("sh", "console")]
# Those that want the store for themselves come last.
HERE: Final = sorted(
    dict.fromkeys(block for block in EXAMPLES if block.name not in ELSEWHERE), key=lambda block: block.wants_store
)


# ── A node to run them on ─────────────────────────────────────────────────────────────────────────────


class Place:
    """What the documents name, by what this machine has in its place."""

    def __init__(self, folder: Path, node: Node, image: str, command: Path) -> None:
        self.folder, self.node, self.image = folder, node, image
        for name in ("bin", "work", "tmp", "etc/bash_completion.d", "etc/cachefs"):
            (folder / name).mkdir(parents=True)
        program = folder / "bin" / "cachefs"
        program.write_text(
            "#!/bin/sh\n"
            'case "$1 $2" in "config sample" | completion*) set -- "$@" ;; '
            f'*) set -- "$@" --config-file {node.config_file} ;; esac\n'
            f'exec {command} "$@"\n'
        )
        program.chmod(0o755)

    def begin(self, block: Block) -> None:
        """As every example finds it: something of the image is here and nothing keeps it; no daemon, where none is
        to be."""
        if block.wants_store:
            if self.node.mounted:
                self.node.stop()
        else:
            self.node.ask("unpin", images=[self.image])
            read_direct(self.node.path(self.image), 0, MIB)

    def here(self, script: str) -> str:
        """The script, with the names of this place."""
        for said, meant in (
            (r"\bID\b|<uuid>|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", self.image),
            (r"(?<![\w./])/(etc|tmp)/", rf"{self.folder}/\1/"),
            (r"(?<![\w./])/mnt/cachefs\b", str(self.node.mountpoint)),
            (r"(?<![\w./])/var/lib/cachefs\b", str(self.node.store)),
        ):
            script = re.sub(said, meant, script)
        return script

    def run(self, script: str) -> str:
        """What it prints. It has to succeed."""
        environment = clean_environment()
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(script)],
            cwd=self.folder / "work", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def place(glance: Glance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("examples")
    image = glance.upload("debian-13", pattern(SIZE, 1)(0, SIZE))
    node = Node(folder, glance.endpoint)
    node.configure(trace={"seconds": 0.2}, precache={"policies": "static", "static_images": image})
    with WarmCommand(folder) as command, node:
        read_direct(node.path(image), 0, MIB)
        assert poll_until(lambda: bool(node.ask("trace-list")), 30)
        yield Place(folder, node, image, command.program)


@pytest.mark.cloud
@pytest.mark.mount
@pytest.mark.parametrize("block", HERE, ids=lambda block: ": ".join(block.name))
def test_an_example_does_what_is_shown(block: Block, place: Place) -> None:
    place.begin(block)
    for script, shown in block.steps():
        said = place.run(script)
        assert labels(shown) <= labels(said.splitlines()), said


def labels(lines: list[str]) -> set[str]:
    """What stays the same of an output: the first column, and the headings of tables."""
    found = set()
    for line in lines:
        found.update(re.findall(r"\b[A-Z]{2,}\b", line) if line.isupper() else [])
        label = re.split(r"  +|: ", re.sub(r"^(ok|warning) +", "", line.strip()))[0]
        if label and not re.search(r"\d|\.\.\.", label):
            found.add(label)
    return found


# ── That nothing is left out ──────────────────────────────────────────────────────────────────────────


def test_what_is_said_to_be_run_elsewhere_is_there() -> None:
    assert set(ELSEWHERE) <= {block.name for block in EXAMPLES}


def test_the_examples_of_help_are_among_them() -> None:
    shown = {block.text.strip() for block in EXAMPLES}
    for words, parser in COMMANDS.items():
        (example,) = examples(parser)
        assert f"{example} ".startswith(f"cachefs {words} ")
        assert example in shown


def words_of(line: str) -> list[str] | None:
    """A command of cachefs and its words; None where the line is none."""
    match = re.match(r"(?:[$#] +)?cachefs +((?:-|[a-z]).*)", line)
    names = {name.split()[0] for name in COMMANDS}
    words = re.sub(r"[\[\]()]|\.\.\.", " ", match[1].partition("#")[0]).split() if match else []
    return words if words and (words[0] in names or words[0].startswith("--")) else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_looks_like_a_command_is_one(document: Path) -> None:
    """Each block with a command is marked as an example. Each command in the text has a name and options that
    are."""
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    text = document.read_text()
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind not in ("sh", "console"):
            assert not any(words_of(line) for line in block.splitlines()), f"not marked: {block}"
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        words = words_of(code)
        if words is None or words[0].startswith("--") or (words == words[:1] and words[0] in groups):
            continue
        name = " ".join(words[:2] if words[0] in groups else words[:1])
        spelled = {word for action in COMMANDS[name]._actions for word in action.option_strings}
        assert {word for word in words if word.startswith("-")} <= spelled | {"-"}, code
