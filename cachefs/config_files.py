"""What the files of a configuration say, option by option, and what of it nobody understands. Rule: nothing
unknown is let through, and every fault names its file and line; what options mean together is not known here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg, iniparser

from cachefs import asking, options
from cachefs.errors import ConfigError
from cachefs.sources import auth


def files_read(files: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """Those that count, in the order in which later ones win; without those that cannot be looked for."""
    return list(paths_of(files, config_dirs, []))


def paths_of(files: Sequence[str], config_dirs: Sequence[str], faults: list[ConfigError]) -> Iterator[str]:
    """In the order in which later ones win."""
    if not files and os.path.exists(asking.DEFAULT_FILE):
        yield asking.DEFAULT_FILE
    yield from (os.path.abspath(os.path.expanduser(path)) for path in files)
    for folder in config_dirs:
        try:
            yield from sorted(str(path) for path in Path(folder).absolute().iterdir() if path.suffix == ".conf")
        except OSError as e:
            faults.append(ConfigError(folder, f"cannot be read: {e.strerror}"))


@dataclass(frozen=True, slots=True)
class Line:
    """`name` in `section` at a place in a file; a section's own head has no name."""

    section: str
    name: str | None
    where: str


class _Parser(iniparser.BaseParser):
    """oslo.config's own grammar, but it remembers the place of each assignment."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.lines = path, list[Line]()

    def new_section(self, section: str) -> None:
        self._add(section, None, self.lineno)

    def assignment(self, key: str, value: list[str]) -> None:
        number = self.lineno - len(value)  # Called at the line that ends it: the value may have had several.
        if not self.lines:
            raise self.parse_exc("a section must come before the first option", number, key)
        self._add(self.lines[-1].section, key, number)

    def _add(self, section: str, name: str | None, number: int) -> None:
        # oslo.config takes sections in any case, except DEFAULT.
        self.lines.append(
            Line(section if section == "DEFAULT" else section.lower(), name, f"{self.path}:{number}")
        )


def lines_of(path: str, faults: list[ConfigError]) -> list[Line]:
    parser = _Parser(path)
    try:
        # An empty line at the end, so that the last assignment ends as all others do.
        parser.parse([*Path(path).read_text(encoding="utf-8").split("\n"), ""])
    except PermissionError as e:
        faults.append(ConfigError(path, f"cannot be read: {e.strerror} (it may hold a secret: try sudo)"))
    except OSError as e:
        faults.append(ConfigError(path, f"cannot be read: {e.strerror}"))
    except UnicodeDecodeError as e:
        faults.append(ConfigError(path, f"is not UTF-8 at byte {e.start}"))
    except iniparser.ParseError as e:
        faults.append(ConfigError(path, f"line {e.lineno}: {e.msg}"))  # Not the line: it may be a password.
    return parser.lines


class Reading:
    """One pass from files to `conf`, oslo.config's view of them; `faults` grows on the way."""

    def __init__(self, paths: list[str], lines: list[Line], overrides: Mapping[str, str]) -> None:
        self.faults: list[ConfigError] = []
        self._lines, self._overrides = lines, dict(overrides)
        self.conf = cfg.ConfigOpts()
        self.conf([], project="cachefs", default_config_files=paths, default_config_dirs=[])
        self._known: dict[str, list[cfg.Opt]] = {}
        for section, opts in {"DEFAULT": options.log_options(), **options.OPTIONS}.items():
            self.conf.register_opts(opts, group=_group(section))
            self._learn(section, opts)
        self._learn(auth.GROUP, auth.register(self.conf))
        # Only now is it known which plugin of keystoneauth has been chosen.
        self._learn(auth.GROUP, auth.register_plugin(self.conf))
        self._refuse_unknown()

    def refuse(self, faults: Iterable[ConfigError]) -> None:
        """What is wrong with the values together, but where one of them has been refused already."""
        named = {fault.option for fault in self.faults}  # A bad value has become a default by now.
        self.faults.extend(fault for fault in faults if fault.option not in named)

    def _learn(self, section: str, opts: list[cfg.Opt]) -> None:
        """Applies overrides; puts the default where a value is bad, so that reading can go on."""
        self._known.setdefault(section, []).extend(opts)
        group = _group(section)
        for opt in opts:
            if opt.dest not in (self.conf if group is None else self.conf[group]):
                continue  # Known, but not of the plugin that was chosen.
            where = self._where(section, opt)
            try:
                if (text := self._overrides.pop(f"{section}/{opt.dest}", None)) is not None:
                    where = "given at the start"
                    self.conf.set_override(opt.dest, text, group)
                value = self.conf[opt.dest] if group is None else self.conf[group][opt.dest]
                if value is None and opt.default is not None:  # oslo.config's numbers take "" for None.
                    raise ValueError("has no value")
            except (cfg.Error, ValueError) as e:
                self.faults.append(ConfigError(f"{section}/{opt.dest}", f"{where}: {_reason(opt, e)}"))
                self.conf.set_override(opt.dest, opt.default, group)

    def _where(self, section: str, opt: cfg.Opt) -> str:
        """The last place that sets it: that is the one that counts."""
        known = set(options.names(section, [opt]))
        places = [line.where for line in self._lines if (line.section, line.name) in known]
        return places[-1] if places else "environment"

    def _refuse_unknown(self) -> None:
        known = {name for section, opts in self._known.items() for name in options.names(section, opts)}
        for line in self._lines:
            if line.section not in self._known:
                if line.name is None:
                    hint = _hint(line.section, self._known)
                    self.faults.append(ConfigError(f"[{line.section}]", f"{line.where}: unknown section{hint}"))
            elif line.name is not None and (line.section, line.name) not in known:
                self._refuse(line.section, line.name, line.where)
        for option in self._overrides:  # Those that no option has taken.
            section, _, name = option.rpartition("/")
            self._refuse(section or "DEFAULT", name, "given at the start")

    def _refuse(self, section: str, name: str, where: str) -> None:
        reason = auth.explain(self.conf, name) if section == auth.GROUP else None
        if reason is None:
            elsewhere = [s for s, opts in self._known.items() if any(opt.dest == name for opt in opts)]
            here = [opt.dest for opt in self._known.get(section, [])]
            hint = f": it belongs into [{elsewhere[0]}]" if elsewhere else _hint(name, here)
            reason = f"unknown option{hint}"
        self.faults.append(ConfigError(f"{section}/{name}", f"{where}: {reason}"))


_NO_NUMBERS = {
    "invalid literal for int() with base 10: ": "whole number",
    "could not convert string to float: ": "number",
}


def _group(section: str) -> str | None:
    return None if section == "DEFAULT" else section


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


def _reason(opt: cfg.Opt, error: Exception) -> str:
    if isinstance(error, (cfg.NoSuchOptError, cfg.TemplateSubstitutionError)):
        # Their text quotes a part of the value, which may be a password.
        return "$ begins the name of an option: a literal one is written $$"
    cause = error.__context__ if isinstance(error, cfg.ConfigSourceValueError) else error
    return "has no valid value" if opt.secret else _in_words(str(cause))


def _in_words(said: str) -> str:
    """What Python says of a number that is none is for those who write programs."""
    for beginning, kind in _NO_NUMBERS.items():
        if said.startswith(beginning):
            return f"{said.removeprefix(beginning)} is no {kind}"
    return said
