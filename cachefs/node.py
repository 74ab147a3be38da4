"""Everything that runs on a node, in the order in which it stands on each other, and who is told what by whom.
Rule: nothing is started here, and no decision about bytes is made; `daemon` runs what is built.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from cachefs.blocks import Blocks, Buffer
from cachefs.catalog import GONE, Catalog, Image
from cachefs.claims import ByLeases
from cachefs.collector import Collector
from cachefs.commands import Commands
from cachefs.compactor import Compactor
from cachefs.config import Config
from cachefs.contact import Contact
from cachefs.control import ControlServer
from cachefs.derivation import Derivation
from cachefs.errors import CachefsError, ImageCondemned, Leased, NoEntry, PrefetchEnded
from cachefs.evictor import Evictor, Watermarks
from cachefs.fetcher import Fetcher
from cachefs.fuse import Filesystem, Mount
from cachefs.guest_disks import PLAIN, GuestDisks
from cachefs.hit_times import HitTimes
from cachefs.hydrator import Hydrator
from cachefs.instance_walk import Walker
from cachefs.instances import Instances
from cachefs.leases import Leases
from cachefs.leisure import Leisure
from cachefs.listener import Listener
from cachefs.metrics import Snapshot
from cachefs.mountpoint import binds_of, minor_of
from cachefs.namespace import base_name
from cachefs.naming import Naming
from cachefs.nova_folder import NovaFolder
from cachefs.places import Places
from cachefs.plan import trace
from cachefs.plan.eviction import Priority
from cachefs.plan.instances import BaseNames
from cachefs.plan.windows import Pattern
from cachefs.policy_host import PolicyHost
from cachefs.precache import Around as AroundPrecache
from cachefs.precache import Precache
from cachefs.ranks import Ranks
from cachefs.sandbox import Account
from cachefs.scratch import MODE as SCRATCH_MODE
from cachefs.scratch import Owner, Scratch
from cachefs.scrubber import Around, Fate, Scrubber
from cachefs.sources.converted import Converted
from cachefs.sources.converter import QemuNbd
from cachefs.sources.glance import Glance
from cachefs.sources.measured import Measured
from cachefs.stacks import Stacks
from cachefs.status import Parts, Status
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.store.health import State
from cachefs.store.room import Limits
from cachefs.store.view import READ_MAX, StoredView
from cachefs.traces import Traces
from cachefs.uses import BOOT_SHARE, Uses
from cachefs.verifier import Verifier

# What only policies want is fetched after all that is in use, whatever the images' own ranks.
FOLDER_MODE = 0o755  # Of nova/: its owner, and root, write there.
HELD_BEHIND = len(Priority)


class Node:
    """All parts of one daemon, by name. Made on the loop, before anything runs."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        self._reading()
        self._looking_after_the_store()
        self._fetching_ahead()
        self._answering()

    # ── what a read stands on ──

    def _reading(self) -> None:
        config, store = self.config, self.store
        glance = Glance(config.glance.auth)
        self.endpoints, self.origin = glance.endpoints, Measured(glance)
        self.fetcher = Fetcher(self.origin, store, config.glance.connections, config.glance.retries)
        self.blocks = Blocks(self.fetcher, config.mount.read_deadline)
        self.catalog = Catalog(self.origin, store, config.glance.listing_ttl, config.glance.negative_ttl)
        self.contact = Contact(self.endpoints, self.catalog, glance.greet, self.catalog.ask_anew)
        self.leases = Leases(store, self._pins_max, touch_grace_s=config.leases.touch_grace)
        self.converted = _converted(config, self.catalog, store, self.blocks, self.leases)
        self.disks = GuestDisks(self.catalog, store, self.fetcher, self.blocks, self.converted)
        self.nova = _nova(config, self.catalog, self.disks, store)
        self.filesystem = Filesystem(
            config.mount,
            self.catalog,
            store,
            self.blocks,
            self.leases,
            self.disks,
            config.glance.negative_ttl,
            self.nova,
        )
        self.mount = Mount(self.filesystem, config.mount)
        self.ranks = Ranks(self.catalog, config.priorities)

        self.fetcher.translate = self.disks.bring
        self.fetcher.until_origin_is_well = self.endpoints.until_well
        self.fetcher.rank_of = lambda image: Priority.CRITICAL - self.ranks.of(image)
        self.fetcher.give_way(self.blocks, self.blocks.beside_traces)
        self.blocks.reach = self.disks.reach
        self.disks.keep_files(lambda original: original.number in self.leases.needed)
        self.endpoints.on_width = self.fetcher.narrow
        self.endpoints.on_well = self._origin_is_well
        glance.on_gone = self.catalog.ended
        self.catalog.claims = ByLeases(self.leases, store)
        self.catalog.on_gone = self._gone
        self.catalog.on_let_go = self._let_go
        self.catalog.on_condemned = self.mount.drop_pages
        self.filesystem.priority_of = lambda image: self.ranks.of(image.id).name.lower()
        self.filesystem.on_open = self._opened

    # ── what looks after the store ──

    def _looking_after_the_store(self) -> None:
        config, store = self.config, self.store
        self.instances = _instances(config, self.mount, self.catalog, store, self.leases, self.disks, self.nova)
        boot_max = int(limits(config).max_size * BOOT_SHARE)
        self.uses = Uses(store, boot_max=lambda: boot_max)
        self.evictor = Evictor(
            store,
            self.uses,
            self.leases,
            Watermarks(config.store.high_watermark, config.store.low_watermark),
            origin_is_well=lambda: self.catalog.is_well,
            priority_of=self.ranks.of,
            is_held=lambda image: self.precache.is_held(image),
        )
        around = Around(
            guests=self.blocks,
            disk_unwell=lambda: store.health.state is not State.HEALTHY,
            note_error=lambda error: store.health.reads.note_error(f"a scrub: {error.strerror}"),
            live_bytes=store.live_bytes,
            fate=partial(_fate, self.catalog),
            leased=self.leases.is_leased,
            refetch=lambda view, span: self.fetcher.spawn(self.blocks.fetch, view, view.extent_of(span)),
        )
        self.scrubber = Scrubber(store, store.index, config.scrub, around)
        self.compactor = Compactor(store, around.disk_unwell, self.blocks)
        self.collector = Collector(self._leisure())

        store.on_full = self.evictor.on_full
        store.on_rot = self.scrubber.rot_found
        store.on_loss = self._lost
        store.on_whole = self._became_whole
        store.on_partial = self._became_partial
        store.digests.on_changed = lambda view, offset: self.catalog.learn_changed(view.record.image, offset)
        self.filesystem.on_touch = self._touched
        if self.nova is not None:
            self.nova.open_images = self.filesystem.open_count.keys
            self.nova.used_images = lambda: {*self.leases.touches.images(), *self.leases.named}
            self.nova.evict = self._drop
            self.nova.scratch.make_room = self.evictor.make_room

    # ── what fetches before it is asked ──

    def _fetching_ahead(self) -> None:
        config, store = self.config, self.store
        self.traces = Traces(
            store,
            self.fetcher,
            self.blocks,
            self.uses,
            self.leases,
            seconds=config.trace.seconds,
            names_of=self._trace_names,
            images=lambda: list(store.images),
            name_of=self._image_name,
        )
        self.verifier = Verifier(self.catalog, store, self._leisure())
        self.derivation = Derivation(self.catalog, store, self.fetcher, self.disks, self._leisure())
        self.hydrator = Hydrator(
            store,
            self.fetcher,
            self.blocks,
            self.leases,
            on_open=config.hydration.mode == "on-open",
            bandwidth=config.hydration.bandwidth,
            concurrency=config.hydration.concurrency,
            priority=lambda image: self.fetcher.rank_of(image) + HELD_BEHIND * self.precache.is_only_held(image),
            before_hydration=self.traces.before_hydration,
            is_replaying=self.traces.is_replaying,
            is_gone=self._is_gone,
            disks=self.derivation,
        )
        self.blocks.on_miss = self.hydrator.missed
        around = AroundPrecache(
            ask=self.hydrator.ask,
            is_asked=self._is_asked,
            pins_max=self._pins_max,
            low_watermark=config.store.low_watermark,
            full=lambda: self.evictor.stuck,
        )
        self.precache = Precache(
            [PolicyHost(name, config.precache.options[name]) for name in config.precache.policies],
            config.precache.interval,
            config.precache.share,
            self.catalog,
            store,
            self.uses,
            self.leases,
            self.ranks,
            around,
        )

        self.filesystem.recorded = self.traces.opened
        self.traces.on_replayed = self.hydrator.look
        self.evictor.before_asked = self.hydrator.let_go
        self.verifier.on_verified = lambda image: self.hydrator.look()

    # ── what answers administrators ──

    def _answering(self) -> None:
        places = Places(self.mount.mountpoint, self.catalog, self.disks, self.nova)
        parts = Parts(
            self.store, self.fetcher, self.blocks, self.catalog, self.filesystem, self.leases, self.evictor,
            self.scrubber, self.hydrator, self.verifier, self.origin, self.endpoints, self.mount, self.ranks,
            self.precache, self.instances, self.traces, self.contact, self.nova,
            places,
        )  # fmt: skip
        self.status = status = Status(self.mount.mountpoint, parts)
        commands = Commands(
            self.leases, self.evictor, self._pinnable, self.store.flush, self._prefetch, self._prefetched
        )
        handlers = status.handlers() | commands.handlers() | self.scrubber.handlers() | self.traces.handlers()
        naming = Naming(lambda: [*self.catalog.shown(), *self.catalog.gone()], self.catalog.listing)
        handlers |= self.precache.handlers() | Stacks(self.blocks).handlers() | naming.handlers()
        self.control = ControlServer(self.config.control.socket, handlers)
        self.listener: Listener | None = None
        self.hit_times: HitTimes | None = None
        if self.config.metrics.listen is not None:
            self.listener = Listener(
                self.config.metrics.listen, lambda: Snapshot(status.now(), status.times()), self.store.totals
            )
            self.hit_times = HitTimes(self.filesystem)

    async def _pinnable(self, image: str) -> StoredView:
        known = _not_condemned(await self.catalog.lookup(image))
        return self.store.view(known.id, ViewKind.ORIGINAL, known.size)  # Which hydration goes by.

    async def _prefetch(self, image: str) -> StoredView:
        known = _not_condemned(await self.catalog.openable(image))
        view = self.store.view(known.id, ViewKind.ORIGINAL, known.size)
        self.hydrator.ask(view)
        return view

    def _prefetched(self, image: str) -> StoredView:
        view = self.store.known_view(image, ViewKind.ORIGINAL)
        if view is None:
            raise NoEntry(image)
        if view.condemned is not None:
            raise ImageCondemned(image, view.condemned)
        self.hydrator.progress(view)
        return view

    # ── who is told ──

    def _opened(self, view: StoredView) -> None:
        self.hydrator.opened(view)
        self.precache.opens.note(view.record.image)
        if self.nova is not None:
            self.nova.used(view.record.image)

    def _touched(self, image: str, kind: ViewKind) -> None:
        self.instances.want(image, kind)
        if self.nova is not None:
            self.nova.used(image)

    def _drop(self, image: str) -> None:
        """Somebody needs the image no more. Raises Leased where others do."""
        if (why := self.precache.why(image)) is not None:
            raise Leased(image, (f"it is {why}",))
        self.evictor.begin_evicting(image, looked=False)

    def _lost(self, view: StoredView) -> None:
        if view.record.kind is ViewKind.ORIGINAL:
            self.catalog.learn_loss(view.record.image)
        self.verifier.lost(view)
        self.derivation.lost(view)

    def _became_whole(self, view: StoredView) -> None:
        self.verifier.settled(view)
        self.hydrator.became_whole(view)

    def _became_partial(self, view: StoredView) -> None:
        # Of a whole file the kernel keeps for a minute how much is here.
        if (image := self.catalog.known(view.record.image)) is not None:
            self.mount.drop_attributes(image)

    def _gone(self, image: Image) -> None:
        if self.catalog.known(image.id) is not None:  # Else it was let go, and forgotten.
            self.mount.withdraw(image)
        self.hydrator.gone(image.id)

    def _let_go(self, image: Image) -> None:
        self.mount.forget(image)
        self.disks.forget(image.id)
        self.leases.forget(image.id)
        if self.nova is not None:
            self.nova.used(image.id)
        if self.converted is not None:
            self.converted.forget(image.id)

    def _origin_is_well(self) -> None:
        self.contact.origin_is_well()
        self.catalog.origin_is_well()
        self.hydrator.origin_is_well()

    # ── what is asked ──

    def _leisure(self) -> Leisure:
        """Each its own: who works rests after its own bits of work."""
        return Leisure(self.blocks, lambda: self.filesystem.hits + self.blocks.misses)

    def _pins_max(self) -> int:
        return int(limits(self.config).max_size * self.config.store.pin_share)

    def _is_gone(self, image: str) -> bool:
        known = self.catalog.known(image)
        return known is None or known.status == GONE

    def _is_asked(self, view: StoredView) -> bool:
        try:
            self.hydrator.progress(view)
        except PrefetchEnded:
            return False
        return True

    def _image_name(self, image: str) -> str | None:
        known = self.catalog.known(image)
        return None if known is None else known.name

    def _trace_names(self, image: str) -> Sequence[str]:
        known = self.catalog.known(image)
        if known is None:
            return trace.content_names(image, None, None)
        return trace.content_names(image, known.os_hash_algo, known.os_hash_value)


def limits(config: Config) -> Limits:
    """The store's bounds in bytes, for the filesystem as large as it is now."""
    stat = os.statvfs(config.store.path)
    total = stat.f_blocks * stat.f_frsize
    return Limits(config.store.max_size.of(total), config.store.min_free.of(total))


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


def _nova(config: Config, catalog: Catalog, disks: GuestDisks, store: Store) -> NovaFolder | None:
    """What Nova finds in `nova/`; None where there is no such folder."""
    nova = config.nova
    if not nova.enabled:
        return None
    scratch = Scratch(Path(config.store.path), Owner(nova.uid, nova.gid, SCRATCH_MODE))
    kind = ViewKind.ORIGINAL if nova.view == "images" else ViewKind.RAW
    return NovaFolder(scratch, kind, catalog, disks, store, Owner(nova.uid, nova.gid, FOLDER_MODE))


def _instances(
    config: Config,
    mount: Mount,
    catalog: Catalog,
    store: Store,
    leases: Leases,
    disks: GuestDisks,
    nova: NovaFolder | None,
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

    def binds() -> tuple[bytes, ...]:
        return () if nova is None else binds_of(mount.mountpoint, "nova")

    def names() -> BaseNames | None:
        return None if nova is None else BaseNames(image_of, nova.kind, binds())

    def image_of(name: bytes) -> str | None:
        if nova is None or nova.scratch.number_of(name) is not None:
            return None
        found = catalog.id_of_base(name)  # Else it is one that only a disk still knows.
        return found or next((image for image in list(leases.named) if base_name(image) == name), None)

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
        walker=partial(Walker, names=names),
        binds=binds,
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
