"""The guest disks of vmdk, vhd, vhdx, vdi and ploop images, as a Source. Rule: an image costs two crashed
converters at most, and never another image's turn.

There is a converter per image from its first need until nobody has needed it for a minute, and a few at once.
One that crashes (it ends, breaks the protocol, or owes an answer although its input does not) is started anew
once, and what it has given stays given; then the image is refused. When its input failed meanwhile, nothing is
held against the image.
"""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from cachefs import logs
from cachefs.errors import OriginError, OriginLied, OriginUnavailable
from cachefs.plan.extents import Extent
from cachefs.sources import Sink, Timing
from cachefs.sources.converter import Converter, Crashed, Tool
from cachefs.sources.nbd import Client, NbdBroken, NbdRefused
from cachefs.sources.nbd_input import OpenInput

log = logs.get(__name__)

# Glance's disk_format → qemu's driver.
DRIVERS = {"vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi", "ploop": "parallels"}
PROCESSES_MAX = 4
TURN_BYTES = 256 << 20  # After so much of one image another one that waits has its turn.
IDLE_S = 60.0
# While it does not wait for its input it answers within milliseconds; but the machine may be busy.
PATIENCE_S = 60.0
CRASH_FORGOTTEN_S = 3600.0  # Processes are killed for other reasons than images, too.


class ConversionRefused(OriginError):
    """This image is not converted here; `detail` says why."""

    errno: ClassVar[int] = errno.EPERM


class ToolMissing(ConversionRefused):
    """No image is converted here: the tool is not installed."""


class ConversionFailed(OriginError):
    """The converter cannot read this part of the image, although it could read its input."""


class Converted:
    """Sizes and extents are those of the guest disk. `disk_format` says what Glance calls an image's format.
    `run` has to run."""

    def __init__(
        self,
        open_input: OpenInput,
        disk_format: Callable[[str], str],
        tool: Tool,
        processes_max: int = PROCESSES_MAX,
        idle_s: float = IDLE_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._open_input, self._disk_format, self._tool = open_input, disk_format, tool
        self._processes_max, self._idle_s, self._patience_s = processes_max, idle_s, patience_s
        self._converters: dict[str, Converter] = {}
        self._crashed_s: dict[str, float] = {}  # When the last one did.
        self.refused: dict[str, str] = {}
        self._queue: list[object] = []  # Who waits for a place, or for the end of a converter.
        self._changed = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None
        self._stopped = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the converters: none is left when it ends."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._stopped = True  # Who waits may ask again, but nothing begins any more.

    @property
    def processes(self) -> int:
        """How many there are now."""
        return len(self._converters)

    def forget(self, image: str) -> None:
        """What is held against the image."""
        self._crashed_s.pop(image, None)
        self.refused.pop(image, None)

    # ── what is asked ──

    async def size_of(self, image: str) -> int:
        """The size of its guest disk in bytes, as the converter sees it. Raises OriginError."""
        while True:
            try:
                async with self._converter(image) as (_, client):
                    return client.size
            except Crashed:
                continue

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        """See `Source.fetch`; never RangeRefused."""
        counting = _Counting(sink)
        while counting.n < extent.length:
            try:
                await self._fetch(image, size, extent, counting)
            except Crashed:  # The next one goes on from there; that there is an end to it is `_take`'s affair.
                continue
        return counting.timing()

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        """See `Source.stream`."""
        return await self.fetch(image, size, Extent(0, size), sink)

    async def _fetch(self, image: str, size: int, extent: Extent, sink: _Counting) -> None:
        """What is due of `extent`, for a turn."""
        async with self._converter(image) as (converter, client):
            if client.size != size:
                raise OriginLied(image, f"its guest disk has {client.size} bytes, {size} are expected")
            began_s, before = trio.current_time(), sink.n
            try:
                start = extent.start + sink.n
                await client.read_into(Extent(start, min(extent.end, start + TURN_BYTES)), sink)
            except NbdBroken:
                raise await converter.why_over() from None
            except NbdRefused as error:
                raise converter.input_error(began_s) or ConversionFailed(image, str(error)) from error
            finally:
                converter.served += sink.n - before

    # ── whose turn it is ──

    @asynccontextmanager
    async def _converter(self, image: str) -> AsyncIterator[tuple[Converter, Client]]:
        """The image's converter, when it can be read; nobody ends it meanwhile. Raises what it failed with."""
        converter = await self._take(image)
        try:
            yield converter, await converter.ready()
        finally:
            converter.release()
            if self._queue:
                self._make_a_place()

    async def _take(self, image: str) -> Converter:
        """Waits for a place, if it needs one; first come, first served. Raises ConversionRefused."""
        turn = object()
        try:
            while True:
                if image in self.refused:
                    raise ConversionRefused(image, self.refused[image])
                found = self._converters.get(image)
                if found is None and self._is_next(turn) and len(self._converters) < self._processes_max:
                    found = self._begin(image)
                if found is not None and not found.leaving:
                    found.users += 1
                    return found
                if turn not in self._queue:
                    self._queue.append(turn)
                self._make_a_place()
                await self._changed.park()
        finally:
            if turn in self._queue:
                self._queue.remove(turn)
                self._changed.unpark_all()  # Another one is the first now.

    def _is_next(self, turn: object) -> bool:
        return not self._queue or self._queue[0] is turn

    def _begin(self, image: str) -> Converter:
        assert self._nursery is not None, "it does not run"
        if self._stopped:
            raise OriginUnavailable(image, "its converter was stopped")
        if self._tool.missing is not None:
            raise ToolMissing(image, self._tool.missing)
        driver = DRIVERS.get(self._disk_format(image))
        if driver is None:
            raise ConversionRefused(image, "no image of a format that is converted")
        converter = Converter(image, driver, self._idle_s, self._patience_s)
        self._converters[image] = converter
        self._nursery.start_soon(self._run, converter)
        return converter

    def _make_a_place(self) -> None:
        """Ends what has been idle for longest, unless there is a place, or will be. If somebody uses every one,
        whoever is done first, or has had its turn, makes the place."""
        staying = [converter for converter in self._converters.values() if not converter.leaving]
        idle = [converter for converter in staying if not converter.users]
        if idle and len(staying) == self._processes_max:
            min(idle, key=lambda converter: converter.idle_since_s).end()

    async def _run(self, converter: Converter) -> None:
        image = converter.image
        try:
            await converter.run(self._open_input, self._tool)
        finally:
            if isinstance(converter.failure, Crashed):
                self._note_crash(image, converter.failure.detail)
            del self._converters[image]
            converter.over.set()
            self._changed.unpark_all()

    def _note_crash(self, image: str, how: str) -> None:
        now_s = trio.current_time()
        if now_s < self._crashed_s.get(image, -math.inf) + CRASH_FORGOTTEN_S:
            log.warning("is refused: %s", how, image=image)
            self.refused[image] = how
        self._crashed_s[image] = now_s


class _Counting:
    """A sink that knows how much it got, and when the first of it came."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.n = 0
        self.began_s = self.first_s = trio.current_time()

    async def room(self) -> memoryview:
        return await self._sink.room()

    def room_now(self) -> memoryview | None:
        return self._sink.room_now()

    def awaited(self, n: int) -> bool:
        return self._sink.awaited(n)

    def arrived(self, n: int) -> None:
        if not self.n:
            self.first_s = trio.current_time()
        self.n += n
        self._sink.arrived(n)

    def timing(self) -> Timing:
        return Timing(self.first_s - self.began_s, trio.current_time() - self.first_s)
