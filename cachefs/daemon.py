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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from cachefs import __version__, logs
from cachefs.blocks import Blocks, Buffer
from cachefs.catalog import GONE, Catalog, Image
from cachefs.claims import ByLeases
from cachefs.collector import Collector
from cachefs.commands import Commands
from cachefs.compactor import Compactor
from cachefs.config import Config
from cachefs.control import ControlServer
from cachefs.derivation import Derivation
from cachefs.errors import CachefsError, ImageCondemned, NoEntry, PrefetchEnded
from cachefs.evictor import Evictor, Watermarks
from cachefs.fetcher import Fetcher
from cachefs.fuse import Filesystem, Mount, minor_of, require_mountpoint
from cachefs.guest_disks import PLAIN, GuestDisks
from cachefs.hit_times import HitTimes
from cachefs.hydrator import Hydrator
from cachefs.instances import Instances
from cachefs.leases import Leases
from cachefs.leisure import Leisure
from cachefs.listener import Listener
from cachefs.metrics import Snapshot
from cachefs.notify import notify, watchdog_s
from cachefs.plan import trace
from cachefs.plan.eviction import Priority
from cachefs.plan.windows import Pattern
from cachefs.policy_host import PolicyHost
from cachefs.precache import Around as AroundPrecache
from cachefs.precache import Precache
from cachefs.ranks import Ranks
from cachefs.sandbox import Account
from cachefs.scrubber import Around, Fate, Scrubber
from cachefs.sources.converted import Converted
from cachefs.sources.converter import QemuNbd
from cachefs.sources.endpoints import Endpoints
from cachefs.sources.glance import Glance
from cachefs.sources.measured import Measured
from cachefs.stacks import Stacks, log_stacks
from cachefs.status import Parts, Status
from cachefs.store.content import READ_MAX, Limits, Store, StoredView
from cachefs.store.format import ViewKind
from cachefs.store.health import STOP_S, State
from cachefs.traces import Traces
from cachefs.uses import BOOT_SHARE, Uses
from cachefs.verifier import Verifier

log = logs.get(__name__)

# Landing and fetching run in threads beside the loop; by default one of them keeps Python's lock for 5 ms when
# another wants it, which is the time of a hundred hits.
SWITCH_INTERVAL_S = 0.0005
STATUS_INTERVAL_S = 10.0
# What only policies want is fetched after all that is in use, whatever the images' own ranks.
HELD_BEHIND = len(Priority)


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
    endpoints: Endpoints
    fetcher: Fetcher
    blocks: Blocks
    catalog: Catalog
    leases: Leases
    instances: Instances
    uses: Uses
    traces: Traces
    evictor: Evictor
    scrubber: Scrubber
    compactor: Compactor
    hydrator: Hydrator
    verifier: Verifier
    precache: Precache
    collector: Collector
    converted: Converted | None
    mount: Mount
    control: ControlServer
    status: Status
    listener: Listener | None
    hit_times: HitTimes | None


async def _main(config: Config) -> None:
    require_mountpoint(config.mount.mountpoint)  # Before a store is made that nobody can use.
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
    logs.say_what_was_counted()
    log.info("stopped")


def _build(config: Config, store: Store) -> _Node:
    glance = Glance(config.glance.auth)
    endpoints = glance.endpoints
    origin = Measured(glance)
    fetcher = Fetcher(origin, store, config.glance.connections, config.glance.retries)
    blocks = Blocks(fetcher, config.mount.read_deadline)
    catalog = Catalog(origin, store, config.glance.listing_ttl, config.glance.negative_ttl)
    leases = Leases(
        store,
        lambda: int(_limits(config).max_size * config.store.pin_share),
        touch_grace_s=config.leases.touch_grace,
    )
    converted = _converted(config, catalog, store, blocks, leases)
    disks = GuestDisks(catalog, store, fetcher, blocks, converted)
    fetcher.translate = disks.bring
    blocks.reach = disks.reach
    filesystem = Filesystem(config.mount, catalog, store, blocks, leases, disks, config.glance.negative_ttl)
    mount = Mount(filesystem, config.mount)
    instances = _instances(config, mount, catalog, store, leases, disks)
    filesystem.on_touch = instances.want

    endpoints.on_width = fetcher.narrow
    fetcher.until_origin_is_well = endpoints.until_well
    glance.on_gone = catalog.ended
    catalog.claims = ByLeases(leases, store)
    catalog.on_condemned = mount.drop_pages

    def let_go(image: Image) -> None:
        mount.forget(image)
        disks.forget(image.id)
        leases.forget(image.id)
        if converted is not None:
            converted.forget(image.id)

    catalog.on_let_go = let_go

    boot_max = int(_limits(config).max_size * BOOT_SHARE)
    uses = Uses(store, boot_max=lambda: boot_max)
    watermarks = Watermarks(config.store.high_watermark, config.store.low_watermark)
    ranks = Ranks(catalog, config.priorities)
    fetcher.rank_of = lambda image: Priority.CRITICAL - ranks.of(image)
    filesystem.priority_of = lambda image: ranks.of(image.id).name.lower()
    evictor = Evictor(
        store, uses, leases, watermarks,
        origin_is_well=lambda: catalog.is_well,
        priority_of=ranks.of,
        is_held=lambda image: precache.is_held(image),
    )  # fmt: skip
    store.on_full = evictor.on_full

    store.digests.on_changed = lambda view, offset: catalog.learn_changed(view.record.image, offset)
    around = Around(
        guests=blocks,
        disk_unwell=lambda: store.health.state is not State.HEALTHY,
        note_error=lambda error: store.health.reads.note_error(f"a scrub: {error.strerror}"),
        fate=partial(_fate, catalog),
        leased=leases.is_leased,
        refetch=lambda view, span: fetcher.spawn(blocks.fetch, view, view.extent_of(span)),
    )
    scrubber = Scrubber(store, store.index, config.scrub, around)
    store.on_rot = scrubber.rot_found
    compactor = Compactor(store, around.disk_unwell, blocks)

    def names_of(image: str) -> Sequence[str]:
        known = catalog.known(image)
        if known is None:
            return trace.content_names(image, None, None)
        return trace.content_names(image, known.os_hash_algo, known.os_hash_value)

    traces = Traces(
        store,
        fetcher,
        blocks,
        uses,
        leases,
        seconds=config.trace.seconds,
        names_of=names_of,
        images=lambda: list(store.images),
    )
    filesystem.recorded = traces.opened

    # Each its own: who works rests after its own bits of work.
    leisure = partial(Leisure, blocks, lambda: filesystem.hits + blocks.misses)
    verifier = Verifier(catalog, store, leisure())
    derivation = Derivation(catalog, store, fetcher, disks, leisure())
    hydrator = Hydrator(
        store,
        fetcher,
        blocks,
        leases,
        on_open=config.hydration.mode == "on-open",
        bandwidth=config.hydration.bandwidth,
        concurrency=config.hydration.concurrency,
        priority=lambda image: fetcher.rank_of(image) + HELD_BEHIND * precache.is_only_held(image),
        before_hydration=traces.before_hydration,
        is_replaying=traces.is_replaying,
        is_gone=lambda image: (known := catalog.known(image)) is None or known.status == GONE,
        disks=derivation,
    )
    disks.keep_files(lambda original: original.number in leases.needed)
    traces.on_replayed = hydrator.look
    evictor.before_asked = hydrator.let_go
    verifier.on_verified = lambda image: hydrator.look()

    def gone(image: Image) -> None:
        if catalog.known(image.id) is not None:  # Else it was let go, and forgotten.
            mount.withdraw(image)
        hydrator.gone(image.id)

    catalog.on_gone = gone

    def origin_is_well() -> None:
        catalog.origin_is_well()
        hydrator.origin_is_well()

    endpoints.on_well = origin_is_well

    def lost(view: StoredView) -> None:
        if view.record.kind is ViewKind.ORIGINAL:
            catalog.learn_loss(view.record.image)
        verifier.lost(view)
        derivation.lost(view)

    store.on_loss = lost

    def became_whole(view: StoredView) -> None:
        verifier.settled(view)
        hydrator.became_whole(view)

    store.on_whole = became_whole
    fetcher.give_way(blocks, blocks.beside_traces)

    def is_asked(view: StoredView) -> bool:
        try:
            hydrator.progress(view)
        except PrefetchEnded:
            return False
        return True

    around_precache = AroundPrecache(
        ask=hydrator.ask,
        is_asked=is_asked,
        pins_max=lambda: int(_limits(config).max_size * config.store.pin_share),
        low_watermark=config.store.low_watermark,
        full=lambda: evictor.stuck,
    )
    precache = Precache(
        [PolicyHost(name, config.precache.options[name]) for name in config.precache.policies],
        config.precache.interval,
        config.precache.share,
        catalog,
        store,
        uses,
        leases,
        ranks,
        around_precache,
    )

    def opened(view: StoredView) -> None:
        hydrator.opened(view)
        precache.opens.note(view.record.image)

    filesystem.on_open = opened

    async def pinnable(image: str) -> StoredView:
        known = _not_condemned(await catalog.lookup(image))
        return store.view(known.id, ViewKind.ORIGINAL, known.size)  # Which hydration goes by.

    async def prefetch(image: str) -> StoredView:
        known = _not_condemned(await catalog.openable(image))
        view = store.view(known.id, ViewKind.ORIGINAL, known.size)
        hydrator.ask(view)
        return view

    def prefetched(image: str) -> StoredView:
        view = store.known_view(image, ViewKind.ORIGINAL)
        if view is None:
            raise NoEntry(image)
        if view.condemned is not None:
            raise ImageCondemned(image, view.condemned)
        hydrator.progress(view)
        return view

    parts = Parts(store, fetcher, blocks, catalog, filesystem, leases, evictor, scrubber, hydrator, verifier,
                  origin, endpoints, mount, ranks, precache, instances, traces)  # fmt: skip
    status = Status(mount.mountpoint, parts)
    listener = None
    if config.metrics.listen is not None:
        listener = Listener(config.metrics.listen, lambda: Snapshot(status.now(), status.times()), store.totals)
    commands = Commands(leases, evictor, pinnable, store.flush, prefetch, prefetched)
    handlers = status.handlers() | commands.handlers() | scrubber.handlers() | traces.handlers()
    handlers |= precache.handlers() | Stacks(blocks).handlers()
    control = ControlServer(config.control.socket, handlers)
    return _Node(
        store,
        endpoints,
        fetcher,
        blocks,
        catalog,
        leases,
        instances,
        uses,
        traces,
        evictor,
        scrubber,
        compactor,
        hydrator,
        verifier,
        precache,
        Collector(leisure()),
        converted,
        mount,
        control,
        status,
        listener,
        HitTimes(filesystem) if listener is not None else None,
    )


def _not_condemned(image: Image) -> Image:
    """The image. Raises ImageCondemned: a view of its own would be fetched whole, to be condemned once more."""
    if image.condemned is not None:
        raise ImageCondemned(image.id, image.condemned)
    return image


def _converted(config: Config, catalog: Catalog, store: Store, blocks: Blocks, leases: Leases) -> Converted | None:
    """What reads disks in other formats; None where there is no qemu-nbd."""
    if shutil.which("qemu-nbd") is None:
        return None

    @asynccontextmanager
    async def open_input(image: str) -> AsyncIterator[ImageInput]:
        known = _not_condemned(await catalog.openable(image))
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


def _instances(
    config: Config, mount: Mount, catalog: Catalog, store: Store, leases: Leases, disks: GuestDisks
) -> Instances:
    """What looks after the images that instances stand on."""

    def own_device() -> int | None:
        minor = minor_of(mount.mountpoint)
        return None if minor is None else os.makedev(0, minor)

    def view_of(image: str, kind: ViewKind) -> StoredView | None:
        known = catalog.known(image)
        is_file = kind is ViewKind.ORIGINAL or (known is not None and known.disk_format in PLAIN)
        return store.known_view(image, ViewKind.ORIGINAL if is_file else ViewKind.RAW)

    async def take_up(image: str, kind: ViewKind) -> None:
        known = _not_condemned(await catalog.openable(image))
        if kind is ViewKind.ORIGINAL:
            store.view(known.id, ViewKind.ORIGINAL, known.size)
        else:
            await disks.open(known)

    folder, name = os.path.split(mount.mountpoint)
    return Instances(
        leases,
        config.leases.folders,
        list(dict.fromkeys((mount.mountpoint, os.path.join(os.path.realpath(folder), name)))),
        config.leases.interval,
        config.leases.grace,
        own_device=own_device,
        is_known=lambda image, kind: view_of(image, kind) is not None,
        take_up=take_up if config.hydration.mode == "on-open" else None,
    )


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
        image = await catalog.openable(view.record.image)
    except NoEntry:
        return Fate.GONE
    except CachefsError:
        return Fate.AWAY
    if image.status == GONE:
        return Fate.GONE
    return Fate.FETCHABLE if catalog.is_well else Fate.AWAY


async def _serve(node: _Node) -> None:
    store, mount, control = node.store, node.mount, node.control
    async with trio.open_nursery() as writing:
        writing.start_soon(store.run)
        try:
            await node.leases.load()
            await node.precache.load()
            async with trio.open_nursery() as services:
                await services.start(node.endpoints.run)
                await services.start(node.fetcher.run)
                await services.start(node.catalog.run)
                if node.converted is not None:
                    await services.start(node.converted.run)
                for loop in (
                    node.leases,
                    node.instances,
                    node.uses,
                    node.traces,
                    node.evictor,
                    node.scrubber,
                    node.compactor,
                    node.hydrator,
                    node.verifier,
                    node.precache,
                    node.collector,
                ):
                    await services.start(loop.run)
                try:
                    async with trio.open_nursery() as serving:
                        # First: what is mounted without it would stay behind, dead, when a signal comes.
                        await serving.start(_until_signalled, serving.cancel_scope, node.blocks)
                        await control.open()
                        if node.listener is not None:
                            node.listener.open()
                        mount.open()
                        serving.start_soon(control.serve)
                        if node.listener is not None and node.hit_times is not None:
                            serving.start_soon(node.listener.run)
                            serving.start_soon(node.hit_times.run)
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
                    if node.listener is not None:
                        node.listener.close()
                    # 2. Flights are abandoned, and the loops that look after the store end.
                    services.cancel_scope.cancel()
        finally:
            # 3. What has landed is committed; `writing` waits for it, as long as there is hope.
            notify(STATUS="committing what was fetched")
            node.traces.save()
            node.uses.save()
            node.leases.save()
            node.precache.opens.save()
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


def _limits(config: Config) -> Limits:
    """The store's bounds in bytes, for the filesystem as large as it is now."""
    stat = os.statvfs(config.store.path)
    total = stat.f_blocks * stat.f_frsize
    return Limits(config.store.max_size.of(total), config.store.min_free.of(total))


def _raise_file_limit() -> None:
    """Every segment stays open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
