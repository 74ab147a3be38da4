"""What the documents say of the code is so, and the rules of the source are kept. Rule: read from the files, so
that neither can change without the other.
"""

from __future__ import annotations

import ast
import errno
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from cachefs import cli, config, errors, mount_helper
from cachefs.options import list_opts, log_options
from cachefs.store import format as f
from docs import reference

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"
PACKAGE: Final = ROOT / "cachefs"

# Where a library may be imported: everything else goes through these modules.
IMPORTERS: Final = {
    "pyfuse3": {"cachefs.fuse"},
    "lmdb": {"cachefs.store.index"},
    "glanceclient": {"cachefs.sources.glance"},
    "keystoneauth1": {"cachefs.sources.auth", "cachefs.sources.glance"},
    "openstack": {"cachefs.sources.auth"},
    "prometheus_client": {"cachefs.metrics"},
    "requests": {"cachefs.sources.glance"},
    "oslo_utils": {"cachefs.formats.first_line"},
    "stevedore": {"cachefs.policy_host"},
    "zstandard": {"cachefs.formats.decompress"},
    "isal": {"cachefs.formats.decompress"},
    "oslo_config": {
        *("cachefs.config", "cachefs.config_files", "cachefs.config_sample"),
        *("cachefs.options", "cachefs.option_types", "cachefs.sources.auth"),
    },
}
PURE: Final = (
    {"cachefs.errors", "cachefs.words", "cachefs.histogram", "cachefs.sources.circuit"}
    | {"cachefs.namespace", "cachefs.store.format", "cachefs.store.recipe", "cachefs.policies"}
    | {f"cachefs.policies.{path.stem}" for path in (PACKAGE / "policies").glob("[!_]*.py")}
    | {f"cachefs.plan.{path.stem}" for path in (PACKAGE / "plan").glob("[!_]*.py")}
    | {
        f"cachefs.formats.{path.stem}"
        for path in (PACKAGE / "formats").glob("[!_]*.py")
        if path.stem not in ("first_line", "inspection", "decompress")  # They call oslo.utils, and zstandard.
    }
)
# Of the standard library, what would make a pure module depend on more than its arguments.
IMPURE: Final = {
    "asyncio",
    "io",
    "os",
    "pathlib",
    "random",
    "select",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES: Final = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES: Final = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported at run time, wherever that is said."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports are absolute"
            yield node.module
        yield from imports(node)


def text(name: str) -> str:
    return (DOCS / name).read_text()


# ── The rules of the source ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    found = {
        name for name, tree in TREES.items() if any(module.split(".")[0] == library for module in imports(tree))
    }
    assert found == IMPORTERS[library]


@pytest.mark.parametrize("module", sorted(PURE))
def test_a_pure_module_is_pure(module: str) -> None:
    tree = TREES[module]
    for found in imports(tree):
        root = found.split(".")[0]
        allowed = found in PURE or root == "xxhash" or (root in sys.stdlib_module_names and root not in IMPURE)
        assert allowed, f"{module} imports {found}"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{module} awaits"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{module} calls {node.func.id}"


@pytest.mark.parametrize("module", sorted(name for name, tree in TREES.items() if tree.body))
def test_a_module_begins_with_its_rule(module: str) -> None:
    if module in ("cachefs", "cachefs.store"):
        return  # Signposts: what is in them has its own.
    if module == "cachefs.errors":
        return  # Its rule is its first paragraph.
    docstring = ast.get_docstring(TREES[module]) or ""
    assert re.search(r"\bRule: \w", docstring), f"{module} states no rule"


# ── docs/architecture.md ──────────────────────────────────────────────────────────────────────────────


def test_every_module_is_in_the_architecture_and_no_other() -> None:
    listed = {
        path
        for line in text("architecture.md").splitlines()
        if line.startswith("| `cachefs/")
        for path in re.findall(r"`(cachefs/[\w/]+\.py)`", line.split("|")[1])
    }
    there = {str(path.relative_to(ROOT)) for path in SOURCES.values() if path.name != "__init__.py"}
    there |= {f"cachefs/{name}/__init__.py" for name in ("policies", "sources", "views")}  # The interfaces.
    assert listed == there


@pytest.mark.parametrize(
    "document", sorted(str(path.relative_to(ROOT)) for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
)
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    path = ROOT / document
    said = path.read_text()
    for name in set(
        re.findall(r"`((?:cachefs|tests|bench|demo|docs|setup|systemd|monitoring)/[\w./-]*\w)`", said)
    ):
        assert (ROOT / name).exists(), f"{document} names {name}"
    for link in set(re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", said)):
        assert (path.parent / link).exists(), f"{document} links to {link}"


# ── What the documents take from the code ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("document", reference.PARTS)
def test_what_is_made_from_the_code_is_as_the_code_is(document: str) -> None:
    assert (DOCS / document).read_text() == reference.renewed(document), "python -m docs.reference"


def test_every_option_is_in_the_reference() -> None:
    """By another way than the one that makes it."""
    said = text("configuration.md").partition("## Every option")[2]
    found = re.findall(r"^### `\[(\w+)\]`|^\| `(\w+)` \| (?:`([^`]*)`)? \|", said, re.MULTILINE)
    sections: dict[str, dict[str, str]] = {}
    for section, option, default in found:
        if section:
            sections[section] = {}
        else:
            sections[list(sections)[-1]][option] = default
    assert {name: set(known) for name, known in sections.items()} == {
        group.name: {opt.dest for opt in opts} for group, opts in list_opts()
    }
    assert (sections["store"]["max_size"], sections["mount"]["file_mode"]) == ("80%", "0444")
    assert sections["glance"]["valid_interfaces"] == "internal, public"
    assert sections["glance"]["password"] == ""


def test_the_options_of_oslo_log_that_are_named_exist() -> None:
    named = re.findall(r"^\| `(\w+)` \|", text("configuration.md").partition("## Every option")[0], re.MULTILINE)
    assert "debug" in named
    assert set(named) <= {opt.dest for opt in log_options()}


# ── docs/semantics.md ─────────────────────────────────────────────────────────────────────────────────


def test_every_errno_has_its_reason() -> None:
    said = text("semantics.md").partition("## Errors")[2]
    table, _, by_name = said.partition("### Failures by name")
    reasons = {name for row in re.findall(r"^\| (E[A-Z, ]+) \|", table, re.MULTILINE) for name in row.split(", ")}
    given = set(re.findall(r"\berrno\.(E[A-Z]+)", SOURCES["cachefs.fuse"].read_text()))
    failures = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.CachefsError) and not kind.__subclasses__()
    ]
    assert len(failures) > 20
    for kind in failures:
        name = errno.errorcode[kind.errno]
        assert f"| `{kind.__name__}` | {name} |" in by_name
        # What has no room is served all the same, and who pins or evicts is no reader of the mount.
        if name not in ("ENOSPC", "EBUSY"):
            given.add(name)
    assert given <= reasons


# ── docs/troubleshooting.md ───────────────────────────────────────────────────────────────────────────


def test_what_troubleshooting_quotes_is_said() -> None:
    """Each message of a column "it says", but for what stands for a name or a number."""
    code = " ".join(path.read_text() for path in SOURCES.values())
    quoted = [
        message
        for table in text("troubleshooting.md").split("| it says |")[1:]
        for row in table.partition("\n\n")[0].splitlines()[2:]
        for message in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(quoted) > 12
    for message in quoted:
        for part in re.split(r"\.\.\.|\bN\b", message):
            assert part.strip(": ") in code, message


# ── Manual pages, pictures ────────────────────────────────────────────────────────────────────────────


def test_the_manual_has_every_option_and_exit_status() -> None:
    page = text("man/cachefs.8.md")
    for words, parser in reference.commands(cli.parser()):
        assert f"### cachefs {words}\n" in page
        for action in parser._actions:
            assert all(f"**{spelled}**" in page for spelled in action.option_strings), words
    statuses = page.partition("## EXIT STATUS")[2].partition("## ENVIRONMENT")[0]
    for status in {cli.DONE, cli.FAILED, cli.USAGE, cli.SOUND, cli.REPAIRED, cli.DAMAGED, cli.UNFINISHED, 130}:
        assert re.search(rf"\b{status}\b", statuses)
    helper = text("man/mount.cachefs.8.md")
    for action in mount_helper._parser()._actions:
        if action.dest != "help":
            assert all(
                f"**{spelled}**" in helper or f"**{spelled} " in helper for spelled in action.option_strings
            )
    for status in (0, mount_helper.WRONG_CALL, mount_helper.FAILED):
        assert f"**{status}**\n" in helper


def test_the_manual_pages_are_made_and_can_be_shown(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="there is no Sphinx: setup/install docs")
    if shutil.which("groff") is None:
        pytest.skip("there is no groff: setup/install docs")
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-n", "-q", "-b", "man", "-d"]
    command += [str(tmp_path / "doctrees"), str(DOCS), str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (made.returncode, made.stderr) == (0, "")
    for page, words in {
        "cachefs.8": [
            "cachefs prefetch [--wait] [--json] ID...",
            "FILE What was exported, or - for standard input.",
            "EXIT STATUS",
        ],
        "cachefs.conf.5": ["[store]", "max_size = 80%"],
        "mount.cachefs.8": ["mount -t cachefs", "fstab(5)"],
    }.items():
        shown = subprocess.run(
            ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(tmp_path / page)],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert shown.stderr == ""
        assert "**" not in shown.stdout, page
        for word in words:
            assert word in " ".join(shown.stdout.split()), page


def test_the_picture_of_top_shows_what_top_shows() -> None:
    """All headings, and the first word of each line of its head."""
    drawn = ElementTree.fromstring((DOCS / "pictures" / "top.svg").read_text())
    shown = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    source = SOURCES["cachefs.top"].read_text()
    headings = {
        word
        for header in re.findall(r"\(\"(?:FLIGHT|IMAGE)\",[^)]*\)", source)
        for word in ast.literal_eval(header)
    }
    assert headings >= {"FLIGHT", "IMAGE", "READERS", "STATE"}
    heads = set(re.findall(r'f"(\w+) {2,}\{', source))
    assert heads >= {"guests", "Glance"}
    assert headings | heads <= shown


@pytest.mark.parametrize("picture", sorted(path.name for path in (DOCS / "pictures").glob("*.svg")))
def test_a_picture_stands_by_itself(picture: str) -> None:
    """It is used, asks nobody for anything, says what it shows, and has colours for a dark page, where it is no
    terminal, which brings its own background."""
    drawn = (DOCS / "pictures" / picture).read_text()
    root = ElementTree.fromstring(drawn)
    assert [root.findtext(f"{{http://www.w3.org/2000/svg}}{tag}", "") != "" for tag in ("title", "desc")] == [
        True
    ] * 2
    assert "prefers-color-scheme: dark" in drawn or root.get("class") == "rich-terminal"
    asked = re.sub(r"<text [^>]*>[^<]*", "", drawn)  # What is only written there is asked of nobody.
    assert re.findall(r"(?:https?:)?//[^\s\"]+|@import|<script", asked) == ["http://www.w3.org/2000/svg"]
    assert any(f"pictures/{picture})" in path.read_text() for path in DOCS.glob("*.md"))


# ── docs/configuration.md ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("document", "number"), [("quickstart.md", 0), *(("configuration.md", number) for number in range(4))]
)
def test_the_examples_are_sound_configurations(document: str, number: int, tmp_path: Path) -> None:
    examples = re.findall(r"```ini\n(.*?)```", text(document), re.DOTALL)
    assert len(examples) == {"quickstart.md": 1, "configuration.md": 4}[document]
    path = tmp_path / "cachefs.conf"
    path.write_text(examples[number])
    faults = config.check([str(path)])
    if "cloud = " in examples[number]:  # The one that needs a clouds.yaml.
        assert [fault.option for fault in faults] == ["glance/cloud"]
    else:
        assert faults == []


# ── docs/format.md ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("table", f.Table)
def test_every_table_is_described(table: f.Table) -> None:
    assert f"## `{table.name.lower()}`" in text("format.md")
    assert re.search(rf"\| `{table.name.lower()}` +\| {table.value} \|", text("format.md"))


def test_every_record_and_field_is_described() -> None:
    said = text("format.md")
    records = [
        value
        for _, value in inspect.getmembers(f, inspect.isclass)
        if value.__module__ == f.__name__ and not isinstance(value, EnumMeta)
    ]
    assert {record.__name__ for record in records} >= {"StoreRecord", "Chunk", "Punch"}
    for record in records:
        assert f"`{record.__name__}`" in said
        for name in inspect.get_annotations(record):
            assert f"`{name}`" in said, f"{record.__name__}.{name}"


def test_every_member_that_is_stored_as_a_number_is_described() -> None:
    said = text("format.md")
    for enum in (f.ViewKind, f.OriginMode, f.Kind):
        for member in enum:
            assert re.search(rf"\b{member.value} `{member.name}`", said), f"{enum.__name__}.{member.name}"
    assert f"format {f.FORMAT}" in said.lower()
