"""The acts, in order. Rule: every number that is told was measured a moment ago, and every claim is checked: a
demo in which something is not so fails.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefs.words import counted
from demo import disk
from demo.stage import LOG, READ_DEADLINE_S, Stage, cachefs
from demo.terminal import StepFailed, Terminal, as_typed, size

RAW, QCOW2, NEXT = "demo-linux-1.1", "demo-linux-1.1-qcow2", "demo-linux-1.2-qcow2"

_INFO = ("file format", "virtual size", "disk size")
_SETTLE_MAX_S = 30.0
# Files of the disk, as (path, bytes): the first two are read early on, the last one only late.
_SMALL = (disk.RELEASE_FILE, disk.release(1))
_LARGE = disk.module(12, 3)
_UNREAD = disk.module(38, 5)


@dataclass
class Cost:
    """What something has cost: seconds, and the change of what `cachefs status --json` counts."""

    seconds: float = 0.0
    fetched: int = 0
    requests: int = 0
    landed: int = 0
    reads: int = 0


class Story:
    """Plays on a stage; raises StepFailed where something is not as it is told."""

    def __init__(self, stage: Stage, terminal: Terminal) -> None:
        self._stage, self._terminal = stage, terminal
        self._disks = {build: stage.folder / f"build{build}.raw" for build in (1, 2)}
        self._sizes: dict[str, int] = {}

    # ── setting up ──

    def set_up(self) -> None:
        t, stage = self._terminal, self._stage
        with t.doing("a disk") as found:
            written = self._make_disk(1)
            found.append(f"{size(disk.DISK_BYTES)}, GPT and ext4, {written.files} files of {size(written.total)}")
        with t.doing("its next build") as found:
            self._make_disk(2)
            found.append("3 packages of 41 are new, and all is laid out anew")
        with t.doing("a real Glance") as found:
            stage.start_glance()
            found.append(stage.glance.endpoint)
        with t.doing("uploaded to it") as found:
            # One after the other: a Glance on SQLite refuses (500) uploads that begin at the same time.
            self._upload(RAW, self._disks[1], "raw")
            for name, build in ((QCOW2, 1), (NEXT, 2)):
                image = stage.folder / f"{name}.img"
                t.begin(f"build {build} as a qcow2")
                stage.run(["qemu-img", "convert", "-O", "qcow2", str(self._disks[build]), str(image)])
                self._upload(name, image, "qcow2")
                image.unlink()
            found.append(f"the first as raw and as qcow2, the next as qcow2: {size(sum(self._sizes.values()))}")
        with t.doing("cachefs mounted") as found:
            stage.start_daemon()
            found.append(f"{stage.mountpoint}, with an empty store")

    def _make_disk(self, build: int) -> disk.Tree:
        tree = self._stage.folder / "tree"
        written = disk.write_tree(tree, build)
        disk.make_disk(self._disks[build], tree, build, self._stage.run)
        shutil.rmtree(tree)
        return written

    def _upload(self, name: str, image: Path, image_format: str) -> None:
        self._terminal.begin(f"upload of {name}, {size(image.stat().st_size)}")
        self._stage.glance.upload(name, image, image_format)
        self._sizes[name] = image.stat().st_size

    # ── the acts ──

    def play(self) -> None:
        self._listing()
        self._first_read()
        self._second_read()
        self._without_glance()
        self._whole()
        self._shared()
        self._asked()

    def _listing(self) -> None:
        t = self._terminal
        t.act("Every image is a file from the start")
        t.say("A node starts with nothing but this listing. Sizes are final; no byte has been fetched.")
        with self._cost() as cost:
            self._run(["ls", "-go", "images"])
            self._run(["find", "by-name", "-type", "l", "-printf", "%f -> %l\\n"])
        t.fact("fetched from Glance", f"{size(cost.fetched)} of {size(sum(self._sizes.values()))}")
        self._claim(cost.fetched == 0, "a listing fetched bytes")

    def _first_read(self) -> None:
        t = self._terminal
        t.act("A read brings what it needs, and a window around it")
        t.say("debugfs reads files in the ext4 of the partition, as a guest would: its tables, then its blocks.")
        with self._cost() as cost:
            self._read_files()
        t.line()
        share = 100 * cost.fetched / disk.DISK_BYTES
        requests = counted(cost.requests, "request")
        t.fact(
            "fetched from Glance",
            f"{size(cost.fetched)} of {size(disk.DISK_BYTES)} ({share:.1f} %) in {requests}",
        )
        t.fact("took", f"{cost.seconds:.2f} s")
        self._claim(0 < cost.fetched < disk.DISK_BYTES // 4, "the read fetched nothing, or too much")

    def _second_read(self) -> None:
        t = self._terminal
        t.act("The same read again")
        t.say("First the kernel is told to drop what it has of the file, so that it is cachefs that answers.")
        self._drop_page_cache(show=True)
        with self._cost() as cost:
            self._read_files()
        t.line()
        t.fact(
            "fetched from Glance", f"{size(cost.fetched)}; {counted(cost.reads, 'read')} answered from the node"
        )
        t.fact("took", f"{cost.seconds:.2f} s")
        self._claim(cost.fetched == 0, "what was read before was fetched again")

    def _without_glance(self) -> None:
        t, stage = self._terminal, self._stage
        t.act("Glance goes away")
        stage.glance.stop()
        t.say("It is stopped: connections are refused. What was read before is still served.")
        self._drop_page_cache(show=False)
        with self._cost() as cost:
            self._read_files()
        t.line()
        t.fact("took", f"{cost.seconds:.2f} s, without Glance")
        t.line()
        t.say(
            "What nobody has read yet is not here. Fetching the rest in the background is off in this demo. A "
            f"read of it waits {READ_DEADLINE_S} s for Glance, and debugfs tries some:"
        )
        began_s = time.monotonic()
        out = self._run(self._debugfs(f"dump {_UNREAD[0]} ../dumped"), fails=True)
        t.fact("failed after", f"{time.monotonic() - began_s:.1f} s: an error, never a wrong byte")
        self._claim("nput/output error" in out, "a read that needed Glance did not fail")
        t.line()
        t.say("Glance is started again, which takes it some seconds:")
        stage.glance.start()
        self._drop_page_cache(show=False)
        self._dump(_UNREAD)

    def _whole(self) -> None:
        t = self._terminal
        t.act("All of it is the same, byte for byte")
        self._run(["qemu-img", "info", f"by-name/{RAW}"], lines=_INFO)
        with self._cost() as cost:
            self._compare_image(RAW, "raw")
        t.fact("took", f"{cost.seconds:.1f} s, the rest of the {size(disk.DISK_BYTES)} fetched on the way")
        store = self._stage.status()["store"]
        t.fact("on disk", f"{size(store['bytes_on_disk'])}: zeros are not stored")

    def _shared(self) -> None:
        t = self._terminal
        t.act("What images have in common is stored once")
        for name, about in (
            (QCOW2, "The qcow2 holds the same disk in another order."),
            (NEXT, "The next build of it has every file at another place."),
        ):
            if name == NEXT:
                t.line()
            t.say(about)
            self._run(["qemu-img", "info", f"by-name/{name}"], lines=_INFO)
            with self._cost() as cost:
                self._compare_image(name, "qcow2")
            share = 100 * cost.landed / self._sizes[name]
            t.fact("took", f"{cost.seconds:.1f} s")
            t.fact("new in the store", f"{size(cost.landed)} of {size(self._sizes[name])} ({share:.0f} %)")
            self._claim(share < 50, f"{name} shares less than half with what is there")

    def _asked(self) -> None:
        t = self._terminal
        t.act("What the daemon says")
        for command in ("status", "images"):
            t.command(["cachefs", command])
            t.output(self._stage.on_terminal(self._stage.cachefs(command), t.room))
        t.line()
        t.say("For Prometheus:")
        ask = ["curl", "-s", self._stage.metrics]
        t.command(ask, ["grep", "^cachefs_reads_total"])
        lines = [line for line in self._stage.run(ask).splitlines() if line.startswith("cachefs_reads_total")]
        self._claim(any('outcome="hit"' in line for line in lines), "the metrics have no hits")
        t.output("\n".join(lines))

    def last_act(self) -> None:
        """Ends the daemon, so it is not for a demo that goes on."""
        t, stage = self._terminal, self._stage
        t.act("The daemon ends, and its store is verified")
        t.say("It unmounts, and commits what it has.")
        stage.stop_daemon()
        t.say("Every record, every count and every byte is compared with what it should be.")
        t.command(["cachefs", "check"])
        t.output(self._cachefs("check"))

    # ── how things are done ──

    def _run(self, arguments: Sequence[str], *, fails: bool = False, lines: Sequence[str] = ()) -> str:
        """Shows and runs a command in the mount's folder. `lines`: only those that begin so are shown."""
        self._terminal.command(arguments)
        out = self._stage.run(arguments, cwd=self._stage.mountpoint, fails=fails)
        shown = [line for line in out.splitlines() if not lines or line.startswith(tuple(lines))]
        self._terminal.output("\n".join(shown))
        return out

    def _cachefs(self, command: str) -> str:
        return self._stage.run(self._stage.cachefs(command))

    def _drop_page_cache(self, *, show: bool) -> None:
        command = ["dd", f"if=by-name/{RAW}", "iflag=nocache", "count=0", "status=none"]
        if show:
            self._run(command)
        else:
            self._stage.run(command, cwd=self._stage.mountpoint)

    def _debugfs(self, request: str) -> list[str]:
        return ["debugfs", "-R", request, f"by-name/{RAW}?offset={disk.PARTITION_OFFSET}"]

    def _read_files(self) -> None:
        path, content = _SMALL
        out = self._run(self._debugfs(f"cat {path}"))
        self._claim(out.encode() == content, f"{path} is not what was put there")
        self._dump(_LARGE)

    def _dump(self, file: tuple[str, bytes]) -> None:
        path, content = file
        self._run(self._debugfs(f"dump {path} ../dumped"))
        dumped = self._stage.folder / "dumped"
        self._claim(dumped.read_bytes() == content, f"{path} is not what was put there")
        dumped.unlink()
        self._terminal.output(f"({size(len(content))}, as they were put there)")

    def _compare_image(self, name: str, image_format: str) -> None:
        original = f"../{self._disks[2 if name == NEXT else 1].name}"
        out = self._run(["qemu-img", "compare", "-f", image_format, "-F", "raw", f"by-name/{name}", original])
        self._claim("identical" in out, f"{name} differs from what was uploaded")

    @contextmanager
    def _cost(self) -> Iterator[Cost]:
        cost = Cost()
        before = self._settled()
        began_s = time.monotonic()
        yield cost
        cost.seconds = time.monotonic() - began_s
        after = self._settled()
        cost.fetched = after["fetcher"]["bytes_fetched"] - before["fetcher"]["bytes_fetched"]
        cost.requests = after["fetcher"]["requests"] - before["fetcher"]["requests"]
        cost.landed = after["store"]["bytes_landed"] - before["store"]["bytes_landed"]
        cost.reads = sum(after["reads"]["by_outcome"].values()) - sum(before["reads"]["by_outcome"].values())

    def _settled(self) -> dict[str, Any]:
        """The status once nothing is under way any more."""
        deadline_s = time.monotonic() + _SETTLE_MAX_S
        while time.monotonic() < deadline_s:
            found = self._stage.status()
            if not found["fetcher"]["flights"] and not found["fetcher"]["bytes_in_memory"]:
                return found
            time.sleep(0.02)
        raise StepFailed(self._terminal.step, f"still fetching after {_SETTLE_MAX_S:.0f} s")

    def _claim(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise StepFailed(self._terminal.step, otherwise)


def keep_text(stage: Stage, pid: int) -> str:
    """For KEEP: what there is, and what to try."""
    return f"""
        mount       {stage.mountpoint}
        folder      {stage.folder}
        Glance      {stage.glance.endpoint}/v2/images
        metrics     {stage.metrics}
        log         {stage.folder}/{LOG}

        In another shell, where `c` is cachefs with this configuration:

        c() {{ {as_typed([*cachefs(), "--config-file", str(stage.configuration)])} "$@"; }}

        c status
        c images
        c image {RAW}
        c prefetch --wait {NEXT}
        c pin {RAW}
        c unpin {RAW}
        c evict {RAW}
        c top
        c doctor
        ls -l {stage.mountpoint}/by-name/
        qemu-img info {stage.mountpoint}/by-name/{RAW}
        curl -s {stage.glance.endpoint}/v2/images

        Nothing is fetched in the background: that is off here ([hydration] mode = manual).

        To end it, and leave nothing: Ctrl-C here, or kill {pid}
        """
