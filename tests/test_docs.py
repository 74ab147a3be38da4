"""What the documents say of the code is so, and the rules of the source are kept. Rule: read from the files, so
that neither can change without the other.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path
from typing import Final

import pytest

from cachefs import config
from cachefs.options import list_opts, log_options
from cachefs.store import format as f

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


@pytest.mark.parametrize("document", sorted(path.name for path in [*DOCS.glob("*.md"), ROOT / "README.md"]))
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    path = ROOT / document if document == "README.md" else DOCS / document
    said = path.read_text()
    for name in set(re.findall(r"`((?:cachefs|tests|bench|demo|docs|setup|systemd)/[\w./-]*\w)`", said)):
        assert (ROOT / name).exists(), f"{document} names {name}"
    for link in set(re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", said)):
        assert (path.parent / link).exists(), f"{document} links to {link}"


# ── docs/configuration.md ─────────────────────────────────────────────────────────────────────────────


def sections() -> dict[str, set[str]]:
    """The options that docs/configuration.md has in its tables, by section."""
    found: dict[str, set[str]] = {}
    section = ""
    for line in text("configuration.md").splitlines():
        if heading := re.fullmatch(r"#+ `\[(\w+)\]`.*", line):
            section = heading[1]
            found.setdefault(section, set())
        elif line.startswith("| `"):
            found[section].update(re.findall(r"`(\w+)`", line.split("|")[1]))
    return found


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    documented = sections()
    general = documented.pop("DEFAULT")
    assert general <= {opt.dest for opt in log_options()}
    assert documented == {group.name: {opt.dest for opt in opts} for group, opts in list_opts()}


def test_documented_defaults_are_those_of_the_code() -> None:
    said = {}
    section = ""
    for line in text("configuration.md").splitlines():
        if heading := re.fullmatch(r"#+ `\[(\w+)\]`.*", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)` \| `([^`]+)` \|", line):
            said[section, row[1]] = row[2]
    for group, opts in list_opts():
        for opt in opts:
            default = opt.sample_default if opt.sample_default is not None else opt.default
            if default in (None, []):
                continue
            shown = ", ".join(default) if isinstance(default, list) else str(default).lower().removesuffix(".0")
            if (group.name, opt.dest) in said:
                assert said[group.name, opt.dest].lower() == shown.lower(), f"[{group.name}] {opt.dest}"
            else:
                raise AssertionError(f"[{group.name}] {opt.dest} has a default that is not documented: {shown}")


@pytest.mark.parametrize("number", range(4))
def test_the_examples_are_sound_configurations(number: int, tmp_path: Path) -> None:
    examples = re.findall(r"```ini\n(.*?)```", text("configuration.md"), re.DOTALL)
    assert len(examples) == 4
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
