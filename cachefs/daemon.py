"""The composition root: builds everything, owns the nurseries, shuts down in a visible order. Rule: no decision
about bytes is made here.

Tasks are one tree. `services` holds what reads stand on (writer, fetcher, catalog) and the loops that look after
the store; `serving` what asks for them (the kernel's requests, the control socket, signals). Serving ends first;
then flights are abandoned, what has landed is committed, and the store is closed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from cachefs import __version__
from cachefs.blocks import Blocks, Buffer
from cachefs.catalog import Catalog, Image
from cachefs.commands import Commands
from cachefs.compactor import Compactor
from cachefs.config import Config
from cachefs.control import ControlServer
from cachefs.errors import CachefsError, ImageCondemned, NoEntry
from cachefs.evictor import Evictor, Watermarks
from cachefs.fetcher import Fetcher
from cachefs.fuse import Filesystem, Mount
from cachefs.guest_disks import GuestDisks
from cachefs.hydrator import Hydrator
from cachefs.leases import Leases
from cachefs.notify import notify, watchdog_s
from cachefs.plan.windows import Pattern
from cachefs.sandbox import Account
from cachefs.scrubber import Around, Fate, Scrubber
from cachefs.sources.converted import Converted
from cachefs.sources.converter import QemuNbd
from cachefs.sources.glance import Glance
from cachefs.status import Parts, Status
from cachefs.store.content import READ_MAX, Limits, Store, StoredView
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.health import STOP_S, State
from cachefs.uses import BOOT_S, Uses
from cachefs.verifier import Verifier

log = logging.getLogger(__name__)

# Landing and fetching run in threads beside the loop; by default one of them keeps Python's lock for 5 ms when
# another wants it, which is the time of a hundred hits.
SWITCH_INTERVAL_S = 0.0005
STATUS_INTERVAL_S = 10.0


def run(config: Config) -> None:
    """Runs the daemon until SIGTERM, SIGINT or an unmount. Raises CachefsError when it cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    faulthandler.enable()  # SIGABRT is how systemd ends who does not feed its watchdog any more.
    _raise_file_limit()
    try:
        trio.run(_main, config)
    except BaseExceptionGroup as failures:
        # Nurseries wrap what they let through. One line is for what can be said in one; the rest is a bug.
        known, others = failures.split(CachefsError)
        if known is None or others is not None:
            raise
        raise _first_of(known) from failures


def _first_of(failures: BaseExceptionGroup[CachefsError]) -> CachefsError:
    first = failures.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


@dataclass
class _Node:
    """Everything that runs, in the order in which it stands on each other."""

    store: Store
    fetcher: Fetcher
    blocks: Blocks
    catalog: Catalog
    leases: Leases
    uses: Uses
    evictor: Evictor
    scrubber: Scrubber
    compactor: Compactor
    hydrator: Hydrator
    verifier: Verifier
    converted: Converted | None
    mount: Mount
    control: ControlServer
    status: Status


async def _main(config: Config) -> None:
    store = Store.open(
        Path(config.store.path),
        lambda: _limits(config),
        config.store.span_size,
        config.store.commit_interval,
        verify_first_read=config.store.verify_first_read,
    )
    try:
        await _serve(_build(config, store))
    finally:
        store.close()
    log.info("stopped")


def _build(config: Config, store: Store) -> _Node:
    glance = Glance(config.glance.auth)
    fetcher = Fetcher(glance, store, config.glance.connections, config.glance.retries)
    blocks = Blocks(fetcher, config.mount.read_deadline)
    catalog = Catalog(glance, store, config.glance.listing_ttl, config.glance.negative_ttl)
    leases = Leases(store, lambda: int(_limits(config).max_size * config.store.pin_share))
    converted = _converted(config, catalog, store, blocks, leases)
    disks = GuestDisks(catalog, store, fetcher, blocks, converted)
    fetcher.translate = disks.bring
    filesystem = Filesystem(config.mount, catalog, store, blocks, leases, disks, config.glance.negative_ttl)
    mount = Mount(filesystem, config.mount)

    def gone(image: Image) -> None:
        mount.forget(image)
        disks.forget(image.id)
        if converted is not None:
            converted.forget(image.id)

    catalog.on_gone = gone

    uses = Uses(store)
    watermarks = Watermarks(config.store.high_watermark, config.store.low_watermark)
    evictor = Evictor(store, uses, leases, watermarks, lambda: catalog.is_well)
    store.on_full = evictor.on_full

    def lost(view: StoredView) -> None:
        if view.record.kind is ViewKind.ORIGINAL:
            catalog.learn_loss(view.record.image)

    store.on_loss = lost
    around = Around(
        guests_wait=lambda: bool(blocks.waiting),
        disk_unwell=lambda: store.health.state is not State.HEALTHY,
        note_error=lambda error: store.health.reads.note_error(f"a scrub: {error.strerror}"),
        fate=partial(_fate, catalog),
        leased=leases.is_leased,
        refetch=lambda view, span: fetcher.spawn(blocks.fetch, view, view.extent_of(span)),
    )
    scrubber = Scrubber(store, store.index, config.scrub, around)
    store.on_rot = scrubber.rot_found
    compactor = Compactor(store, lambda: around.guests_wait() or around.disk_unwell())

    def note_boot(view: StoredView, offset: int) -> None:
        if leases.opened_within(view.number, BOOT_S):
            uses.note_boot(view.number, SpanNo(offset // store.span_size))

    blocks.on_random_miss = note_boot

    verifier = Verifier(catalog, store, blocks)
    hydrator = Hydrator(
        store,
        fetcher,
        blocks,
        leases,
        on_open=config.hydration.mode == "on-open",
        bandwidth=config.hydration.bandwidth,
        concurrency=config.hydration.concurrency,
        settled=verifier.settled,
    )
    fetcher.give_way(around.guests_wait)
    filesystem.on_open = hydrator.opened

    async def pinnable(image: str) -> StoredView:
        known = await catalog.lookup(image)
        return store.view(known.id, ViewKind.ORIGINAL, known.size)  # Which hydration goes by.

    async def prefetch(image: str) -> StoredView:
        known = await catalog.openable(image)
        if known.condemned is not None:
            raise ImageCondemned(known.id, known.condemned)
        view = store.view(known.id, ViewKind.ORIGINAL, known.size)
        hydrator.ask(view)
        return view

    parts = Parts(store, fetcher, blocks, catalog, filesystem, leases, evictor, scrubber, hydrator, verifier)
    status = Status(mount.mountpoint, parts)
    commands = Commands(leases, evictor, pinnable, store.flush, prefetch)
    handlers = status.handlers() | commands.handlers() | scrubber.handlers()
    control = ControlServer(config.control.socket, handlers)
    return _Node(
        store,
        fetcher,
        blocks,
        catalog,
        leases,
        uses,
        evictor,
        scrubber,
        compactor,
        hydrator,
        verifier,
        converted,
        mount,
        control,
        status,
    )


def _converted(config: Config, catalog: Catalog, store: Store, blocks: Blocks, leases: Leases) -> Converted | None:
    """What reads disks in other formats; None where there is no qemu-nbd."""
    if shutil.which("qemu-nbd") is None:
        return None

    @asynccontextmanager
    async def open_input(image: str) -> AsyncIterator[ImageInput]:
        known = await catalog.openable(image)
        if known.condemned is not None:
            raise ImageCondemned(known.id, known.condemned)
        view = store.view(known.id, ViewKind.ORIGINAL, known.size)
        leases.opened(view.number)
        try:
            yield ImageInput(view, blocks)
        finally:
            leases.released(view.number)

    def disk_format(image: str) -> str:
        known = catalog.known(image)
        return known.disk_format or "" if known is not None else ""

    return Converted(open_input, disk_format, QemuNbd(Account.of(config.convert.user)))


class ImageInput:
    """An image's own bytes, for whoever converts it."""

    def __init__(self, view: StoredView, blocks: Blocks) -> None:
        self._view, self._blocks = view, blocks
        self._pattern = Pattern()
        self.size = view.size

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes. Raises OriginError, within the deadline of a read."""
        now = self._view.read_now(offset, length) if length <= READ_MAX else None
        return bytes(await self._blocks.read(self._view, offset, length, self._pattern) if now is None else now)


async def _fate(catalog: Catalog, view: StoredView) -> Fate:
    """Whether the bytes of a view could be fetched again."""
    if view.record.kind is ViewKind.ENDED:
        return Fate.GONE
    try:
        await catalog.openable(view.record.image)
    except NoEntry:
        return Fate.GONE
    except CachefsError:
        return Fate.AWAY
    return Fate.FETCHABLE if catalog.is_well else Fate.AWAY


async def _serve(node: _Node) -> None:
    store, mount, control = node.store, node.mount, node.control
    async with trio.open_nursery() as writing:
        writing.start_soon(store.run)
        try:
            await node.leases.load()
            async with trio.open_nursery() as services:
                await services.start(node.fetcher.run)
                await services.start(node.catalog.run)
                if node.converted is not None:
                    await services.start(node.converted.run)
                for loop in (
                    node.uses,
                    node.evictor,
                    node.scrubber,
                    node.compactor,
                    node.hydrator,
                    node.verifier,
                ):
                    await services.start(loop.run)
                try:
                    async with trio.open_nursery() as serving:
                        # First: what is mounted without it would stay behind, dead, when a signal comes.
                        await serving.start(_until_signalled, serving.cancel_scope, node.blocks)
                        await control.open()
                        mount.open()
                        serving.start_soon(control.serve)
                        serving.start_soon(_report, mount, store, node.status)
                        serving.start_soon(_feed_watchdog)
                        await mount.serve()
                        serving.cancel_scope.cancel()
                finally:
                    for number in (signal.SIGTERM, signal.SIGINT):
                        signal.signal(number, signal.SIG_IGN)  # It is stopping already; a commit is not to be cut.
                    # 1. No more requests: whoever has a file open gets errors from now on.
                    notify(STOPPING="1", STATUS="unmounting")
                    mount.close()
                    control.close()
                    # 2. Flights are abandoned, and the loops that look after the store end.
                    services.cancel_scope.cancel()
        finally:
            # 3. What has landed is committed; `writing` waits for it, as long as there is hope.
            notify(STATUS="committing what was fetched")
            node.uses.save()
            store.writer.stop()
            _bound_the_stop(store)


def _bound_the_stop(store: Store) -> None:
    """A disk that hangs keeps the last commit, and with it this process, for ever. Nothing is lost by leaving:
    what is not committed is fetched again."""

    def leave() -> None:
        if store.health.state is State.HEALTHY and not store.health.writes.hung:
            _bound_the_stop(store)
            return
        log.error("leaving without the last commit: the store's disk does not answer")
        logging.shutdown()
        os._exit(1)

    timer = threading.Timer(STOP_S, leave)
    timer.daemon = True
    timer.start()


async def _until_signalled(
    scope: trio.CancelScope, blocks: Blocks, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGUSR1:
                log_stacks(blocks)
                continue
            log.info("stopping: %s", signal.Signals(number).name)
            scope.cancel()
            return


async def _report(mount: Mount, store: Store, status: Status) -> None:
    """Says when the mount can be used, and then keeps the line that `systemctl status` shows."""
    await mount.wait_ready()
    notify(READY="1", STATUS=f"mounted on {mount.mountpoint}")
    log.info("cachefs %s: mounted on %s, store %s", __version__, mount.mountpoint, store.path)
    while True:
        await trio.sleep(STATUS_INTERVAL_S)
        now = await status.status({})
        notify(
            STATUS=f"{now['images']['open']} images open, {now['reads']['waiting']} reads waiting, "
            f"{now['store']['bytes_cached'] >> 20} MiB cached"
        )


async def _feed_watchdog() -> None:
    """On the loop that serves reads: when it is stuck, nobody says so, and systemd starts another daemon."""
    interval_s = watchdog_s()
    while interval_s is not None:
        notify(WATCHDOG="1")
        await trio.sleep(interval_s)


def log_stacks(blocks: Blocks) -> None:
    """Logs which reads wait, where every task stands, and every thread on stderr: what SIGUSR1 is for. (A task
    that serves the kernel shows pyfuse3's frame only: it is compiled.)"""
    now_s = trio.current_time()
    for reading in blocks.reading:
        log.warning(
            "[image %s] a read of %d bytes at %d waits since %.1f s",
            reading.view.record.image, reading.wanted.length, reading.wanted.start, now_s - reading.since_s,
        )  # fmt: skip
    root = trio.lowlevel.current_root_task()
    for depth, task in _tasks(root, 0) if root is not None else ():
        frames = traceback.StackSummary.extract(task.iter_await_frames())
        log.warning("task %s%s\n%s", "  " * depth, task.name, "".join(frames.format()).rstrip())
    faulthandler.dump_traceback(all_threads=True)


def _tasks(task: trio.lowlevel.Task, depth: int) -> Iterator[tuple[int, trio.lowlevel.Task]]:
    yield depth, task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child, depth + 1)


def _limits(config: Config) -> Limits:
    """The store's bounds in bytes, for the filesystem as large as it is now."""
    stat = os.statvfs(config.store.path)
    total = stat.f_blocks * stat.f_frsize
    return Limits(config.store.max_size.of(total), config.store.min_free.of(total))


def _raise_file_limit() -> None:
    """Every segment stays open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
