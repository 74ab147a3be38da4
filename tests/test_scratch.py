"""Scratch files by themselves: without extended attributes, and by names that no kernel would give."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import trio

from cachefs.errors import ScratchFailed
from cachefs.scratch import FILES_MAX, Changes, Owner, Scratch, Totals

NOVA: Final = Owner(4242, 4243, 0o644)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def plain_store(tmp_path: Path) -> Iterator[Path]:
    """On a ramfs, which knows no extended attributes."""
    if os.geteuid() != 0:
        pytest.skip("mounts a ramfs, which needs root")
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=0700", "ramfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def on(store: Path, work: Callable[[Scratch], Awaitable[None]]) -> None:
    async def run() -> None:
        scratch = Scratch(store, NOVA)
        try:
            await work(scratch)
        finally:
            scratch.close()

    trio.run(run)


async def code_of(work: Awaitable[object]) -> int:
    with pytest.raises(ScratchFailed) as failed:
        await work
    return failed.value.code


def test_without_extended_attributes_files_belong_to_whom_the_folder_belongs(plain_store: Path) -> None:
    async def work(scratch: Scratch) -> None:
        file, attributes = await scratch.create(b"one", Owner(1, 2, 0o100664), os.O_RDWR)
        assert attributes.owner == NOVA
        assert await file.write(0, b"data") == 4
        assert await code_of(scratch.change(file.number, Changes(uid=7))) == errno.ENOTSUP
        assert await code_of(scratch.change(file.number, Changes(mode=0o600))) == errno.ENOTSUP
        assert (await scratch.change(file.number, Changes(size=2, uid=NOVA.uid, mtime_ns=5))).mtime_ns == 5
        assert await file.read(0, 10) == b"da"
        await scratch.release(file)
        # One that is meant for fewer than it would seem to be for is not made at all.
        assert await code_of(scratch.create(b"secret", Owner(1, 2, 0o600), os.O_RDWR)) == errno.ENOTSUP
        assert scratch.number_of(b"secret") is None
        assert await scratch.totals() == Totals(1, 4096, 0)

    on(plain_store, work)
    assert os.listdir(plain_store / "nova") == ["one"]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"../lock", b"/etc/passwd", b"a\0b", b"x" * 256])
def test_a_name_that_would_do_harm_is_none(name: bytes, store: Path) -> None:
    async def work(scratch: Scratch) -> None:
        assert await code_of(scratch.create(name, NOVA, os.O_RDWR)) in (errno.EINVAL, errno.ENAMETOOLONG)
        file, _ = await scratch.create(b"one", NOVA, os.O_RDWR)
        assert await code_of(scratch.rename(b"one", name, may_replace=True)) in (errno.EINVAL, errno.ENAMETOOLONG)
        assert await code_of(scratch.unlink(name)) == errno.ENOENT
        assert scratch.names() == [(b"one", file.number)]

    on(store, work)
    assert os.listdir(store) == ["nova"]


def test_there_is_an_end_to_how_many(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.scratch.FILES_MAX", 3)
    assert FILES_MAX > 3

    async def work(scratch: Scratch) -> None:
        for name in (b"1", b"2", b"3"):
            await scratch.create(name, NOVA, os.O_RDWR)
        assert await code_of(scratch.create(b"4", NOVA, os.O_RDWR)) == errno.ENOSPC
        await scratch.unlink(b"1")
        await scratch.create(b"4", NOVA, os.O_RDWR)

    on(store, work)
    assert sorted(os.listdir(store / "nova")) == ["2", "3", "4"]


def test_one_that_has_the_inode_of_another_is_told_from_it(store: Path) -> None:
    """Filesystems give the inode of what is gone to what is made next; the kernel may still ask for the other."""

    async def work(scratch: Scratch) -> None:
        before: list[int] = []
        inodes = set()
        for _ in range(20):
            file, attributes = await scratch.create(b"one", NOVA, os.O_RDWR)
            assert attributes.number == file.number
            assert await scratch.attributes(file.number) == attributes
            for number in before:
                assert await code_of(scratch.open(number, os.O_RDONLY)) == errno.ESTALE
                assert await code_of(scratch.attributes(number)) == errno.ESTALE
                assert await code_of(scratch.change(number, Changes(size=0))) == errno.ESTALE
            inodes.add((store / "nova" / "one").stat().st_ino)
            before.append(file.number)
            await scratch.release(file)
            await scratch.unlink(b"one")
            assert await code_of(scratch.attributes(file.number)) == errno.ESTALE
        assert len(set(before)) == 20 > len(inodes), "else nothing was tried"

    on(store, work)


async def made(scratch: Scratch, name: bytes) -> int:
    """A file that has its name in it. Returns its number."""
    file, _ = await scratch.create(name, NOVA, os.O_RDWR)
    assert await file.write(0, name) == len(name)
    await scratch.release(file)
    return file.number


def test_what_somebody_removed_from_the_folder_is_gone_and_can_be_made_again(store: Path) -> None:
    async def work(scratch: Scratch) -> None:
        names = [b"opened", b"asked", b"unlinked", b"renamed", b"made"]
        numbers = {name: await made(scratch, name) for name in names}
        for name in names:
            (store / "nova" / name.decode()).unlink()
        assert await code_of(scratch.open(numbers[b"opened"], os.O_RDONLY)) == errno.ENOENT
        assert await code_of(scratch.attributes(numbers[b"asked"])) == errno.ENOENT
        assert await code_of(scratch.unlink(b"unlinked")) == errno.ENOENT
        assert await code_of(scratch.rename(b"renamed", b"other", may_replace=True)) == errno.ENOENT
        assert scratch.names() == [(b"made", numbers[b"made"])]
        for name in names:
            await made(scratch, name)
            assert (store / "nova" / name.decode()).read_bytes() == name
        # One that is open is still a file, without a name.
        file, _ = await scratch.create(b"kept", NOVA, os.O_RDWR)
        (store / "nova" / "kept").unlink()
        assert await file.write(0, b"kept") == 4
        assert await code_of(scratch.unlink(b"kept")) == errno.ENOENT
        assert (await scratch.attributes(file.number)).size == 4

    on(store, work)


def test_a_name_whose_file_somebody_removed_never_means_another_one(store: Path) -> None:
    """Filesystems give the inode of what is gone to what is made next."""

    async def work(scratch: Scratch) -> None:
        for turn in range(20):
            (store / "nova" / f"{turn - 1}").unlink(missing_ok=True)
            await made(scratch, b"%d" % turn)
            assert [name for name, number in scratch.names() if scratch.number_of(b"%d" % turn) == number] == [
                b"%d" % turn
            ]

    on(store, work)


def test_a_rename_at_any_moment_loses_nobody_who_looks(store: Path) -> None:
    async def work(scratch: Scratch) -> None:
        file, _ = await scratch.create(b"a", NOVA, os.O_RDWR)

        async def look() -> None:
            for _ in range(200):
                assert (await scratch.attributes(file.number)).number == file.number

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            nursery.start_soon(look)
            for turn in range(200):
                old, new = (b"a", b"b") if turn % 2 == 0 else (b"b", b"a")
                await scratch.rename(old, new, may_replace=True)

    on(store, work)
