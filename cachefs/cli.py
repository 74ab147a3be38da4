"""argv → the daemon, or a request to it. Rule: one clear line on stderr for whatever goes wrong, and an exit
status: 0 done, 1 refused or failed, 2 usage. `check` has its own: 0 sound, 1 repaired, 2 damaged or not
repaired. So has `scrub --wait`: 0 sound, 1 rot was found and can be fetched again, 2 something is lost or
damaged, 3 the daemon did not bring it to an end.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cachefs import __version__, answers, asking, waiting
from cachefs.errors import CachefsError, ConfigError, Refused, StoreLocked
from cachefs.shown import columns_of, is_terminal, print_json, print_note, print_rows, print_sentence, print_table
from cachefs.words import counted, printable, size

if TYPE_CHECKING:
    from cachefs.store.check import Finding
    from cachefs.trace_cli import Ask

DONE, FAILED, USAGE = 0, 1, 2
_FULL_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
SOUND, REPAIRED, DAMAGED = 0, 1, 2
UNFINISHED = 3
# Of a key that was pressed.
COMPLETION_WAIT_S = 1.0

_NAMED = "an image's id, the first 4 or more digits of it, or a name that no other image has"
# An id for the examples of --help.
_ID = "21dced0f-d203-4786-9b93-710d2b98aae0"


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    arguments = parsed(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()  # Here, where a full disk can still be said.
        return status
    except CachefsError as error:
        _say(error)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit.
        return FAILED
    except OSError as error:
        _say(": ".join(filter(None, (error.filename and str(error.filename), error.strerror or str(error)))))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 128 + 2


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for. A word that no command takes is the subcommand's to refuse: it shows its own usage."""
    arguments, unknown = parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.config_file = arguments.first_files + arguments.config_file
    arguments.config_dir = arguments.first_folders + arguments.config_dir
    return arguments


def _say(what: object) -> None:
    """One line on stderr; on a terminal as many as it takes."""
    print_sentence(f"cachefs: {printable(str(what))}", sys.stderr)


# ── What can be said ──────────────────────────────────────────────────────────────────────────────────


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cachefs",
        description="Every Glance image, already there.",
        epilog="Examples:\n  cachefs doctor\n  cachefs status\n  cachefs prefetch --wait " + _ID,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"cachefs {__version__}")
    # Of names of their own: what a subcommand has by default would take the place of what was said before it.
    for option, name, about in (
        ("--config-file", "first_files", "before the command or after it; may be repeated"),
        ("--config-dir", "first_folders", "the same; all *.conf in it"),
    ):
        top.add_argument(option, dest=name, action="append", default=[], metavar="PATH", help=about)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(_add, commands)

    mount = add("mount", _mount, "run the node's daemon in the foreground", "mount /mnt/cachefs", json=False)
    mount.add_argument("mountpoint", nargs="?", help="where to mount; by default [mount]/mountpoint")
    add("status", _status, "show what the daemon holds and does", "status")
    add("images", _images, "list the images, and how much of each is cached", "images --json")
    image = add("image", _image, "show one image in full", f"image {_ID}")
    image.add_argument("id", metavar="ID", help=_NAMED)
    top_ = add("top", _top, "watch what moves, until q or Ctrl-C; with --json, one look", "top --interval 2")
    top_.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between two looks")
    for name, run, about in (
        ("pin", _pin, "keep what is cached of images, whatever room is needed"),
        ("unpin", _unpin, "end the pins of images"),
        ("prefetch", _prefetch, "fetch all of images in the background"),
        ("evict", _evict, "drop what is cached of images; refused while one is leased"),
    ):
        command = add(name, run, about, f"{name} {'--wait ' if name == 'prefetch' else ''}{_ID}")
        command.add_argument("ids", nargs="+", metavar="ID", help=_NAMED)
        if name == "prefetch":
            command.add_argument("--wait", action="store_true", help="until all of it is here, with progress")
        if name == "evict":
            command.add_argument(
                "--touched", action="store_true", help="also what only a touch leases: it ends such leases"
            )
    precache = add(
        "precache", _precache, "ask the policies which images to hold, and do what they decide",
        "precache --dry-run",
    )  # fmt: skip
    precache.add_argument("--dry-run", action="store_true", help="only say what they decide, and why")
    scrub = add(
        "scrub", _scrub, "compare everything that is cached with its digests, in the daemon", "scrub --wait"
    )
    scrub.add_argument("--wait", action="store_true", help="until it is done; the exit status says what was found")
    check = add("check", _check, "verify a store that no daemon has open", "check --store /var/lib/cachefs")
    check.add_argument("--store", metavar="PATH", help="the store's folder; by default [store]/path")
    check.add_argument("--repair", action="store_true", help="make what is damaged absent, and the rest agree")
    doctor = add("doctor", _doctor, "try all that the daemon needs; say what is wrong, how to mend it", "doctor")
    doctor.add_argument("--timeout", type=_seconds, default=15.0, metavar="S", help="seconds for each check")
    report = add(
        "report", _report, "collect what a bug report needs, without secrets",
        "report -o /tmp/cachefs-report.tar.gz", json=False,
    )  # fmt: skip
    report.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="text, or .tar.gz; standard output by default"
    )
    report.add_argument("--timeout", type=_seconds, default=15.0, metavar="S", help="seconds for each part")

    debug = _group(commands, "debug", "look into the daemon")
    add("tasks", _debug_tasks, "where every task and thread stands, as SIGUSR1 logs it", "debug tasks", into=debug)

    trace = _group(
        commands, "trace", "list boot traces, or carry them to other nodes",
        "A boot trace is what guests read first of an image, and in which order. cachefs records it at a boot, "
        "and fetches it ahead at the next. It has numbers only, nothing of what is in the image.",
    )  # fmt: skip
    add("list", _trace_list, "show of which images a trace is known, and how much it is", "trace list", into=trace)
    exported = add(
        "export", _trace_export, "write traces into one file, for other nodes",
        "trace export -o boots.traces", json=False, into=trace,
    )  # fmt: skip
    exported.add_argument("ids", nargs="*", metavar="ID", help=f"{_NAMED}; all traces by default")
    exported.add_argument("-o", "--output", default="-", metavar="FILE", help="standard output by default")
    imported = add(
        "import", _trace_import,
        "read traces that `cachefs trace export` wrote, in place of what is known of these images",
        "trace import boots.traces", into=trace,
    )  # fmt: skip
    imported.add_argument("file", metavar="FILE", help="what was exported, or - for standard input")

    config = _group(commands, "config", "show or check the configuration")
    add(
        "sample", _config_sample, "print a commented sample", "config sample > /etc/cachefs/cachefs.conf",
        config=False, json=False, into=config,
    )  # fmt: skip
    add(
        "check", _config_check, "name every unknown option, wrong value and contradiction", "config check",
        into=config,
    )  # fmt: skip
    completion = add(
        "completion", _completion, "print the completion of a shell",
        "completion bash > /etc/bash_completion.d/cachefs", json=False,
    )  # fmt: skip
    completion.add_argument(
        "what", choices=["bash", "images"],
        help="bash: what the shell is to read; images: what that asks for when an image is to be named",
    )  # fmt: skip
    completion.add_argument("--begun", default="", metavar="TEXT", help="only what begins with it; of images")
    return top


_Commands = argparse._SubParsersAction  # What argparse gives for subcommands has no public name.


def _add(
    commands: _Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    about: str,
    example: str,
    *,
    config: bool = True,
    json: bool = True,
    into: _Commands[argparse.ArgumentParser] | None = None,
) -> argparse.ArgumentParser:
    command = (into or commands).add_parser(
        name,
        help=about,
        description=about[:1].upper() + about[1:] + ".",
        epilog=f"Example:\n  cachefs {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    for option, about in (("--config-file", "may be repeated"), ("--config-dir", "all *.conf in it")):
        about = about if config else "taken as by all commands; it changes nothing here"
        command.add_argument(option, action="append", default=[], metavar="PATH", help=about)
    if json:
        command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _group(
    commands: _Commands[argparse.ArgumentParser], name: str, about: str, more: str = ""
) -> _Commands[argparse.ArgumentParser]:
    description = f"{about[:1].upper()}{about[1:]}. {more}".strip()
    group = commands.add_parser(name, help=about, description=description)
    return group.add_subparsers(dest="action", required=True, metavar="ACTION")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value


# ── The daemon ────────────────────────────────────────────────────────────────────────────────────────


def _mount(arguments: argparse.Namespace) -> int:
    gc.disable()  # Nothing of what is imported goes again, and looking for it is a tenth of the start.
    from cachefs import config, daemon  # Half a second that no other command needs.

    gc.enable()

    overrides = {"mount/mountpoint": os.path.abspath(arguments.mountpoint)} if arguments.mountpoint else {}
    try:
        loaded = config.load(arguments.config_file, arguments.config_dir, overrides)
    except ConfigError as error:
        others = len(config.check(arguments.config_file, arguments.config_dir, overrides)) - 1
        if others > 0:
            more = f"{counted(others, 'more fault')}: `cachefs config check` names them all"
            raise ConfigError(error.option, f"{error.reason}; and {more}") from error
        raise
    loaded.log.start()
    daemon.run(loaded)
    return DONE


# ── Requests to it ────────────────────────────────────────────────────────────────────────────────────


def _asker(arguments: argparse.Namespace) -> Ask:
    """Puts requests to the daemon of this configuration; of where a daemon without one listens, if there is
    none."""
    path = asking.socket_path(arguments.config_file, arguments.config_dir)
    return partial(asking.ask, _configured_socket(arguments) if path is None else path)


def _configured_socket(arguments: argparse.Namespace) -> str:
    from cachefs import config  # Half a second of imports.

    try:
        return config.load(arguments.config_file, arguments.config_dir, {}).control.socket
    except ConfigError as error:
        if error.option != asking.DEFAULT_FILE or error.reason != config.NO_FILE:
            raise
        if not os.path.exists(asking.DEFAULT_SOCKET):
            raise
        return asking.DEFAULT_SOCKET


def _ask(arguments: argparse.Namespace, command: str, **operands: Any) -> Any:
    return _asker(arguments)(command, **operands)


def _print_json(value: Any, name: str = "") -> int:
    print_json(value, name)
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    found = _ask(arguments, "status")
    if arguments.json:
        return _print_json(found)
    print_rows(answers.status_rows(found))
    return DONE


def _images(arguments: argparse.Namespace) -> int:
    ask = _asker(arguments)
    found, glance = ask("images"), _glance(ask)
    if arguments.json:
        return _print_json({"images": found, "glance": glance})
    if glance["reason"] is not None:
        known = f". Shown is what was known before, {answers.listed_words(glance.get('listed'))}" if found else ""
        _say(f"{glance['reason']}{known}")
    header, rows = answers.images_table(found, columns_of(sys.stdout) if is_terminal(sys.stdout) else None)
    print_table(header, rows, right=("SIZE", "CACHED"), drop=("FORMAT", "SIZE", "PRIORITY", "PINNED"))
    if is_terminal(sys.stdout):
        _images_notes(found, glance)
    return DONE


def _images_notes(found: Sequence[Mapping[str, Any]], glance: Mapping[str, Any]) -> None:
    """What the rows do not say; not in a pipe, where each line is an image."""
    if "listed" in glance:  # Not of a daemon that was not restarted since this command was installed.
        print_note(f"{counted(len(found), 'image')}, {answers.listed_words(glance['listed'])}")
    if (words := answers.namesakes_words(found)) is not None:
        print_note(words)


def _glance(ask: Ask) -> dict[str, Any]:
    """Whether the list is Glance's own."""
    try:
        return dict(ask("glance"))
    except Refused:  # A daemon that was not restarted since this command was installed.
        return {"reached": None, "trouble": None, "reason": None}


def _image(arguments: argparse.Namespace) -> int:
    ask = _asker(arguments)
    meant, unclear = _meant(ask, [arguments.id])
    try:
        if unclear:
            raise Refused(unclear[0]["error"])
        found = ask("image", image=meant[0])
    except Refused as refused:
        if arguments.json:  # As pin and the like have it.
            _print_json({"id": arguments.id, "error": str(refused)})
        raise
    if arguments.json:
        return _print_json({**found, "error": None})
    print_rows(answers.image_rows(found))
    return DONE


def _top(arguments: argparse.Namespace) -> int:
    from cachefs import top

    ask = _asker(arguments)
    if arguments.json:
        return _print_json({"status": ask("status"), "moving": ask("flights")})
    top.run(ask, arguments.interval)
    return DONE


def _pin(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "pin", lambda row: f"pinned, {size(row['size'])}")


def _unpin(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "unpin", lambda row: "unpinned" if row["was_pinned"] else "was not pinned")


def _evict(arguments: argparse.Namespace) -> int:
    def said(row: dict[str, Any]) -> str:
        if not row["done"]:
            return f"{size(row['bytes'])} freed so far; it goes on"
        if not row["spans"]:
            return "was not cached"
        cached = row.get("cached", 0)  # Not of a daemon that was not restarted since this command was installed.
        rest = f", the rest of {size(cached)} is zeros or shared with other images; a prefetch fetches it, too"
        return f"evicted; {size(row['bytes'])} freed" + (rest if row["bytes"] < cached else "")

    return _tell(arguments, "evict", said, **({"touched": True} if arguments.touched else {}))


def _tell(
    arguments: argparse.Namespace, command: str, said: Callable[[dict[str, Any]], str], **operands: Any
) -> int:
    """Asks for something to be done with images; one line for each, on stderr for those that were refused."""
    ask = _asker(arguments)
    meant, unclear = _meant(ask, arguments.ids)
    rows = ask(command, images=meant, **operands) if meant else []
    return _show_told(arguments, [*rows, *unclear], said)


def _meant(ask: Ask, texts: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The ids of the images that are meant, and an answer for each text that means none, or several."""
    if all(_FULL_ID.fullmatch(text) for text in texts):
        return list(texts), []
    try:
        rows = ask("which", texts=list(texts))
    except Refused:  # A daemon that was not restarted since this command was installed.
        return list(texts), []
    meant = list(dict.fromkeys(row["id"] for row in rows if row["error"] is None))
    return meant, [{"id": row["text"], "error": row["error"]} for row in rows if row["error"] is not None]


def _show_told(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], said: Callable[[dict[str, Any]], str]
) -> int:
    if arguments.json:
        _print_json(rows, "images")
    for row in rows:
        if row["error"] is not None:
            _say(row["error"])
        elif not arguments.json:
            print_sentence(f"{row['id']}: {said(row)}")
    return DONE if all(row["error"] is None for row in rows) else FAILED


def _prefetch(arguments: argparse.Namespace) -> int:
    if not arguments.wait:
        return _tell(arguments, "prefetch", _prefetched)
    ask = _asker(arguments)
    meant, unclear = _meant(ask, arguments.ids)
    try:
        rows = waiting.prefetched(ask, meant, quiet=arguments.json) if meant else []
    except KeyboardInterrupt:
        _say(f"it goes on in the daemon; `cachefs evict {' '.join(meant)}` ends it, and drops what is here")
        raise
    return _show_told(arguments, [*rows, *unclear], lambda row: f"{size(row['size'])} is here")


def _prefetched(row: Mapping[str, Any]) -> str:
    if row["cached"] >= row["size"]:
        return f"{size(row['size'])} is here, all of it"
    return f"{size(row['cached'])} of {size(row['size'])} is here; the rest comes in the background"


def _precache(arguments: argparse.Namespace) -> int:
    ask = _asker(arguments)
    number = ask("precache", dry_run=arguments.dry_run)["run"]
    while not (found := ask("precache-run", run=number))["finished"]:
        time.sleep(0.2)
    if arguments.json:
        _print_json(found)
    elif found["error"] is None:
        _show_precache(found)
    if found["error"] is not None:
        _say(f"nothing changes: {found['error']}")
    for policy, why in found["failed"].items():
        _say(f"policy {policy} failed, what it decided last stands: {why}")
    return FAILED if found["error"] is not None or found["failed"] else DONE


def _show_precache(found: Mapping[str, Any]) -> None:
    columns = columns_of(sys.stdout) if is_terminal(sys.stdout) else None
    cells = answers.with_short_ids(answers.PRECACHE_HEADER, answers.precache_cells(found), columns)
    drop = ("TO FETCH", "POLICY", "SIZE", "REASON")
    print_table(answers.PRECACHE_HEADER, cells, right=("SIZE", "TO FETCH"), drop=drop)
    if found["rows_left_out"]:
        print(f"and {found['rows_left_out']} more")
    print_sentence(
        f"{counted(found['held_images'], 'image')} held: {size(found['held_bytes'])} of the "
        f"{size(found['share'])} that they may; {size(found['cost'])} to fetch"
        + ("; nothing was done" if found["dry_run"] else "")
    )


def _scrub(arguments: argparse.Namespace) -> int:
    if not arguments.wait:
        started = _ask(arguments, "scrub")
        if arguments.json:
            return _print_json(started)
        print("a scrub is running already" if started.get("was_running") else "a scrub has begun", end="")
        print(" (cachefs status shows it)")
        return DONE
    try:
        last = waiting.scrubbed(_asker(arguments), quiet=arguments.json)
    except CachefsError as error:
        _say(error)
        return UNFINISHED
    except KeyboardInterrupt:
        words = "it goes on in the daemon (cachefs status shows it) until all is compared"
        _say(f"{words}; a restart of the daemon only interrupts it")
        raise
    if last is None:
        _say("the scrub did not come to an end; the daemon's log says why")
        return UNFINISHED
    if arguments.json:
        _print_json(last)
    else:
        for fault in last["faults"]:
            print(f"damaged index: {fault}")
        print_sentence(
            f"{size(last['bytes_verified'])} verified: {counted(last['rotten'], 'chunk')} rotten, "
            f"{counted(last['healed'], 'span')} to be fetched again, {last['waiting']} when Glance is back, "
            f"{last['lost']} lost, {counted(last['faults_in_all'], 'fault')} of the index"
        )
    return int(last["exit_status"])


def _debug_tasks(arguments: argparse.Namespace) -> int:
    from cachefs import report

    found = _ask(arguments, "debug-tasks")
    if arguments.json:
        return _print_json(found)
    print(report.tasks_text(found))
    return DONE


def _trace_list(arguments: argparse.Namespace) -> int:
    rows = _ask(arguments, "trace-list")
    if arguments.json:
        return _print_json(rows, "traces")
    cells = answers.traces_cells(rows, columns_of(sys.stdout) if is_terminal(sys.stdout) else None)
    print_table(answers.TRACES_HEADER, cells, right=("READ FIRST", "PIECES"), drop=("PIECES", "RECORDED", "FILE"))
    if is_terminal(sys.stdout) and not rows:
        print_note("no boot trace is known yet: one is recorded when a guest reads an image for the first time")
    return DONE


def _trace_export(arguments: argparse.Namespace) -> int:
    from cachefs import trace_cli

    if arguments.output == "-" and sys.stdout.isatty():
        _say("a trace is no text: name a file with -o")
        return FAILED
    ask = _asker(arguments)
    meant, unclear = _meant(ask, arguments.ids) if arguments.ids else ([], [])
    for row in unclear:
        _say(row["error"])
    if unclear:
        return FAILED
    data, count, lacking = trace_cli.exported(ask, meant)
    for image in lacking:
        _say(f"no boot trace of {image} is known")
    if lacking and not count:
        return FAILED
    if arguments.output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    else:
        trace_cli.write(arguments.output, data)
        print(f"{counted(count, 'boot trace')}, {size(len(data))}, in {arguments.output}")
    return FAILED if lacking else DONE


def _trace_import(arguments: argparse.Namespace) -> int:
    from cachefs import trace_cli

    found = trace_cli.imported(_asker(arguments), trace_cli.read(arguments.file))
    if arguments.json:
        return _print_json({"imported": len(found), "contents": [named.content for named in found]})
    print(f"{counted(len(found), 'boot trace')} imported")
    return DONE


# ── Without it ────────────────────────────────────────────────────────────────────────────────────────


def _doctor(arguments: argparse.Namespace) -> int:
    from cachefs import doctor

    _leave_mounts(arguments)
    found = doctor.examine(arguments.config_file, arguments.config_dir, arguments.timeout)
    if arguments.json:
        _print_json(doctor.as_fields(found))
    else:
        doctor.show(found)
    return FAILED if any(row.state == doctor.PROBLEM for row in found) else DONE


def _leave_mounts(arguments: argparse.Namespace) -> None:
    """So that nothing waits for a mount that hangs, because somebody stands in it."""
    from cachefs import doctor

    arguments.config_file = [os.path.abspath(os.path.expanduser(path)) for path in arguments.config_file]
    arguments.config_dir = [os.path.abspath(path) for path in arguments.config_dir]
    doctor.leave_mounts()


def _report(arguments: argparse.Namespace) -> int:
    from cachefs import report

    if arguments.output != "-":
        arguments.output = os.path.abspath(arguments.output)
    _leave_mounts(arguments)
    parts = report.collect(arguments.config_file, arguments.config_dir, arguments.timeout)
    if arguments.output == "-":
        print(report.as_text(parts), end="")
    else:
        report.write(arguments.output, parts)
        print(f"{arguments.output}: {len(parts)} parts. Look through it before you send it.")
    return DONE


def _check(arguments: argparse.Namespace) -> int:
    refused = DAMAGED if arguments.repair else FAILED  # 1 would say that it was repaired.
    try:
        return _checked(arguments)
    except StoreLocked as error:
        _say(f"{error}: `cachefs scrub` verifies while that runs, `cachefs check` once it has ended")
        return refused
    except CachefsError as error:
        _say(error)
        return refused


def _checked(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from cachefs.store.check import check
    from cachefs.store.recover import repair_store

    path = arguments.store
    if path is None:
        from cachefs import config

        path = config.store_path(arguments.config_file, arguments.config_dir)
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
    print(
        f"{outcome}: {counted(report.spans, 'span')}, {counted(report.chunks, 'chunk')}, "
        f"{size(report.bytes_verified)} verified"
    )
    return status


def _finding(found: Finding) -> dict[str, str]:
    return {"severity": found.severity.value, "where": found.where, "what": found.what}


def _config_sample(arguments: argparse.Namespace) -> int:
    from cachefs.config_sample import sample

    print(sample(), end="")
    return DONE


def _config_check(arguments: argparse.Namespace) -> int:
    from cachefs import config, config_doubts

    faults = config.check(arguments.config_file, arguments.config_dir)
    doubts = config_doubts.warnings(arguments.config_file, arguments.config_dir)
    if arguments.json:
        rows = [{"option": fault.option, "reason": fault.reason} for fault in faults]
        _print_json({"sound": not faults, "faults": rows, "warnings": doubts})
        return FAILED if faults else DONE
    for fault in faults:
        print(fault, file=sys.stderr)
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    if not faults:
        print("the configuration is sound")
    return FAILED if faults else DONE


def _completion(arguments: argparse.Namespace) -> int:
    if arguments.what == "images":
        try:
            ask = _asker(arguments)
            print("\n".join(ask("offer", begun=arguments.begun, wait_s=COMPLETION_WAIT_S)))
        except CachefsError:
            return FAILED  # Silent: somebody is in the middle of a line.
        return DONE

    from cachefs import completion

    print(completion.bash(parser()), end="")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
