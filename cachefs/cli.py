"""argv → the daemon, or a request to it. Rule: one clear line on stderr for whatever goes wrong, and an exit
status: 0 done, 1 refused or failed, 2 usage. `check` has its own: 0 sound, 2 damaged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefs import __version__
from cachefs.errors import CachefsError

if TYPE_CHECKING:
    from cachefs.store.check import Finding

DONE, FAILED, USAGE = 0, 1, 2
SOUND, DAMAGED = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CachefsError as error:
        print(f"cachefs: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit.
        return FAILED
    except KeyboardInterrupt:
        return 128 + 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cachefs", description="Every Glance image, already there.")
    top.add_argument("--version", action="version", version=f"cachefs {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about[:1].upper() + about[1:] + ".")
        command.set_defaults(run=run)
        _add_config(command)
        return command

    mount = add("mount", _mount, "run the node's daemon in the foreground")
    mount.add_argument("mountpoint", nargs="?", help="where to mount; by default [mount]/mountpoint")
    for name, run, about in (
        ("status", _status, "show what the daemon holds and does"),
        ("images", _images, "list the images"),
    ):
        _add_json(add(name, run, about))
    image = add("image", _image, "show one image in full")
    image.add_argument("id", metavar="ID")
    _add_json(image)
    check = add("check", _check, "verify a store that no daemon has open")
    check.add_argument("--store", metavar="PATH", help="the store's folder; by default [store]/path")
    _add_json(check)
    config = commands.add_parser("config", help="show or check the configuration")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    sample = actions.add_parser("sample", help="print a commented sample")
    sample.set_defaults(run=_config_sample)
    checked = actions.add_parser("check", help="name every unknown option, wrong value and contradiction")
    _add_config(checked)
    checked.set_defaults(run=_config_check)
    return top


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-file", action="append", default=[], metavar="PATH", help="may be repeated")
    command.add_argument("--config-dir", action="append", default=[], metavar="PATH", help="all *.conf in it")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


# ── The daemon ────────────────────────────────────────────────────────────────────────────────────────


def _mount(arguments: argparse.Namespace) -> int:
    from cachefs import config, daemon  # Half a second of imports that no other command needs.

    overrides = {"mount/mountpoint": os.path.abspath(arguments.mountpoint)} if arguments.mountpoint else {}
    loaded = config.load(arguments.config_file, arguments.config_dir, overrides)
    loaded.log.start()
    daemon.run(loaded)
    return DONE


# ── Requests to it ────────────────────────────────────────────────────────────────────────────────────


def _ask(arguments: argparse.Namespace, command: str, **operands: Any) -> Any:
    from cachefs import config, control

    loaded = config.load(arguments.config_file, arguments.config_dir, {})
    return control.ask(loaded.control.socket, command, **operands)


def _status(arguments: argparse.Namespace) -> int:
    found = _ask(arguments, "status")
    if arguments.json:
        return _print_json(found)
    store, reads, fetcher = found["store"], found["reads"], found["fetcher"]
    rows = [
        ("mounted on", found["mountpoint"]),
        ("daemon", f"cachefs {found['version']}, pid {found['pid']}, up {found['uptime']} s"),
        ("images", f"{found['images']['known']} known, {found['images']['open']} open"),
        (
            "store",
            f"{store['path']}: {size(store['bytes_cached'])} of images in {size(store['bytes_on_disk'])} on disk",
        ),
        ("shared", f"{size(store['bytes_shared'])} by deduplication, {size(store['bytes_zero'])} of zeros"),
        ("reads", f"{reads['hits']} hits, {reads['misses']} misses, {reads['waiting']} waiting"),
        (
            "fetched",
            f"{size(fetcher['bytes_fetched'])} in {fetcher['requests']} requests, {fetcher['flights']} under way",
        ),
    ]
    if store["trouble"]:
        rows.append(("not kept", f"{size(store['bytes_not_kept'])}: {store['trouble']}"))
    if found["images"]["glance_trouble"]:
        rows.append(("Glance", found["images"]["glance_trouble"]))
    for name, value in rows:
        print(f"{name + ':':12} {value}")
    return DONE


def _images(arguments: argparse.Namespace) -> int:
    found = _ask(arguments, "images")
    if arguments.json:
        return _print_json(found)
    header = ("ID", "NAME", "FORMAT", "SIZE", "CACHED", "STATE")
    table = [header] + [
        (
            row["id"], printable(row["name"] or ""), row["disk_format"] or "", size(row["size"]),
            size(row["cached"]), row["state"] if row["status"] == "active" else row["status"],
        )
        for row in found
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return DONE


def _image(arguments: argparse.Namespace) -> int:
    found = _ask(arguments, "image", image=arguments.id)
    if arguments.json:
        return _print_json(found)
    for name, value in found.items():
        print(f"{name + ':':18} {'' if value is None else printable(str(value))}")
    return DONE


# ── Without it ────────────────────────────────────────────────────────────────────────────────────────


def _check(arguments: argparse.Namespace) -> int:
    from cachefs.store.check import check

    path = arguments.store
    if path is None:
        from cachefs import config

        path = config.load(arguments.config_file, arguments.config_dir, {}).store.path
    report = check(Path(path))
    if arguments.json:
        _print_json({**asdict(report), "findings": [_finding(found) for found in report.findings]})
        return SOUND if report.sound else DAMAGED
    for finding in report.findings:
        print(finding)
    if report.unlisted:
        print(f"and {report.unlisted} more")
    print(
        f"{'sound' if report.sound else 'damaged'}: {report.spans} spans, {report.chunks} chunks, "
        f"{size(report.bytes_verified)} verified"
    )
    return SOUND if report.sound else DAMAGED


def _finding(found: Finding) -> dict[str, str]:
    return {"severity": found.severity.value, "where": found.where, "what": found.what}


def _config_sample(arguments: argparse.Namespace) -> int:
    from cachefs import config

    print(config.sample(), end="")
    return DONE


def _config_check(arguments: argparse.Namespace) -> int:
    from cachefs import config

    faults = config.check(arguments.config_file, arguments.config_dir)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print("the configuration is sound")
    return FAILED if faults else DONE


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, sort_keys=True))
    return DONE


def size(n: int) -> str:
    """`n` bytes for people: 1536 → "1.5 KiB"."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def printable(text: str) -> str:
    """A name that came from elsewhere, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    sys.exit(main())
