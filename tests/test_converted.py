"""Guest disks through a converter: real ones by qemu-nbd, and scripted ones that fail in every way. Rule: bytes
are compared with what `qemu-img convert` makes of the same image; time is virtual where a converter is scripted.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from cachefs.errors import ImageForbidden, OriginError, OriginLied, OriginUnavailable
from cachefs.plan.extents import Extent
from cachefs.sandbox import Limits
from cachefs.sources import nbd
from cachefs.sources.converted import (
    CRASH_FORGOTTEN_S,
    IDLE_S,
    PATIENCE_S,
    PROCESSES_MAX,
    TURN_BYTES,
    ConversionFailed,
    ConversionRefused,
    Converted,
    ToolMissing,
)
from cachefs.sources.converter import AGE_MAX_S, ConverterUnusable, QemuNbd, Tool
from cachefs.sources.nbd_input import WINDOW, Input, from_files
from tests.converters import ScriptedTool, Wire, children, helpers, pattern
from tests.flow import MIB, quiet, until, virtual_time
from tests.test_nbd import Bytes, Collected
from tests.test_sandbox import LACKING as NO_SANDBOX

DISK: Final = pattern(6 * MIB)
IMAGE: Final = "an image"

# Glance's name, qemu's name, and options.
FORMATS: Final = {
    "vmdk monolithicSparse": ("vmdk", "vmdk", "subformat=monolithicSparse"),
    "vmdk monolithicSparse, zeroed grains": ("vmdk", "vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    "vmdk version 6": ("vmdk", "vmdk", "compat6=on"),
    "vmdk streamOptimized": ("vmdk", "vmdk", "subformat=streamOptimized"),
    "vpc dynamic": ("vhd", "vpc", "subformat=dynamic"),
    "vpc dynamic, size forced": ("vhd", "vpc", "subformat=dynamic,force_size=on"),
    "vpc fixed": ("vhd", "vpc", "subformat=fixed"),
    "vpc fixed, size forced": ("vhd", "vpc", "subformat=fixed,force_size=on"),
    "vhdx dynamic": ("vhdx", "vhdx", "subformat=dynamic"),
    "vhdx dynamic, small blocks": ("vhdx", "vhdx", "subformat=dynamic,block_size=1M"),
    "vhdx fixed": ("vhdx", "vhdx", "subformat=fixed"),
    "vdi": ("vdi", "vdi", "static=off"),
    "vdi static": ("vdi", "vdi", "static=on"),
    "parallels": ("ploop", "parallels", "cluster_size=1M"),
    "parallels, small clusters": ("ploop", "parallels", "cluster_size=64k"),
}

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None or NO_SANDBOX is not None,
    reason=NO_SANDBOX or "qemu-nbd is not installed",
)


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert helpers() == []
    assert len(os.listdir("/proc/self/fd")) <= before


def qemu_img(*args: object) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest's disk with data, text that compresses, zeros and holes; no multiple of anything large."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    rng = random.Random(4)
    with path.open("wb") as file:
        for _ in range(60):
            file.seek(rng.randrange(40 * MIB) // 512 * 512)
            kind = rng.choice(["data", "text", "zeros"])
            length = rng.randrange(512, 300_000)
            file.write(
                {"data": rng.randbytes(length), "text": b"text " * (length // 5), "zeros": bytes(length)}[kind]
            )
        file.truncate(41 * MIB + 512 * 77)
    return path


@asynccontextmanager
async def running(converted: Converted) -> AsyncIterator[Converted]:
    async with trio.open_nursery() as nursery:
        await nursery.start(converted.run)
        yield converted
        nursery.cancel_scope.cancel()


async def read(converted: Converted, size: int, start: int, end: int, image: str = IMAGE) -> bytes:
    sink = Collected()
    await converted.fetch(image, size, Extent(start, end), sink)
    return bytes(sink.data)


# ── qemu-nbd ──


def of_file(path: Path, disk_format: str, **options: Any) -> Converted:
    opened = from_files(lambda image: os.open(path, os.O_RDONLY))
    return Converted(opened, lambda image: disk_format, options.pop("tool", QemuNbd()), **options)


@needs_qemu
@pytest.mark.parametrize("name", FORMATS)
def test_the_guest_disk_is_what_qemu_img_makes_of_it(name: str, disk: Path, tmp_path: Path) -> None:
    glance, driver, options = FORMATS[name]
    image, expected = tmp_path / "image", tmp_path / "expected"
    qemu_img("convert", "-f", "raw", "-O", driver, "-o", options, disk, image)
    image.chmod(0o600)  # Only the daemon may read it.
    qemu_img("convert", "-f", driver, "-O", "raw", image, expected)
    content = expected.read_bytes()
    rng = random.Random(name)

    async def main() -> None:
        async with running(of_file(image, glance)) as converted:
            assert await converted.size_of(IMAGE) == len(content)
            for _ in range(30):
                start = rng.randrange(len(content))
                end = min(start + rng.choice([1, 512, 4096, 65536, 3 * MIB]), len(content))
                assert await read(converted, len(content), start, end) == content[start:end]
            sink = Collected()
            timing = await converted.stream(IMAGE, len(content), sink)
            assert hashlib.sha256(sink.data).digest() == hashlib.sha256(content).digest()
            assert timing.first_byte_s > 0
            assert converted.processes == 1

    trio.run(main)


@needs_qemu
def test_a_sparse_disk_of_a_tebibyte_is_no_larger_than_what_is_read_of_it(tmp_path: Path) -> None:
    image, size = tmp_path / "image", 1 << 40
    qemu_img("create", "-f", "vmdk", image, size)

    async def main() -> None:
        async with running(of_file(image, "vmdk")) as converted:
            assert await converted.size_of(IMAGE) == size
            assert await read(converted, size, size - MIB, size) == bytes(MIB)

    trio.run(main)


@needs_qemu
@pytest.mark.parametrize(
    ("kind", "options"), [("vmdk", "subformat=monolithicFlat"), ("vmdk", "subformat=twoGbMaxExtentSparse")]
)
def test_what_names_other_files_finds_none(kind: str, options: str, disk: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", kind, "-o", options, disk, tmp_path / "image")

    async def main() -> None:
        async with running(of_file(tmp_path / "image", kind)) as converted:
            with pytest.raises(ConversionRefused, match="status 1"):
                await converted.size_of(IMAGE)

    trio.run(main)


@needs_qemu
def test_a_backing_file_is_not_followed(disk: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vmdk", disk, tmp_path / "base")
    qemu_img("create", "-f", "vmdk", "-b", tmp_path / "base", "-F", "vmdk", tmp_path / "image")
    size = disk.stat().st_size

    async def main() -> None:
        async with running(of_file(tmp_path / "image", "vmdk")) as converted:
            assert await read(converted, size, 0, size) == bytes(size)

    trio.run(main)


@needs_qemu
@pytest.mark.parametrize("said", ["vmdk", "vhdx", "vdi", "ploop"])
def test_another_format_than_glance_says_is_refused_and_not_guessed(
    said: str, disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vpc", disk, tmp_path / "image")
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        async with running(of_file(tmp_path / "image", said)) as converted:
            for _ in range(2):
                with pytest.raises(ConversionRefused, match="ended with status 1") as refused:
                    await converted.size_of(IMAGE)
                assert refused.value.errno == 1
            assert list(converted.refused) == [IMAGE]

    trio.run(main)
    # It was tried twice, and then no more.
    assert [record.getMessage().count("it said:") for record in caplog.records] == [1, 1, 0]


@needs_qemu
def test_a_converter_that_is_killed_is_started_anew_once(disk: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vdi", disk, tmp_path / "image")
    content = disk.read_bytes()

    def kill() -> None:
        (helper,) = helpers()
        (converter,) = children(helper)
        os.kill(converter, signal.SIGKILL)

    async def main() -> None:
        async with running(of_file(tmp_path / "image", "vdi")) as converted:
            assert await read(converted, len(content), 0, 512) == content[:512]
            kill()
            assert await read(converted, len(content), 0, len(content)) == content
            kill()
            with pytest.raises(ConversionRefused, match="was killed by SIGKILL"):
                await read(converted, len(content), 0, 512)
            converted.forget(IMAGE)
            assert await read(converted, len(content), 0, 512) == content[:512]

    trio.run(main)


@needs_qemu
def test_an_input_that_fails_is_not_held_against_the_image(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "vdi", disk, image)
    content = disk.read_bytes()
    source = Bytes(image.read_bytes(), failing=True)

    @asynccontextmanager
    async def opened(image: str) -> AsyncIterator[Input]:
        yield source

    async def main() -> None:
        async with running(Converted(opened, lambda image: "vdi", QemuNbd())) as converted:
            for _ in range(3):
                with pytest.raises(OriginUnavailable, match="it is away"):
                    await converted.size_of(IMAGE)
            source.failing = False
            assert await read(converted, len(content), 0, len(content)) == content
            source.failing = True
            with pytest.raises(OriginUnavailable, match="it is away"):
                await read(converted, len(content), 0, len(content))
            source.failing = False
            assert await read(converted, len(content), 0, len(content)) == content
            assert converted.refused == {}

    trio.run(main)


@needs_qemu
def test_limits_end_a_converter(disk: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vdi", disk, tmp_path / "image")

    async def main() -> None:
        tool = QemuNbd(limits=Limits(memory_bytes=32 << 20))
        async with running(of_file(tmp_path / "image", "vdi", tool=tool)) as converted:
            with pytest.raises(OriginError):
                await converted.size_of(IMAGE)

    trio.run(main)


def test_without_qemu_utils_the_refusal_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        converted = of_file(tmp_path / "image", "vmdk", tool=QemuNbd(searched=str(tmp_path)))
        async with running(converted):
            with pytest.raises(ToolMissing, match="qemu-utils is not installed") as missing:
                await converted.size_of(IMAGE)
            assert missing.value.errno == 1
            with pytest.raises(ToolMissing, match="qemu-utils is not installed"):
                await read(converted, MIB, 0, 512)
            assert converted.refused == {}  # It may be installed tomorrow.

    trio.run(main)


def test_other_formats_are_not_converted(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(of_file(tmp_path / "image", "qcow2", tool=ScriptedTool(serve))) as converted:
            with pytest.raises(ConversionRefused):
                await converted.size_of(IMAGE)

    trio.run(main)


# ── scripted converters, in virtual time ──


async def serve(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    await wire.serve(DISK)
    return 0


async def crash_at_once(wire: Wire, its_input: trio.socket.SocketType) -> int:
    return 1


async def crash_after_two(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    await wire.serve(DISK, reads_max=2)
    return -11


async def hang_at_once(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await trio.sleep_forever()
    return 0


async def hang_later(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    await trio.sleep_forever()
    return 0


async def drip(wire: Wire, its_input: trio.socket.SocketType) -> int:
    """A byte now and then."""
    await wire.shake_hands(len(DISK))
    cookie, _, _ = await wire.request()
    await wire.reply(cookie)
    while True:
        await trio.sleep(1)
        await wire.send(b"x")


async def lie(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    cookie, _, length = await wire.request()
    await wire.reply(cookie + 1000, bytes(length))
    await trio.sleep_forever()
    return 0


async def refuse(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    while True:
        cookie, _, _ = await wire.request()
        await wire.reply(cookie, code=22)


async def read_for_ever(wire: Wire, its_input: trio.socket.SocketType) -> int:
    await wire.shake_hands(len(DISK))
    async with trio.open_nursery() as nursery:
        client = await nbd.connect(its_input)
        nursery.start_soon(client.run)
        while True:
            await client.read_into(Extent(0, client.size), Collected())


async def read_then_serve(wire: Wire, its_input: trio.socket.SocketType) -> int:
    """As an honest one does: its input first, and each time another part of it."""
    async with trio.open_nursery() as nursery:
        client = await nbd.connect(its_input)
        nursery.start_soon(client.run)
        await client.read_into(Extent(0, 512), Collected())
        await wire.shake_hands(len(DISK))
        for at in itertools.count(WINDOW, WINDOW):
            cookie, offset, length = await wire.request()
            try:
                await client.read_into(Extent(at, at + 512), Collected())
                await wire.reply(cookie, DISK[offset : offset + length])
            except nbd.NbdRefused as error:
                await wire.reply(cookie, code=error.code)
    return 0


def scripted(tool: Tool, source: Bytes | None = None, **options: Any) -> Converted:
    @asynccontextmanager
    async def opened(image: str) -> AsyncIterator[Input]:
        yield source or Bytes(bytes(MIB))

    return Converted(opened, lambda image: "vhd", tool, **options)


@virtual_time
async def test_it_is_started_at_the_first_need_and_ends_a_minute_after_the_last() -> None:
    tool = ScriptedTool(serve)
    async with running(scripted(tool)) as converted:
        await trio.sleep(10)
        assert tool.drivers == []
        for _ in range(3):
            assert await read(converted, len(DISK), 5, 2 * MIB) == DISK[5 : 2 * MIB]
            await trio.sleep(IDLE_S - 1)
        assert tool.drivers == ["vpc"]
        assert (tool.running, converted.processes) == (1, 1)
        await trio.sleep(2)
        assert (tool.running, converted.processes) == (0, 0)
        assert await converted.size_of(IMAGE) == len(DISK)
        assert tool.drivers == ["vpc", "vpc"]
    assert tool.running == 0


@virtual_time
async def test_a_slow_sink_is_no_idleness_and_no_hang() -> None:
    class Slow(Collected):
        async def room(self) -> memoryview:
            await trio.sleep(IDLE_S + PATIENCE_S)
            return await super().room()

    tool = ScriptedTool(serve)
    async with running(scripted(tool)) as converted:
        sink = Slow()
        timing = await converted.stream(IMAGE, len(DISK), sink)
        assert sink.data == DISK
        assert timing.body_s > 60 * IDLE_S
        assert len(tool.drivers) == 1


@virtual_time
async def test_readers_share_one_and_each_gets_its_own() -> None:
    tool = ScriptedTool(serve)
    async with running(scripted(tool)) as converted, trio.open_nursery() as nursery:

        async def reader(start: int) -> None:
            assert await read(converted, len(DISK), start, len(DISK)) == DISK[start:]

        for start in range(0, len(DISK), MIB // 2):
            nursery.start_soon(reader, start)
    assert tool.drivers == ["vpc"]


@virtual_time
async def test_there_are_only_so_many_at_once_and_the_idle_make_way() -> None:
    tool = ScriptedTool(serve)
    async with running(scripted(tool)) as converted:
        async with trio.open_nursery() as nursery:

            async def reader(image: str) -> None:
                assert await read(converted, len(DISK), 0, len(DISK), image) == DISK

            for number in range(3 * PROCESSES_MAX):
                nursery.start_soon(reader, f"image {number}")
        assert tool.most == PROCESSES_MAX
        assert len(tool.drivers) == 3 * PROCESSES_MAX
        assert converted.processes == PROCESSES_MAX  # Nobody wants their places.


@virtual_time
async def test_a_long_read_gives_others_their_turn() -> None:
    size = TURN_BYTES + 2 * MIB
    order: list[str] = []

    async def zeros(wire: Wire, its_input: trio.socket.SocketType) -> int:
        await wire.shake_hands(size)
        while True:
            cookie, _, length = await wire.request()
            await wire.reply(cookie, bytes(length))

    class Forgetful(Collected):
        n = 0
        first = trio.Event()

        def arrived(self, n: int) -> None:
            self.n += n
            self.first.set()

    tool = ScriptedTool(zeros)
    async with running(scripted(tool, processes_max=1)) as converted, trio.open_nursery() as nursery:

        async def reader(image: str, length: int) -> None:
            sink = Forgetful()
            await converted.fetch(image, size, Extent(0, length), sink)
            assert sink.n == length
            order.append(image)

        nursery.start_soon(reader, "long", size)
        await Forgetful.first.wait()
        nursery.start_soon(reader, "short", MIB)
    assert order == ["short", "long"]
    assert (len(tool.drivers), tool.most) == (3, 1)


@virtual_time
async def test_a_reader_that_gives_up_waiting_leaves_nothing() -> None:
    tool = ScriptedTool(hang_later)
    async with running(scripted(tool, processes_max=1)) as converted, trio.open_nursery() as nursery:
        nursery.start_soon(read, converted, len(DISK), 0, 512, "one")
        await quiet()
        for image in ("one", "another"):
            with trio.move_on_after(1):
                await read(converted, len(DISK), 0, 512, image)
        assert len(tool.drivers) == 1
        nursery.cancel_scope.cancel()
    assert tool.running == 0


@virtual_time
async def test_one_crash_is_not_noticed() -> None:
    tool = ScriptedTool(crash_after_two, serve)
    async with running(scripted(tool)) as converted:
        assert await read(converted, len(DISK), 3, len(DISK)) == DISK[3:]
        assert len(tool.drivers) == 2
        assert converted.refused == {}


CRASHES: Final = {
    "ends at once": (crash_at_once, "ended with status 1"),
    "ends later": (crash_after_two, "was killed by SIGSEGV"),
    "hangs at once": (hang_at_once, "no answer for 60 s"),
    "hangs later": (hang_later, "no answer for 60 s"),
    "drips": (drip, "no answer for 60 s"),
    "lies": (lie, "a reply to nothing that was asked"),
    "reads for ever": (read_for_ever, "it reads without end"),
}


@pytest.mark.parametrize("name", CRASHES)
@virtual_time
async def test_two_crashes_are_a_refusal_for_everybody(name: str) -> None:
    script, reason = CRASHES[name]
    tool = ScriptedTool(script)
    async with running(scripted(tool)) as converted:
        refusals = 0

        async def reader() -> None:
            nonlocal refusals
            with pytest.raises(ConversionRefused, match=reason):
                await read(converted, len(DISK), 0, len(DISK))
            refusals += 1

        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
        assert refusals == 3
        assert trio.current_time() - began_s < 3 * PATIENCE_S
        await reader()
        assert len(tool.drivers) == 2
        assert reason in converted.refused[IMAGE]
        assert (tool.running, converted.processes) == (0, 0)


@virtual_time
async def test_a_crash_is_forgotten_after_an_hour() -> None:
    tool = ScriptedTool(crash_after_two)
    async with running(scripted(tool)) as converted:
        for _ in range(3):
            await read(converted, len(DISK), 0, 2 * MIB)
            await trio.sleep(CRASH_FORGOTTEN_S)
        assert converted.refused == {}
        assert len(tool.drivers) == 3


@virtual_time
async def test_an_honest_one_is_replaced_before_it_is_too_old() -> None:
    tool = ScriptedTool(serve)
    async with running(scripted(tool)) as converted:
        until_s = trio.current_time() + 3 * AGE_MAX_S
        while trio.current_time() < until_s:
            assert await read(converted, len(DISK), 7, 512) == DISK[7:512]
            await trio.sleep(IDLE_S / 2)
        assert len(tool.drivers) in (3, 4)
        assert tool.most == 1
        assert converted.refused == {}


@virtual_time
async def test_waiting_for_the_input_is_no_hang() -> None:
    tool = ScriptedTool(read_then_serve)
    async with running(scripted(tool, Bytes(bytes(MIB), slow_s=10 * PATIENCE_S))) as converted:
        assert await read(converted, len(DISK), 0, 512) == DISK[:512]
        assert len(tool.drivers) == 1


@virtual_time
async def test_what_the_input_failed_with_is_what_the_reader_gets() -> None:
    class Forbidden(Bytes):
        async def read(self, offset: int, length: int) -> bytes:
            if self.failing:
                raise ImageForbidden(IMAGE, "deactivated")
            return await super().read(offset, length)

    source = Forbidden(bytes(MIB))
    tool = ScriptedTool(read_then_serve)
    async with running(scripted(tool, source)) as converted:
        await read(converted, len(DISK), 0, 512)
        source.failing = True
        with pytest.raises(ImageForbidden):
            await read(converted, len(DISK), 0, 512)
        source.failing = False
        await trio.sleep(1)
        assert await read(converted, len(DISK), 0, 512) == DISK[:512]
        assert len(tool.drivers) == 1


@virtual_time
async def test_what_cannot_be_converted_is_an_error_of_that_read_only() -> None:
    tool = ScriptedTool(refuse)
    async with running(scripted(tool)) as converted:
        for _ in range(3):
            with pytest.raises(ConversionFailed, match="22"):
                await read(converted, len(DISK), 0, 512)
        assert len(tool.drivers) == 1
        assert converted.refused == {}


@virtual_time
async def test_a_disk_of_another_size_is_none() -> None:
    async with running(scripted(ScriptedTool(serve))) as converted:
        for size in (len(DISK) - 1, len(DISK) + 1):
            with pytest.raises(OriginLied, match=str(len(DISK))):
                await read(converted, size, 0, 512)


@virtual_time
async def test_a_bug_is_an_error_of_its_readers(caplog: pytest.LogCaptureFixture) -> None:
    class Short(Bytes):
        async def read(self, offset: int, length: int) -> bytes:
            return b"x"

    async with running(scripted(ScriptedTool(read_then_serve), Short(bytes(MIB)))) as converted:
        with pytest.raises(ConverterUnusable, match="unexpected"):
            await converted.size_of(IMAGE)
    assert "unexpected failure of a converter" in caplog.text


@virtual_time
async def test_an_image_that_cannot_be_opened_is_not_refused() -> None:
    def open_image(image: str) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    converted = Converted(from_files(open_image), lambda image: "vdi", ScriptedTool(serve))
    async with running(converted):
        for _ in range(3):
            with pytest.raises(OriginUnavailable, match="No such file"):
                await converted.size_of(IMAGE)
        assert converted.refused == {}


def test_no_image_is_to_blame_for_a_sandbox_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    broken = tmp_path / "qemu-nbd"
    broken.touch(0o755)  # The cell does not even show it.

    async def main() -> None:
        tool = QemuNbd(searched=str(tmp_path))
        async with running(of_file(tmp_path / "image", "vdi", tool=tool)) as converted:
            for _ in range(3):
                with pytest.raises(ConverterUnusable):
                    await converted.size_of(IMAGE)
            assert converted.refused == {}

    trio.run(main)


@virtual_time
async def test_the_end_leaves_no_converter_and_no_reader_waiting() -> None:
    tool = ScriptedTool(hang_later)
    converted = scripted(tool)

    async def reader() -> None:
        with pytest.raises(OriginUnavailable, match="stopped"):
            await read(converted, len(DISK), 0, 512)

    async with trio.open_nursery() as nursery:
        async with running(converted):
            nursery.start_soon(reader)
            await until(lambda: tool.running == 1)
        assert (tool.running, converted.processes) == (0, 0)
        await reader()
