"""What cannot be read is set aside and never deleted; what can be is repaired at the start. Else: refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
import trio

from cachefs import cli
from cachefs.errors import StoreFormat, StoreUnusable
from cachefs.plan.extents import PAGE, Extent
from cachefs.store import format as f
from cachefs.store import pages
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import SegmentNo, SpanNo, Table, ViewNo
from cachefs.store.recover import CRASHES_MAX, open_store, repair_store
from tests import stores
from tests.stores import (
    SPAN,
    flip,
    image_id,
    land_all,
    padded,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)

CONTENT = random_bytes(1, SPAN + 9 * PAGE + 1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "store"

    async def main() -> None:
        async with running(folder) as store:
            store.put_image(image_id(1), {"name": "one", "number": store.new_image_number()})
            await land_all(store, view_of(store, 1, len(CONTENT)), CONTENT)

    trio.run(main)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store"


def data(folder: Path) -> Path:
    return folder / "index" / "data.mdb"


def asides(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("aside-"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "lock.mdb")
    }


def content(folder: Path) -> bytes | None:
    """What the store gives of the image's first span."""
    found: list[bytes | None] = []

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(CONTENT))
            await view.load(Extent(0, SPAN))
            found.append(await read(view, 0, SPAN))

    trio.run(main)
    return found[0]


def assert_set_aside(folder: Path, before: dict[str, bytes], log: str | None = None) -> None:
    """The store is empty and works, and everything of the old one is in one folder beside it."""
    (aside,) = asides(folder)
    assert re.fullmatch(r"aside-\d{8}T\d{6}Z(-\d+)?", aside.name)
    assert aside.stat().st_mode & 0o777 == 0o700
    if log is not None:
        assert log.count("set aside") == 1
        assert str(aside) in log
        assert "occupy the disk until you remove them" in log
    assert tree(aside) == before
    assert check(folder).sound
    assert check(folder).chunks == 0
    assert content(folder) is None
    assert check(folder).findings == []
    assert tree(aside) == before


# ── set aside ──

DAMAGES: dict[str, Callable[[Path], object]] = {
    "garbage": lambda folder: data(folder).write_bytes(random_bytes(2, 50_000)),
    "text": lambda folder: data(folder).write_text("precious"),
    "zeros": lambda folder: data(folder).write_bytes(bytes(data(folder).stat().st_size)),
    "an empty file": lambda folder: data(folder).write_bytes(b""),
    "no file": lambda folder: data(folder).unlink(),
    "no folder": lambda folder: shutil.rmtree(folder / "index"),
    "a torn first page": lambda folder: tear(folder, 0, 200),
    "a torn second page": lambda folder: tear(folder, PAGE, 200),
    "both first pages": lambda folder: tear(folder, 0, 2 * PAGE),
    "cut": lambda folder: os.truncate(data(folder), 3 * PAGE),
    "one meta of another version": lambda folder: flip(data(folder), 20),
    "no record of the store": lambda folder: stores.put(folder, Table.META, f.STORE_KEY, None),
    "a rotten record of the store": lambda folder: rot_store_record(folder, -1),
    "a rotten magic": lambda folder: rot_store_record(folder, 2),
    "a rotten format": lambda folder: rot_store_record(folder, 8),
    "a record of zeros": lambda folder: stores.put(folder, Table.META, f.STORE_KEY, bytes(40)),
    "a record of nothing": lambda folder: stores.put(folder, Table.META, f.STORE_KEY, b""),
    "a lost table": lambda folder: drop_table(folder, Table.SEGMENTS),
}


def tear(folder: Path, at: int, length: int) -> None:
    with data(folder).open("r+b") as file:
        file.seek(at)
        file.write(bytes(length))


def rot_store_record(folder: Path, at: int) -> None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        record = bytearray(snapshot.get(Table.META, f.STORE_KEY) or b"")
    record[at] ^= 2
    stores.put(folder, Table.META, f.STORE_KEY, bytes(record))


def drop_table(folder: Path, table: Table) -> None:
    with stores.index_of(folder) as index, index._env.begin(write=True) as txn:
        txn.drop(index._tables[table])


@pytest.mark.parametrize("name", DAMAGES)
def test_an_index_that_is_lost_or_unreadable_is_set_aside(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[name](folder)
    before = tree(folder)
    report = check(folder)
    assert [x.where for x in report.findings] == ["index"] * 2
    assert not report.sound
    assert tree(folder) == before, "check changes nothing"
    open_store(folder, SPAN).close()
    assert_set_aside(folder, {k: v for k, v in before.items() if not k.startswith("aside-")}, caplog.text)


@pytest.mark.parametrize("name", ["garbage", "no folder", "a rotten record of the store"])
def test_the_command_sets_aside_too(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES[name](folder)
    before = tree(folder)
    assert cli.main(["check", "--store", str(folder)]) == 2
    assert cli.main(["check", "--repair", "--store", str(folder)]) == 1
    assert f"repair: index and segments set aside in {asides(folder)[0]}\n" in capsys.readouterr().out
    assert_set_aside(folder, before)
    assert cli.main(["check", "--store", str(folder)]) == 0


def test_a_file_cut_at_any_length_harms_nobody(original: Path, tmp_path: Path) -> None:
    """Beyond the end of a file that is mapped waits SIGBUS: in processes of their own, so that it would show."""
    size = data(original).stat().st_size
    code = "import sys\nfrom pathlib import Path\nfrom cachefs.store.recover import open_store\n"
    code += "for path in sys.argv[1:]:\n    open_store(Path(path)).close()\n"
    folders = []
    for length in [*range(0, size, max(1, size // 40)), size - 1]:
        folder = tmp_path / str(length)
        shutil.copytree(original, folder)
        os.truncate(data(folder), length)
        folders.append(folder)
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, capture_output=True)
    set_aside = 0
    for folder in folders:
        assert check(folder).findings == []
        if aside := asides(folder):
            set_aside += 1
            assert data(aside[0]).stat().st_size == int(folder.name)
            assert tree(aside[0])["segments/0000000001.seg"] == tree(original)["segments/0000000001.seg"]
        else:  # Only pages that are free were cut off.
            assert content(folder) == CONTENT[:SPAN]
    assert set_aside > 20


def test_zeroed_pages_harm_nobody(original: Path, tmp_path: Path) -> None:
    """What the quick look of a start lets pass, LMDB reports; what neither sees, `check` does."""
    size = data(original).stat().st_size
    seen = 0
    for at in range(0, size, PAGE):
        folder = tmp_path / str(at)
        shutil.copytree(original, folder)
        tear(folder, at, PAGE)
        before = tree(folder)
        report, done, sound = repair_store(folder)
        assert sound
        if asides(folder):
            open_store(folder, SPAN).close()
            assert tree(asides(folder)[0]) == before
            assert not report.sound
            seen += 1
        else:
            assert report.sound, "the page was not in use"
            assert not done
        assert check(folder).findings == []
    assert seen >= 8


def test_an_earlier_one_is_never_overwritten(folder: Path, original: Path) -> None:
    kept: dict[str, dict[str, bytes]] = {}
    for n in range(4):
        if n:
            shutil.rmtree(folder / "index")
            shutil.rmtree(folder / "segments")
            shutil.copytree(original / "index", folder / "index")
            shutil.copytree(original / "segments", folder / "segments")
        data(folder).write_bytes(random_bytes(n, 9999))
        open_store(folder, SPAN).close()
        for aside in asides(folder):
            assert kept.setdefault(aside.name, tree(aside)) == tree(aside)
        assert len(kept) == n + 1


def test_a_crash_between_the_renames_loses_nothing(folder: Path) -> None:
    before = tree(folder)
    (folder / "aside-20260101T000000Z").mkdir()
    (folder / "index").rename(folder / "aside-20260101T000000Z" / "index")
    open_store(folder, SPAN).close()
    first, second = asides(folder)
    assert tree(first) | tree(second) == before
    assert content(folder) is None


def test_what_was_set_aside_is_not_looked_at_again(folder: Path) -> None:
    DAMAGES["garbage"](folder)
    open_store(folder, SPAN).close()
    for _ in range(3):
        open_store(folder, SPAN).close()
        assert check(folder).findings == []
    assert len(asides(folder)) == 1


def test_a_store_that_was_never_made_is_made(tmp_path: Path) -> None:
    """What a crash leaves of a beginning is no reason to set anything aside."""
    for n, name in enumerate(("index", "segments", "lock")):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "index").mkdir()
        if name == "segments":
            (folder / "segments").mkdir()
            data(folder).touch()
        if name == "lock":
            (folder / "lock").touch()
            stores.put(folder, Table.META, b"x", None)  # All tables, and nothing in them.
        open_store(folder).close()
        assert asides(folder) == []


# ── refused, and nothing renamed ──


def assert_refused(folder: Path, kind: type[StoreUnusable], match: str) -> None:
    before = tree(folder)
    for refused in (open_store, check, repair_store):
        with pytest.raises(kind, match=match):
            refused(folder)
    assert tree(folder) == before
    assert not any(path.name.startswith("aside-") for path in folder.iterdir())


def test_a_newer_format_is_refused(folder: Path) -> None:
    newer = f.MAGIC + (2).to_bytes(4, "little") + b"whatever format 2 has here"
    stores.put(folder, Table.META, f.STORE_KEY, newer)
    assert_refused(folder, StoreFormat, "it has format 2; this cachefs reads format 1: upgrade cachefs")


def test_a_newer_format_of_the_same_length_is_refused(folder: Path) -> None:
    record = f.MAGIC + (7).to_bytes(4, "little") + bytes(20)
    stores.put(folder, Table.META, f.STORE_KEY, f.seal(Table.META, f.STORE_KEY, record))
    assert_refused(folder, StoreFormat, "it has format 7")


def test_another_lmdb_is_refused(folder: Path) -> None:
    with data(folder).open("r+b") as file:
        for at in (20, PAGE + 20):
            file.seek(at)
            file.write(b"\x02")
    assert_refused(folder, StoreFormat, "its index is of LMDB's version 2, not 1")


@pytest.mark.parametrize("stranger", ["thesis.txt", "index/notes.txt", "segments/photo.jpg"])
def test_a_foreign_folder_is_refused(tmp_path: Path, stranger: str) -> None:
    path = tmp_path / "store" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert_refused(tmp_path / "store", StoreFormat, "holds no cachefs store")


def test_another_programs_index_is_refused(folder: Path) -> None:
    """It has an index/data.mdb too, and none of our tables."""
    shutil.rmtree(folder / "segments")
    data(folder).unlink()
    with lmdb.open(str(folder / "index"), max_dbs=1) as env:
        env.open_db(b"mails")
    assert_refused(folder, StoreFormat, "its index is another program's")


@pytest.mark.parametrize("part", ["index", "segments", "index/data.mdb"])
def test_a_planted_link_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (folder / part).rename(elsewhere)
    (folder / part).symlink_to(elsewhere)
    assert_refused(folder, StoreUnusable, "is a symbolic link")
    assert (folder / part).is_symlink()


def test_a_planted_link_in_place_of_the_new_folder_is_passed_by(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever guesses the name gains nothing: nothing is renamed into a folder that was there."""
    from datetime import UTC, datetime

    from cachefs.store import aside

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            return cls(2026, 11, 22, 20, 30, tzinfo=UTC)

    monkeypatch.setattr(aside, "datetime", Clock)
    (tmp_path / "elsewhere").mkdir()
    (folder / "aside-20261122T203000Z").symlink_to(tmp_path / "elsewhere")
    DAMAGES["garbage"](folder)
    open_store(folder, SPAN).close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (folder / "aside-20261122T203000Z-2" / "index" / "data.mdb").exists()


def test_a_segment_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    segment_file(folder).rename(tmp_path / "elsewhere")
    segment_file(folder).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    for refused in (open_store, repair_store, check):
        with pytest.raises(StoreUnusable, match="symbolic link"):
            refused(folder)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_disk_that_gives_errors_renames_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", pread)
        assert_refused(folder, StoreUnusable, "the index cannot be read: Input/output error")
    assert content(folder) == CONTENT[:SPAN]


def test_missing_permission_renames_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    inner = os.open

    def refusing(path: os.PathLike[str] | str, flags: int, *rest: int) -> int:
        if str(path).endswith("data.mdb"):
            raise PermissionError(13, os.strerror(13))
        return inner(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing)
        assert_refused(folder, StoreUnusable, "the index cannot be read: Permission denied")
    assert content(folder) == CONTENT[:SPAN]


def test_a_sealed_record_that_needs_the_other_span_size_is_refused(folder: Path) -> None:
    with pytest.raises(StoreUnusable, match="span_size"):
        open_store(folder, 2 * SPAN)
    assert asides(folder) == []


# ── repaired at the start ──


@pytest.mark.parametrize(
    ("table", "key", "kept"),
    [
        (Table.META, f.COUNTERS_KEY, True),
        (Table.SEGMENTS, f.segment_key(SegmentNo(1)), True),
        (Table.PUNCHES, f.Punch(SegmentNo(1), 0, PAGE).key, True),
        (Table.VIEWS, f.view_key(ViewNo(1)), False),
    ],
)
def test_a_rotten_record_refuses_no_store(
    folder: Path, table: Table, key: bytes, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stores.put(folder, table, key, b"rotten as can be")
    assert not check(folder).sound
    open_store(folder, SPAN).close()
    assert caplog.text.count("is repaired: ") == 1
    assert asides(folder) == []
    assert check(folder).findings == []
    assert content(folder) == (CONTENT[:SPAN] if kept else None)
    caplog.clear()
    open_store(folder, SPAN).close()
    assert caplog.text == ""


def test_numbers_are_not_given_twice_after_rot(folder: Path) -> None:
    stores.put(folder, Table.META, f.COUNTERS_KEY, b"")
    before = set(stores.chunks_of(folder))

    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 2, SPAN), random_bytes(5, SPAN))

    trio.run(main)
    new = set(stores.chunks_of(folder)) - before
    assert new
    assert min(new) > max(before)
    assert check(folder).sound
    assert content(folder) == CONTENT[:SPAN]


def test_a_repair_at_the_start_reads_no_segment(folder: Path) -> None:
    """It may not take long. What is rotten there is found when it is read, or by `cachefs check`."""
    chunk = next(iter(stores.chunks_of(folder).values()))
    flip(segment_file(folder), chunk.offset)
    stores.put(folder, Table.META, f.COUNTERS_KEY, b"")
    open_store(folder, SPAN).close()
    assert [x.what for x in check(folder).findings] == ["its bytes are not what its digest says"]


def test_a_repair_at_the_start_believes_nothing_beyond_a_files_end(folder: Path) -> None:
    os.truncate(segment_file(folder), SPAN // 2)
    stores.put(folder, Table.META, f.COUNTERS_KEY, b"")
    assert content(folder) is None
    assert check(folder).findings == []


# ── holders that crashed ──


def test_crashes_in_a_row_are_counted_and_end_with_a_look_at_every_page(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rot that kills whoever reads it: after some tries the start finds out before LMDB does."""
    chunks_page = page_of_table(folder, Table.CHUNKS)
    tear(folder, chunks_page * PAGE, PAGE)
    for n in range(CRASHES_MAX):
        child = os.fork()
        if child == 0:
            opened = open_store(folder)
            os.kill(os.getpid(), signal.SIGKILL if opened.lock.crashes == n else signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert asides(folder) == []
    open_store(folder, SPAN).close()
    assert len(asides(folder)) == 1
    assert f"page {chunks_page}" in caplog.text


def page_of_table(folder: Path, table: Table) -> int:
    """The root of its tree."""
    whole = data(folder).read_bytes()
    name = table.name.lower().encode()
    meta = pages.newest_meta(lambda at, n: whole[at : at + n])
    walk = pages._Walk(lambda at, n: whole[at : at + n], meta)
    for key, value in walk.tree(meta.main):
        if key == name:
            return pages.Tree(*pages._TREE.unpack(value)).root
    raise AssertionError


def test_an_orderly_end_ends_the_count(folder: Path) -> None:
    (folder / "lock").write_text("4711\n9\n")
    opened = open_store(folder)
    assert opened.lock.crashes == 0, "every page was looked at, and is sound"
    opened.close()
    assert (folder / "lock").read_text() == ""
    (folder / "lock").write_text("4711\n0\n")
    opened = open_store(folder)
    assert opened.lock.crashes == 1
    assert (folder / "lock").read_text() == f"{os.getpid()}\n1\n"
    opened.close()


@pytest.mark.parametrize("text", ["", "4711\n", "garbage", "1\n-5\n", "1\n²\n", "1\n2\n3\n", "\0" * 64])
def test_the_text_of_a_lock_may_be_anything(folder: Path, text: str) -> None:
    (folder / "lock").write_text(text)
    opened = open_store(folder)
    assert opened.lock.crashes == 0
    opened.close()


# ── making ──


def test_what_is_made_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the folders and of LMDB's file outlive a power loss."""
    synced: list[str] = []
    inner = os.fsync

    def fsync(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        inner(file)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "store"
    open_store(folder).close()
    assert synced == [str(tmp_path), str(folder), str(folder / "index")]
    synced.clear()
    open_store(folder).close()
    assert synced == []


def test_an_open_store_serves_what_it_did(folder: Path) -> None:
    assert content(folder) == CONTENT[:SPAN]
    store = Store.open(folder)
    store.close()
    assert padded(CONTENT, 0, PAGE) == CONTENT[:PAGE]
    assert f.span_key(ViewNo(1), SpanNo(0)) != b""
