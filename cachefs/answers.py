"""What the daemon answers, in words: `status`, `images`, `image`, `precache`, `trace list`. Rule: it asks for
nothing; what comes from elsewhere is made printable.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cachefs.namespace import link_name
from cachefs.words import counted, duration, printable, rate, size, width

Rows = list[tuple[str, str]]

# From here on it is also said at what time something was.
OLD_S = 600
# Of the hash of a content: all that somebody would compare, and where there is less room.
CONTENT_SHOWN, CONTENT_CUT = 36, 16
# Of names that several images have.
NAMES_SHOWN = 5


def at_once(ways: Mapping[str, int]) -> int:
    """Of reads by outcome, those that waited for nothing: of what the kernel has in memory, or what is on its way
    to the store."""
    return ways["hit"] + ways["memory"]


def status_rows(found: Mapping[str, Any]) -> Rows:
    store, reads, fetcher, disk = found["store"], found["reads"], found["fetcher"], found["store"]["disk"]
    evictor, ways = found["evictor"], reads["by_outcome"]
    evicted = sum(cause["bytes"] for cause in evictor["evicted"].values())
    rows = [
        ("state", found["ready"]["state"]),
        ("mounted on", found["mountpoint"]),
        ("daemon", f"cachefs {found['version']}, pid {found['pid']}, up {duration(found['uptime'])}"),
        ("Glance", found["images"]["glance_reason"] or _glance_words(found)),
        ("images", _images_words(found["images"])),
        (
            "store",
            f"{store['path']}: {size(store['bytes_cached'])} of images in {size(store['bytes_on_disk'])} "
            f"of {size(store['bytes_limit'])}",
        ),
        (
            "reads",
            f"{at_once(ways)} at once, {ways['disk']} from disk, {ways['miss']} from Glance, "
            f"{reads['waiting']} waiting",
        ),
        (
            "fetched",
            f"{size(fetcher['bytes_fetched'])} in {counted(fetcher['requests'], 'request')}, "
            f"{fetcher['flights']} under way",
        ),
        (
            "since start",
            f"{size(store['bytes_shared'])} not stored, as it was there already; {size(store['bytes_zero'])} of "
            f"zeros; {size(evicted)} evicted",
        ),
        ("pinned", f"{counted(evictor['pinned_images'], 'image')}, {size(evictor['pinned_bytes'])}"),
        ("instances", instances_words(found["instances"])),
        *_nova_rows(found["nova"]),
        ("scrub", _scrub_words(found["scrub"])),
        *_precache_rows(found["precache"]),
    ]
    if disk["state"] != "healthy":
        rows.append(("disk", f"{disk['state']}: {disk['why']}"))
    if evictor["stuck"]:
        rows.append(("full", evictor["stuck"]))
    if store["trouble"]:
        rows.append(("not kept", f"{size(store['bytes_not_kept'])}: {store['trouble']}"))
    rows += [("at risk", f"{image}: {why}") for image, why in found["hydration"]["at_risk"].items()]
    rows += _origin_rows(found["origin"])
    return [(name, printable(value)) for name, value in rows]


def _images_words(images: Mapping[str, Any]) -> str:
    words = f"{images['known']} known, {images['open']} open"
    if "listed" not in images:  # A daemon that was not restarted since this command was installed.
        return words
    return f"{words}; {listed_words(images['listed'])}"


def listed_words(listed: float | None) -> str:
    """From when the list of images is; `listed` in seconds since the epoch."""
    if listed is None:
        return "not listed by Glance since the daemon's start"
    ago_s = max(time.time() - listed, 0)
    words = f"listed by Glance {duration(ago_s)} ago"
    return words + (f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(listed))}" if ago_s >= OLD_S else "")


def namesakes_words(found: Sequence[Mapping[str, Any]]) -> str | None:
    """Why `by-name` lacks images of a listing; None where it lacks none for this."""
    shared: dict[str, list[str]] = {}
    for row in found:
        if row.get("same_name"):
            shared.setdefault(row["name"], []).append(row["id"])
    if not shared:
        return None
    length = distinct([row["id"] for row in found])
    some = [f"{name} ({', '.join(id_[:length] for id_ in ids)})" for name, ids in shared.items()]
    more = f" and {len(some) - NAMES_SHOWN} more" if len(some) > NAMES_SHOWN else ""
    whose = "this name, which several images have" if len(some) == 1 else "names that several images have"
    return printable(f"by-name/ has no link for {whose}: {', '.join(some[:NAMES_SHOWN])}{more}")


def _glance_words(found: Mapping[str, Any]) -> str:
    """Of a Glance that answers: which, and what a request costs."""
    fetcher = found["fetcher"]
    in_use = [e["url"] or "the catalog's endpoint" for e in found["origin"]["endpoints"] if e["in_use"]]
    words = f"{in_use[0]} answers" if in_use else "answers"
    if fetcher["link_bytes_per_second"]:
        words += f", {fetcher['request_cost_ms']:.0f} ms a request and {rate(fetcher['link_bytes_per_second'])}"
    return words


def _origin_rows(origin: Mapping[str, Any]) -> Rows:
    """What is wrong with endpoints, the identity service, and images that cannot be had."""
    away = [e for e in origin["endpoints"] if e["state"] != "closed"]
    rows = [("endpoint", f"{e['url'] or 'of the catalog'} is left alone: {e['last_error']}") for e in away]
    if origin["identity"]["trouble"]:
        rows.append(("identity", origin["identity"]["trouble"]))
    return rows + [("cannot fetch", f"{image}: {trouble['error']}") for image, trouble in origin["images"].items()]


def instances_words(instances: Mapping[str, Any]) -> str:
    """How many disks stand on how many images, and which folder of them cannot be looked at."""
    verb = "stands" if instances["disks"] == 1 else "stand"
    if instances["images"] and not instances["disks"]:
        stay = "stays" if instances["images"] == 1 else "stay"
        words = f"no disks any more; {counted(instances['images'], 'image')} {stay} leased for [leases] grace"
    else:
        words = f"{counted(instances['disks'], 'disk')} {verb} on {counted(instances['images'], 'image')}"
    for folder in instances["folders"]:
        if folder["trouble"] is not None:
            words += f"; {folder['path']}: {folder['trouble']}"
        elif folder["unread"]:
            unread = counted(folder["unread"], "file or folder", "files or folders")
            words += f"; {folder['path']}: {unread} cannot be read"
    return words


def _nova_rows(nova: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if nova is not None and (nova["files"] or nova["strangers"]):
        words = f"{counted(nova['files'], 'scratch file')}, {size(nova['bytes'])}"
        if nova["strangers"]:
            words += f"; {strangers_words(nova['strangers'])}"
        yield "nova/", words


def strangers_words(count: int) -> str:
    """Of what lies among the scratch files."""
    if count == 1:
        return "1 thing that is no plain file lies among them"
    return f"{count} things that are no plain files lie among them"


def _precache_rows(precache: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if precache["policies"] or precache["held_images"]:
        here = f"{size(precache['cached_bytes'])} of {size(precache['held_bytes'])}"
        yield (
            "pre-cached",
            f"{counted(precache['held_images'], 'image')}, {here}; {precache['pinned_images']} pinned",
        )
    if precache["error"] is not None:
        yield "policies", f"not asked: {precache['error']}"
    for policy, why in precache["failed"].items():
        yield "policies", f"{policy} failed: {why}"


def _scrub_words(scrub: Mapping[str, Any]) -> str:
    words = str(scrub["state"] if scrub["share"] is None else f"{scrub['state']}, {scrub['share']:.0%} done")
    if scrub["ended"]:
        words += f"; the last ended {time.strftime('%Y-%m-%d %H:%M', time.localtime(scrub['ended']))}"
    if scrub["rotten"] or scrub["lost"]:
        words += f"; {counted(scrub['rotten'], 'chunk')} rotten, {counted(scrub['lost'], 'span')} lost"
    return words


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Formats of files that a guest disk is inside of.
_AROUND_DISKS = frozenset({"qcow2", "vmdk", "vhd", "vhdx", "vdi", "ploop"})
# Where an id is cut: between its groups.
ID_LENGTHS = (8, 13, 18, 23)
IMAGES_HEADER = ("ID", "NAME", "FORMAT", "SIZE", "CACHED", "PINNED", "PRIORITY", "STATE")


def image_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (
        row["id"], row["name"] or "", row["disk_format"] or "", size(row["size"]), size(row["cached"]),
        "pinned" if row["pinned"] else "", row["priority"],
        row["state"] if row["status"] == "active" else row["status"],
    )  # fmt: skip
    return tuple(map(printable, cells))


def images_table(
    found: Sequence[Mapping[str, Any]], columns: int | None
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and rows; all of it where `columns` is None. On a terminal on which it does not fit, columns go that
    say the same of every image, and then of the ids all but what tells them apart: names are what people read, and
    commands take the beginning of an id."""
    header: Sequence[str] = IMAGES_HEADER
    rows: list[Sequence[str]] = [image_cells(row) for row in found]
    if columns is None or not rows or _columns(header, rows) <= columns:
        return header, rows
    for name, usual in (("PINNED", ""), ("PRIORITY", "normal")):
        at = header.index(name)
        if all(row[at] == usual for row in rows) and _columns(header, rows) > columns:
            header, rows = without(header, at), [without(row, at) for row in rows]
    return header, with_short_ids(header, rows, columns)


def with_short_ids(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None
) -> list[Sequence[str]]:
    """The rows, on a terminal on which a line does not fit with as much of the ids as tells them apart."""
    if columns is None or not rows or _columns(header, rows) <= columns:
        return list(rows)
    ids = {row[0] for row in rows if _ID.fullmatch(row[0])}
    length = distinct(list(ids))
    return [(row[0][: length if row[0] in ids else CONTENT_CUT], *row[1:]) for row in rows]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(width(row[at]) for row in [header, *rows]) + 2 for at in range(len(header))) - 2


def without(cells: Sequence[str], at: int) -> Sequence[str]:
    """The row without one of its columns."""
    return [*cells[:at], *cells[at + 1 :]]


def distinct(ids: Sequence[str]) -> int:
    """How many digits tell these ids apart."""
    return next((n for n in ID_LENGTHS if len({id_[:n] for id_ in ids}) == len(set(ids))), 36)


def _disk(disk: Mapping[str, Any] | None, disk_format: str | None, stored: int | None) -> str:
    """What is known of the guest disk of an image, in words. `stored`: how many bytes of it are stored as the
    disk's."""
    if disk is not None and disk.get("refused"):
        return f"refused: {disk['refused']}"
    if disk is None or disk.get("size") is None:
        return "not looked at yet: nobody asked for it"
    if disk_format not in _AROUND_DISKS:
        return f"{size(disk['size'])} (the file itself)"
    words = f"{size(disk['size'])} (inside the {disk_format})"
    if disk.get("verified"):
        return f"{words}, verified"
    return f"{words}, {size(stored)} of it stored" if stored is not None else words


def _no_link(name: str | None, status: str, same_name: Sequence[str] | None) -> str | None:
    """Why `by-name` does not have an image."""
    if not name or status == "gone" or same_name is None:
        return None
    if same_name:
        verb = "has" if len(same_name) == 1 else "have"
        return f"no link: {counted(len(same_name), 'other image')} {verb} this name: {', '.join(same_name)}"
    return "no link: a file cannot have this name" if link_name(name) is None else None


def image_rows(found: Mapping[str, Any]) -> Rows:
    """One image in full: what it is, what is here of it, why it is kept, what Glance says."""
    rest = dict(found)

    def take(*names: str) -> list[Any]:
        return [rest.pop(name, None) for name in names]

    id_, name, status, disk_format, container, whole = take(
        "id", "name", "status", "disk_format", "container_format", "size"
    )
    cached, state, origin, path, paths = take("cached", "state", "origin", "path", "paths")
    if paths is None:  # A daemon that was not restarted since this command was installed.
        paths = {"file": [path], "disk": [], "resized": None, "scratch": None}
    in_use, handles, leases, held, because = take("in_use", "handles", "leases", "held", "held_because")
    priority, why, condemned, changed = take("priority", "priority_because", "condemned", "origin_changed")
    algorithm, digest, checksum = take("os_hash_algo", "os_hash_value", "checksum")
    tags, properties, disk, disk_cached = take("tags", "properties", "disk", "disk_cached")
    by_name, same_name = take("by_name", "same_name")
    created_s, updated_s, *_ = take("created_s", "updated_s", "pinned", "number")
    kept = list(dict.fromkeys(str(lease) for lease in leases or ()))
    kept += [f"it is {because}" if because else "a policy holds it"] if held else []
    share = f" ({cached / whole:.0%})" if whole else ""
    rows: list[tuple[str, object]] = [
        ("image", id_),
        ("name", name),
        ("status", status),
        ("format", disk_format + (f" in {container}" if container and container != "bare" else "")
         if disk_format else None),
        ("size", f"{size(whole)} ({whole} bytes)"),
        ("cached", f"{size(cached)}{share}, {state}" + (f", comes by {origin}" if origin != "unknown" else "")),
        *[("file", at) for at in paths["file"] or ["it cannot be opened"]],
        ("by name", by_name or _no_link(name, status, same_name)),
        ("guest disk", _disk(disk, disk_format, disk_cached)),
        *[("disk file", at) for at in paths["disk"]],
        ("larger disk", f"{paths['resized']}/SIZE" if paths["resized"] else None),
        ("scratch file", f"{paths['scratch']} stands before it in nova/" if paths["scratch"] else None),
        ("open", counted(handles, "handle") if in_use or handles else "no"),
        *([("kept because", reason) for reason in kept] or [("kept", "no: it goes when room is needed")]),
        ("priority", f"{priority} ({why})" if why else priority),
        ("condemned", condemned),
        ("changed", changed if changed not in (False, 0) else None),
        ("hash", f"{algorithm} {digest}" if digest else f"md5 {checksum}" if checksum else None),
        ("created", _day(created_s)),
        ("updated", _day(updated_s)),
        ("tags", ", ".join(tags or ()) or None),
        *[("property", f"{key} = {value}") for key, value in sorted((properties or {}).items())],
    ]  # fmt: skip
    rows += [(key.replace("_", " "), _plain(value)) for key, value in sorted(rest.items())]
    return [(key, printable(str(value))) for key, value in rows if value not in (None, "")]


def _day(at_s: float | None) -> str | None:
    return None if at_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return ", ".join(map(str, value)) if isinstance(value, list) else value


PRECACHE_HEADER = ("ID", "NAME", "DECISION", "POLICY", "REASON", "SIZE", "TO FETCH", "WHY NOT")


def precache_cells(found: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        decision = row["keep"] if row["refused"] is None else "refused"
        why_not = row["refused"] or row["note"] or ""
        words = (row["image"], row["name"], decision, ", ".join(row["policies"]), row["reason"])
        return (*map(printable, words), size(row["size"]), size(row["cost"]), printable(why_not))

    gone = [
        tuple(map(printable, (row["image"], row["name"], "let go", ", ".join(row["policies"]), "", "", "", "")))
        for row in found["let_go"]
    ]
    return [cells(row) for row in found["rows"]] + gone


TRACES_HEADER = ("IMAGE", "NAME", "FILE", "READ FIRST", "PIECES", "RECORDED")
# In which folder of the mount a view is.
_FOLDERS = {"original": "images", "raw": "raw"}


def traces_cells(rows: Sequence[Mapping[str, Any]], columns: int | None) -> list[Sequence[str]]:
    """A row for each trace; one that no image here has is called as its content is. Ids are cut where a line does
    not fit."""
    return with_short_ids(TRACES_HEADER, [_trace_cells(row) for row in rows], columns)


def _trace_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    images = row["images"]
    name = (row.get("names") or [None])[0] or "" if images else "(no image here has it)"
    more = f" and {counted(len(images) - 1, 'other image')}" if len(images) > 1 else ""
    return (
        images[0] if images else row["content"][:CONTENT_SHOWN], (printable(name) + more).strip(),
        _FOLDERS.get(row["kind"], row["kind"]), size(row["blocks"] << 16), str(row["runs"]),
        time.strftime("%Y-%m-%d", time.localtime(row["recorded"])),
    )  # fmt: skip
