"""argv → the daemon, or a request to it. Rule: one clear line on stderr for whatever goes wrong, and an exit
status: 0 done, 1 refused or failed, 2 usage. `check` has its own: 0 sound, 1 repaired, 2 damaged or not
repaired. So has `scrub --wait`: 0 sound, 1 rot was found and can be fetched again, 2 something is lost or
damaged, 3 the daemon did not bring it to an end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefs import __version__
from cachefs.errors import CachefsError

if TYPE_CHECKING:
    from cachefs.store.check import Finding

DONE, FAILED, USAGE = 0, 1, 2
SOUND, REPAIRED, DAMAGED = 0, 1, 2
UNFINISHED = 3


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
    for name, run, about in (
        ("pin", _pin, "keep what is cached of images, whatever room is needed"),
        ("unpin", _unpin, "end the pins of images"),
        ("prefetch", _prefetch, "fetch all of images in the background"),
        ("evict", _evict, "drop what is cached of images; refused while one is open or pinned"),
    ):
        command = add(name, run, about)
        command.add_argument("ids", nargs="+", metavar="ID")
        _add_json(command)
        if name == "prefetch":
            command.add_argument("--wait", action="store_true", help="until all of it is here, with progress")
    scrub = add("scrub", _scrub, "compare everything that is cached with its digests, in the daemon")
    scrub.add_argument("--wait", action="store_true", help="until it is done; the exit status says what was found")
    _add_json(scrub)
    check = add("check", _check, "verify a store that no daemon has open")
    check.add_argument("--store", metavar="PATH", help="the store's folder; by default [store]/path")
    check.add_argument("--repair", action="store_true", help="make what is damaged absent, and the rest agree")
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
            f"{store['path']}: {size(store['bytes_cached'])} of images in {size(store['bytes_on_disk'])} "
            f"of {size(store['bytes_limit'])}",
        ),
        ("shared", f"{size(store['bytes_shared'])} by deduplication, {size(store['bytes_zero'])} of zeros"),
        ("reads", f"{reads['hits']} hits, {reads['misses']} misses, {reads['waiting']} waiting"),
        (
            "fetched",
            f"{size(fetcher['bytes_fetched'])} in {fetcher['requests']} requests, {fetcher['flights']} under way",
        ),
    ]
    evictor, scrub, disk = found["evictor"], found["scrub"], store["disk"]
    evicted = sum(cause["bytes"] for cause in evictor["evicted"].values())
    rows.append(("evicted", f"{size(evicted)}; {evictor['pinned_images']} images pinned"))
    rows.append(("scrub", _scrub_words(scrub)))
    if disk["state"] != "healthy":
        rows.append(("disk", f"{disk['state']}: {disk['why']}"))
    if evictor["stuck"]:
        rows.append(("full", evictor["stuck"]))
    if store["trouble"]:
        rows.append(("not kept", f"{size(store['bytes_not_kept'])}: {store['trouble']}"))
    if found["images"]["glance_trouble"]:
        rows.append(("Glance", found["images"]["glance_trouble"]))
    for name, value in rows:
        print(f"{name + ':':12} {value}")
    return DONE


def _scrub_words(scrub: Mapping[str, Any]) -> str:
    words = scrub["state"] if scrub["share"] is None else f"{scrub['state']}, {scrub['share']:.0%} done"
    if scrub["ended"]:
        words += f"; the last ended {time.strftime('%Y-%m-%d %H:%M', time.localtime(scrub['ended']))}"
    if scrub["rotten"] or scrub["lost"]:
        words += f"; {scrub['rotten']} chunks rotten, {scrub['lost']} spans lost"
    return words


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


def _pin(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "pin", lambda row: f"pinned, {size(row['size'])}")


def _unpin(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "unpin", lambda row: "unpinned" if row["was_pinned"] else "was not pinned")


def _evict(arguments: argparse.Namespace) -> int:
    def said(row: dict[str, Any]) -> str:
        return f"{size(row['bytes'])} freed" + ("" if row["done"] else " so far; it goes on")

    return _tell(arguments, "evict", said)


def _tell(arguments: argparse.Namespace, command: str, said: Callable[[dict[str, Any]], str]) -> int:
    """Asks for something to be done with images; one line for each, on stderr for those that were refused."""
    return _show_told(arguments, _ask(arguments, command, images=arguments.ids), said)


def _show_told(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], said: Callable[[dict[str, Any]], str]
) -> int:
    if arguments.json:
        _print_json(rows)
    for row in rows:
        if row["error"] is not None:
            print(f"cachefs: {printable(row['error'])}", file=sys.stderr)
        elif not arguments.json:
            print(f"{row['id']}: {said(row)}")
    return DONE if all(row["error"] is None for row in rows) else FAILED


def _prefetch(arguments: argparse.Namespace) -> int:
    if not arguments.wait:
        return _tell(arguments, "prefetch", lambda row: f"{size(row['cached'])} of {size(row['size'])} are here")
    while True:
        rows = _ask(arguments, "prefetch", images=arguments.ids)
        here, all_of_it = (sum(row.get(name, 0) for row in rows) for name in ("cached", "size"))
        over = all(row["error"] is not None or row["cached"] >= row["size"] for row in rows)
        if sys.stderr.isatty():
            print(f"\r{size(here)} of {size(all_of_it)}\033[K", end="\n" if over else "", file=sys.stderr)
        if over:
            return _show_told(arguments, rows, lambda row: f"{size(row['size'])} are here")
        time.sleep(1)


def _scrub(arguments: argparse.Namespace) -> int:
    if not arguments.wait:
        started = _ask(arguments, "scrub")
        return _print_json(started) if arguments.json else DONE
    try:
        return _wait_for_scrub(arguments)
    except CachefsError as error:
        print(f"cachefs: {error}", file=sys.stderr)
        return UNFINISHED


def _wait_for_scrub(arguments: argparse.Namespace) -> int:
    """Starts a scrub, or joins the one that is under way, and asks each second how far it is: it may take days."""
    number = _ask(arguments, "scrub")["run"]
    shows = sys.stderr.isatty() and not arguments.json
    while (now := _ask(arguments, "scrub-status"))["finished"] < number:
        if shows:
            share = "" if now["share"] is None else f"{now['share']:.1%}, "
            print(f"\r\033[K{share}{size(now['bytes_verified'])}: {now['state']}", end="", file=sys.stderr)
        time.sleep(1)
    if shows:
        print("\r\033[K", end="", file=sys.stderr)
    last = now["last"]
    if last is None or last["run"] < number:
        print("cachefs: the scrub did not come to an end; the daemon's log says why", file=sys.stderr)
        return UNFINISHED
    if arguments.json:
        _print_json(last)
    else:
        for fault in last["faults"]:
            print(f"damaged index: {fault}")
        print(
            f"{size(last['bytes_verified'])} verified: {last['rotten']} chunks rotten, {last['healed']} spans to "
            f"be fetched again, {last['waiting']} when Glance is back, {last['lost']} lost, "
            f"{last['faults_in_all']} faults of the index"
        )
    return int(last["exit_status"])


# ── Without it ────────────────────────────────────────────────────────────────────────────────────────


def _check(arguments: argparse.Namespace) -> int:
    try:
        return _checked(arguments)
    except CachefsError as error:
        if not arguments.repair:
            raise
        print(f"cachefs: {error}", file=sys.stderr)
        return DAMAGED  # 1 would say that it was repaired.


def _checked(arguments: argparse.Namespace) -> int:
    from cachefs.store.check import check
    from cachefs.store.recover import repair_store

    path = arguments.store
    if path is None:
        from cachefs import config

        path = config.load(arguments.config_file, arguments.config_dir, {}).store.path
    if arguments.repair:
        report, repaired, sound = repair_store(Path(path))
    else:
        report, repaired = check(Path(path)), None
        sound = report.sound
    status = DAMAGED if not sound else REPAIRED if repaired else SOUND
    outcome = ("sound", "repaired", "damaged")[status]
    if arguments.json:
        found = {**asdict(report), "findings": [_finding(found) for found in report.findings]}
        _print_json({**found, "outcome": outcome, "repair": None if repaired is None else asdict(repaired)})
        return status
    for finding in report.findings:
        print(finding)
    if report.unlisted:
        print(f"and {report.unlisted} more")
    if repaired is not None:
        print(f"repair: {repaired}")
    print(f"{outcome}: {report.spans} spans, {report.chunks} chunks, {size(report.bytes_verified)} verified")
    return status


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
