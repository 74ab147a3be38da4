"""What the documents take from the code: `python -m docs.reference` writes it into them. Rule: only between the
marks in a document, and the same whenever it is run; `tests/test_docs.py` sees that it was.

    docs/configuration.md       the options, as tables
    docs/man/cachefs.conf.5.md  the options, as a manual page has them
    docs/man/cachefs.8.md       the commands, out of the parser
    docs/semantics.md           the failures, with their errnos
"""

from __future__ import annotations

import argparse
import errno
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from oslo_config import cfg, types

from cachefs import cli, errors

DOCS: Final = Path(__file__).parent

# What a type is called that says no more of itself.
_PLAIN: Final = {"string value": "", "boolean value": "true or false", "list value": "list, with commas"}


# ── Options ───────────────────────────────────────────────────────────────────────────────────────────


def options() -> dict[str, list[cfg.Opt]]:
    """All of cachefs by their sections, as `cachefs config sample` has them; without those of oslo.log."""
    (entry,) = entry_points(group="oslo.config.opts", name="cachefs")
    return {getattr(group, "name", group): list(found) for group, found in entry.load()()}


def default(opt: cfg.Opt) -> str:
    """As a file would say it; empty where there is none."""
    value = opt.sample_default if opt.sample_default is not None else opt.default
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def values(opt: cfg.Opt) -> str:
    """What may be written, in a few words."""
    kind: Any = opt.type
    if isinstance(kind, types.String) and kind.choices:
        return " or ".join(f"`{choice}`" for choice in kind.choices if choice)
    if isinstance(kind, types.List):
        inner = str(getattr(kind.item_type, "type_name", ""))
        return "list, with commas" if inner in _PLAIN else f"list, with commas: {inner}"
    name = str(getattr(kind, "type_name", ""))
    name = _PLAIN.get(name, name)
    if isinstance(kind, types.Number):
        name = {"integer value": "number"}.get(name, name)
        name += "".join(
            f" {word} {_number(end)}" for word, end in (("from", kind.min), ("to", kind.max)) if end is not None
        )
    return name + ("; may be repeated" if isinstance(opt, cfg.MultiOpt) else "")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def meaning(opt: cfg.Opt) -> str:
    """The help of the code, and of each choice; one line."""
    parts = [" ".join((opt.help or "").split())]
    kind: Any = opt.type
    explained = getattr(kind, "choices", None) if isinstance(kind, types.String) else None
    if isinstance(explained, dict):
        parts += [f"{choice}: {said}." for choice, said in explained.items() if choice and said]
    if opt.secret:
        parts.append("A secret.")
    return " ".join(part if part.endswith(".") else part + "." for part in parts if part)


def option_tables() -> str:
    parts = []
    for section, found in options().items():
        rows = [
            f"| `{opt.dest}` | {_code(default(opt))} | {values(opt)} | {_cell(meaning(opt))} |" for opt in found
        ]
        parts.append(
            "\n".join([f"### `[{section}]`", "", "| option | default | value | |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts)


def option_list() -> str:
    """Definitions, which become what a manual page has of options."""
    parts = []
    for section, found in options().items():
        parts.append(f"### [{section}]")
        for opt in found:
            shown = f" = *{_plain(default(opt))}*" if default(opt) else ""
            allowed = f"\n  ({_plain(values(opt))})" if values(opt) else ""
            parts.append(f"**{opt.dest}**{shown}\n: {_plain(meaning(opt))}{allowed}")
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return re.sub(r"([|<*])", r"\\\1", text)


def _plain(text: str) -> str:
    return re.sub(r"([<*])", r"\\\1", text.replace("`", ""))


# ── Commands ──────────────────────────────────────────────────────────────────────────────────────────


def commands(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command by its words, as `config check`; those that only hold others are left out."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for name, inner in group.choices.items():
            yield from commands(inner, f"{words} {name}".strip())
    if words and not groups:
        yield words, parser


# Of nearly all commands: the page says them once.
OF_ALL: Final = ("--help", "--config-file", "--config-dir", "--json")


def command_list() -> str:
    parts = []
    for words, parser in commands(cli.parser()):
        operands = [action for action in parser._actions if not action.option_strings]
        of_all = [action for action in parser._actions if _spelled(action) in OF_ALL]
        own = [action for action in parser._actions if action not in (*operands, *of_all)]
        # --help goes without saying; where the configuration is to be found, too.
        json = [action for action in of_all if _spelled(action) == "--json"]
        shown = " ".join([f"**cachefs {words}**", *map(_in_synopsis, [*own, *json, *operands])])
        about = [f"### cachefs {words}", shown, _plain(parser.description or "")]
        about += [f"{_in_list(action)}\n: {_sentence(action.help)}" for action in [*operands, *own] if action.help]
        (example,) = examples(parser)
        parts.append("\n\n".join([*about, f"```sh\n{example}\n```"]))
    return "\n\n".join(parts)


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """What `--help` ends with."""
    return re.findall(r"^  (cachefs .*)$", parser.epilog or "", re.MULTILINE)


def _spelled(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else ""


def _in_synopsis(action: argparse.Action) -> str:
    name = _operand(action)
    if action.option_strings:
        return rf"\[**{_spelled(action)}**{' ' + name if name else ''}\]"
    return {"+": f"{name}...", "*": rf"\[{name}...\]", "?": rf"\[{name}\]"}.get(str(action.nargs), name)


def _in_list(action: argparse.Action) -> str:
    name = _operand(action)
    spelled = ", ".join(f"**{word}**" for word in action.option_strings)
    return f"{spelled} {name}".strip() if spelled else name


def _operand(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    return f"*{action.metavar or '|'.join(map(str, action.choices or [])) or action.dest.upper()}*"


def _sentence(text: str | None) -> str:
    said = _plain(text or "")
    said = re.sub(r"^([-+#>]|\d+(?=[.)]))", r"\\\1", said)  # Else it would begin a list, a heading, a quotation.
    return said[:1].upper() + said[1:] + "."


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────────


def failures() -> list[type[errors.CachefsError]]:
    """All that can be raised of cachefs's own, in the order of their source."""
    found = [
        kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.CachefsError)
    ]
    return [kind for kind in found if not (kind.__doc__ or "").startswith("Base of")]


def failure_table() -> str:
    rows = [
        f"| `{kind.__name__}` | {errno.errorcode[kind.errno]} | {_cell(_first_sentence(kind.__doc__))} |"
        for kind in failures()
    ]
    return "\n".join(["| failure | errno | |", "|---|---|---|", *rows])


def _first_sentence(text: str | None) -> str:
    said = " ".join((text or "").split())
    return re.split(r"(?<=[.])(?: |$)", said)[0]


# ── Into the documents ────────────────────────────────────────────────────────────────────────────────

PARTS: Final = {
    "configuration.md": ("options", option_tables),
    "man/cachefs.conf.5.md": ("options", option_list),
    "man/cachefs.8.md": ("commands", command_list),
    "semantics.md": ("failures", failure_table),
}


def renewed(document: str) -> str:
    """The whole text of one of `PARTS`, with what is between its marks as the code has it now."""
    name, make = PARTS[document]
    begin, end = f"<!-- {name}: begin, by python -m docs.reference -->", f"<!-- {name}: end -->"
    text = (DOCS / document).read_text()
    before, _, rest = text.partition(begin)
    between, _, after = rest.partition(end)
    assert between, f"{document} has no marks for its {name}"
    return f"{before}{begin}\n\n{make()}\n\n{end}{after}"


if __name__ == "__main__":
    for document in PARTS:
        (DOCS / document).write_text(renewed(document))
