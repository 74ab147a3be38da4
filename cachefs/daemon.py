"""The daemon's life: has everything built (`node`), owns the nurseries, shuts down in a visible order. Rule: no
decision about bytes is made here.

Tasks are one tree. `services` holds what reads stand on (writer, fetcher, catalog) and the loops that look after
the store; `serving` what asks for them (the kernel's requests, the control socket, signals). Serving ends first;
then flights are abandoned, what has landed is committed, and the store is closed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import trio

from cachefs import __version__, logs
from cachefs.blocks import Blocks
from cachefs.config import Config
from cachefs.errors import CachefsError
from cachefs.fuse import Mount
from cachefs.mountpoint import require_mountpoint
from cachefs.node import Node, limits
from cachefs.notify import notify, watchdog_s
from cachefs.stacks import log_stacks
from cachefs.status import Status
from cachefs.store.content import Store
from cachefs.store.health import PATIENCE, Health, Patience, State
from cachefs.words import counted

log = logs.get(__name__)

# Landing and fetching run in threads beside the loop; by default one of them keeps Python's lock for 5 ms when
# another wants it, which is the time of a hundred hits.
SWITCH_INTERVAL_S = 0.0005
STATUS_INTERVAL_S = 10.0


def run(config: Config, patience: Patience = PATIENCE) -> None:
    """Runs the daemon until SIGTERM, SIGINT or an unmount, with so much patience with the store's disk. Raises
    CachefsError when it cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    faulthandler.enable()  # SIGABRT is how systemd ends who does not feed its watchdog any more.
    _raise_file_limit()
    try:
        trio.run(_main, config, patience)
    except BaseExceptionGroup as failures:
        # Nurseries wrap what they let through. One line is for what can be said in one; the rest is a bug.
        known, others = failures.split(CachefsError)
        if known is None or others is not None:
            raise
        raise _first_of(known) from failures


def _first_of(failures: BaseExceptionGroup[CachefsError]) -> CachefsError:
    first = failures.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


async def _main(config: Config, patience: Patience) -> None:
    require_mountpoint(config.mount.mountpoint)  # Before a store is made that nobody can use.
    store = Store.open(
        Path(config.store.path),
        lambda: limits(config),
        config.store.span_size,
        config.store.commit_interval,
        verify_first_read=config.store.verify_first_read,
        health=Health(patience=patience),
    )
    try:
        node = Node(config, store)
        await _serve(node)
        if node.nova is not None:
            node.nova.scratch.close()
    finally:
        store.close()
    logs.say_what_was_counted()
    log.info("stopped")


async def _serve(node: Node) -> None:
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
                    node.contact,
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
            for save in (node.traces.save, node.uses.save, node.leases.save, node.precache.opens.save):
                try:
                    save()
                except Exception:  # What was learnt is a hint; what has landed is to be committed all the same.
                    log.exception("unexpected failure of %s", save)
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

    timer = threading.Timer(store.health.patience.stop_s, leave)
    timer.daemon = True
    timer.start()


async def _until_signalled(
    scope: trio.CancelScope, blocks: Blocks, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    early: list[int] = []
    for ending in (signal.SIGTERM, signal.SIGINT):
        # What the receiver leaves behind when it closes: a second signal right then must not cut the stop.
        signal.signal(ending, lambda number, _: early.append(number))
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
        task_status.started()
        if early:
            log.info("stopping: %s", signal.Signals(early[0]).name)
            scope.cancel()
            return
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
        glance = "" if now["images"]["glance_reached"] else ", Glance not reached yet"
        opened, waiting = counted(now["images"]["open"], "image"), counted(now["reads"]["waiting"], "read")
        notify(STATUS=f"{opened} open, {waiting} waiting, {now['store']['bytes_cached'] >> 20} MiB cached{glance}")


async def _feed_watchdog() -> None:
    """On the loop that serves reads: when it is stuck, nobody says so, and systemd starts another daemon."""
    interval_s = watchdog_s()
    while interval_s is not None:
        notify(WATCHDOG="1")
        await trio.sleep(interval_s)


def _raise_file_limit() -> None:
    """Every segment stays open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
