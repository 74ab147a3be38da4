"""pyfuse3 operation → namespace, catalog and view. The only importer of pyfuse3. Rule: nothing here knows how
bytes are kept or fetched; errors become errnos here and nowhere else.

A read that can be answered from memory and the page cache returns without an await, so that one task serves it
from the kernel's request to its reply. The rest waits in a task of its own; there may be many (TASKS_MAX), and
the kernel is told to let as many through, so that reads which wait for Glance do not hold up those that do not.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from cachefs import logs
from cachefs.blocks import Blocks
from cachefs.catalog import SIZE_MAX, Catalog, Image
from cachefs.config import MountConfig
from cachefs.errors import (
    CachefsError,
    ImageCondemned,
    ImageRefused,
    MountError,
    NoEntry,
    NotPermitted,
    OriginError,
    ReadOnly,
    ScratchFailed,
    word_of,
)
from cachefs.guest_disks import PLAIN, GuestDisks
from cachefs.histogram import MEMORY_S, Timed
from cachefs.image_state import state_of
from cachefs.leases import Leases
from cachefs.mountpoint import prepare_mountpoint, tune
from cachefs.namespace import (
    FOLDERS,
    Folder,
    Node,
    Overlay,
    ScratchNode,
    Slot,
    base_name,
    image_id,
    inode_of,
    node_of,
    overlay_inode,
    scratch_inode,
    size_name,
    size_of,
)
from cachefs.notices import Notices
from cachefs.nova_folder import NEGATIVE_TTL_S, NovaFolder
from cachefs.scratch import Attributes, Changes, Owner, ScratchFile
from cachefs.sizes import Sizes
from cachefs.store.content import Store
from cachefs.store.format import ViewKind, ViewNo
from cachefs.store.view import StoredView
from cachefs.touches import File
from cachefs.views import Buffer, View
from cachefs.views.resized import ResizedFile
from cachefs.views.stored import StoredFile

log = logs.get(__name__)
repeats = logs.Repeats(log)

Answer = TypeVar("Answer")
Args = TypeVarTuple("Args")

TASKS_MAX = 16384

# Bytes never change, sizes neither; how much is cached does, until all of it is. In seconds.
ATTR_TIMEOUT_S, ATTR_TIMEOUT_FILE_S, ATTR_TIMEOUT_PARTIAL_S = 3600.0, 60.0, 1.0
ENTRY_TIMEOUT_S = 60.0

XATTR_PREFIX = b"user.cachefs."


class Filesystem(pyfuse3.Operations):
    """The mounted tree. `open_count` tells how many handles each image has."""

    def __init__(
        self,
        config: MountConfig,
        catalog: Catalog,
        store: Store,
        blocks: Blocks,
        leases: Leases,
        disks: GuestDisks,
        negative_ttl_s: float,
        nova: NovaFolder | None = None,
    ) -> None:
        super().__init__()
        self._config, self._catalog, self._store, self._blocks = config, catalog, store, blocks
        self._leases, self._disks, self._negative_ttl_s = leases, disks, negative_ttl_s
        self._nova = nova
        self._tops = {n: folder for n, folder in FOLDERS.items() if nova is not None or folder is not Folder.NOVA}
        self._open: dict[int, _Opened | _OpenedScratch] = {}
        self._by_inode: dict[int, list[_Opened]] = {}
        self.sizes = Sizes(store)
        self._folders: dict[int, tuple[_Inode, list[_Entry]]] = {}
        self._handles = itertools.count(1)
        self.open_count: Counter[str] = Counter()
        self.on_open: Callable[[StoredView], None] = lambda stored: None
        self.on_touch: Callable[[str, ViewKind], None] = lambda image, kind: None
        self.priority_of: Callable[[Image], str] = lambda image: "normal"
        # What a new handle reads by, in place of the file, until the last is called: see `Traces.opened`.
        self.recorded: Callable[[StoredView, View, Callable[[], None]], View] = lambda stored, file, done: file
        self.handshake = trio.Event()  # The kernel has said hello, and is answered by the next checkpoint.
        self.hits = 0
        self.failed_reads: Counter[str] = Counter()  # By the kind of failure.
        self.timed_hits = Timed(MEMORY_S)
        self._hits_to_time = 0

    def init(self) -> None:
        self.handshake.set()

    # ── reading ──

    async def read(self, fh: int, off: int, size: int) -> Any:
        view = self._open[fh].view
        data = view.read_now(off, size)
        if data is not None:
            self.hits += 1
            return data
        return await _answer(self._read_slowly, view, off, size)

    async def _read_slowly(self, view: View, off: int, size: int) -> Buffer:
        try:
            return await view.read(off, size)
        except OriginError as error:
            self.failed_reads[word_of(error)] += 1
            # Whatever the origin says of the image, this file is open: its bytes could not be had.
            log.debug("read of %d bytes at %d: %s", size, off, error, image=error.image)
            raise FUSEError(errno.EIO) from None
        except Exception as error:
            self.failed_reads[word_of(error)] += 1
            raise

    def time_hits(self, hits: int) -> None:
        """The next so many hits are timed. Until then this object's `read`, which pyfuse3 looks up for each
        request, is another one: so the rest of them pay nothing for it, not even a question."""
        before, self._hits_to_time = self._hits_to_time, hits
        if hits and not before:
            setattr(self, "read", self._read_timed)  # noqa: B010  # To a type checker a method is no variable.
        elif before and not hits:
            delattr(self, "read")

    async def _read_timed(self, fh: int, off: int, size: int) -> Any:
        """`read` once more, with a clock."""
        began_s = perf_counter()
        view = self._open[fh].view
        data = view.read_now(off, size)
        if data is None:
            return await _answer(self._read_slowly, view, off, size)
        self.hits += 1
        self.timed_hits.seconds.observe(perf_counter() - began_s)
        self.timed_hits.bytes += len(data)
        if self._hits_to_time > 1:
            self._hits_to_time -= 1
        else:
            self.time_hits(0)
        return data

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await _answer(self._open_file, inode, flags)

    async def _open_file(self, inode: int, flags: int) -> FileInfo:
        node = node_of(inode)
        if isinstance(node, ScratchNode):
            return self._open_scratch(await self._in_nova(Folder.NOVA).scratch.open(node.number, flags))
        image_id, size = self.sizes.meant(node.view) if isinstance(node, Overlay) else (self._image(inode).id, 0)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnly("its file was opened for writing, and an image is never written to", image_id)
        image = await self._catalog.openable(image_id)
        if image.condemned is not None:
            raise ImageCondemned(image.id, image.condemned)
        if isinstance(node, Node) and node.slot is Slot.ORIGINAL:
            stored = self._store.view(image.id, ViewKind.ORIGINAL, image.size)
        else:
            stored = await self._disks.open(image)
        # From here on no await: what is opened is leased, and still what was looked up.
        known = self._catalog.known(image_id)
        if known is None or known.number != image.number:
            raise NoEntry(image_id)
        if known.condemned is not None:
            raise ImageCondemned(image.id, known.condemned)
        view: View = StoredFile(stored, self._blocks)
        leased = [stored.number]
        if isinstance(node, Overlay):
            if size < stored.size:  # Looked up when the image of this id was another one.
                raise NoEntry(image_id)
            view = ResizedFile(stored, self._blocks, size)
            leased.append(self._store.view(image.id, ViewKind.RESIZED, size, ViewNo(node.view)).number)
        handle = next(self._handles)
        view = self.recorded(stored, view, partial(self._read_by, handle, view))
        opened = self._open[handle] = _Opened(inode, view, stored, image, leased)
        self._by_inode.setdefault(inode, []).append(opened)
        for number in leased:
            self._leases.opened(number)
        self.open_count[image.id] += 1
        self.on_open(stored)
        return FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    def _read_by(self, handle: int, view: View) -> None:
        """From now on what the handle reads is read by `view`."""
        opened = self._open.get(handle)
        if isinstance(opened, _Opened):
            anew = self._open[handle] = opened._replace(view=view)
            others = self._by_inode[opened.inode]
            others[others.index(opened)] = anew

    async def release(self, fh: int) -> None:
        opened = self._open.pop(fh)
        if isinstance(opened, _OpenedScratch):
            await _answer(self._in_nova(Folder.NOVA).scratch.release, opened.view)
            return
        for number in opened.leased:
            self._leases.released(number)
        self._by_inode[opened.inode].remove(opened)
        if not self._by_inode[opened.inode]:
            del self._by_inode[opened.inode]
        self.open_count[opened.image.id] -= 1
        if not self.open_count[opened.image.id]:
            del self.open_count[opened.image.id]

    # ── names and attributes ──

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return await _answer(self._lookup, parent_inode, name)

    async def _lookup(self, parent: int, name: bytes) -> EntryAttributes:
        try:
            if parent == Folder.ROOT:
                return self._attributes(self._tops[name])
            if parent == Folder.NOVA and self._nova is not None:
                return await self._describe_node(await self._nova.lookup(name))
            if parent == Folder.IMAGES and (id_ := image_id(name)) is not None:
                return self._attributes(Node(Slot.ORIGINAL, (await self._catalog.lookup(id_)).number))
            if parent == Folder.RAW and (id_ := image_id(name)) is not None:
                image = await self._catalog.lookup(id_)
                await self._disks.inspect(image)
                return self._attributes(Node(Slot.RAW, image.number))
            if parent == Folder.RESIZED and (id_ := image_id(name)) is not None:
                return self._attributes(Node(Slot.SIZES, (await self._catalog.lookup(id_)).number))
            node = node_of(parent)
            if isinstance(node, Node) and node.slot is Slot.SIZES and (size := size_of(name)) is not None:
                return await self._lookup_size(self._image(parent, Slot.SIZES), size)
            if parent == Folder.BY_NAME:
                await self._catalog.listing()
                return self._attributes(Node(Slot.LINK, self._catalog.links[name]))
        except (KeyError, NoEntry):
            pass
        missing = EntryAttributes()
        missing.st_ino = pyfuse3.InodeT(0)  # "No such name", which the kernel may remember for so long:
        missing.entry_timeout = self._negative_ttl_s
        if parent == Folder.NOVA:
            missing.entry_timeout = min(self._negative_ttl_s, NEGATIVE_TTL_S)
        return missing

    async def _lookup_size(self, image: Image, size: int) -> EntryAttributes:
        disk = await self._disks.inspect(image)
        if disk.size is None:
            raise ImageRefused(image.id, disk.refused or "")
        if not disk.size <= size <= SIZE_MAX:
            raise FUSEError(errno.EINVAL)
        return self._attributes(Overlay(self.sizes.number(image.id, size)))

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return await _answer(self._getattr, inode)

    async def _getattr(self, inode: int) -> EntryAttributes:
        node = node_of(inode)
        if node is None:
            raise FUSEError(errno.ENOENT)
        try:
            return await self._describe_node(node)
        except NoEntry:
            # The kernel asks before it reads: who has the file of an image that is gone open is to read on.
            if inode not in self._by_inode:
                raise
            opened = self._by_inode[inode][0]
            entry = self._new_entry()
            self._describe_file(entry, opened.image, opened.view.size, opened.stored)
            entry.st_ino = pyfuse3.InodeT(inode)
            return entry

    async def _describe_node(self, node: Folder | Node | Overlay | ScratchNode) -> EntryAttributes:
        if isinstance(node, ScratchNode):
            return self._describe_scratch(await self._in_nova(Folder.NOVA).scratch.attributes(node.number))
        return self._attributes(node)

    def _attributes(self, node: Folder | Node | Overlay) -> EntryAttributes:
        entry = self._new_entry()
        if isinstance(node, Folder):
            entry.st_ino = pyfuse3.InodeT(int(node))
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o555)
            if node is Folder.NOVA:
                owner = self._in_nova(node).owner
                entry.st_uid, entry.st_gid = owner.uid, owner.gid
                entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | owner.mode)
            entry.st_nlink = 2
            return entry
        if isinstance(node, Overlay):
            id_, size = self.sizes.meant(node.view)
            image = self._known(id_)
            self._describe_file(entry, image, size, self._stored(image, Slot.RAW))
            self._date(entry, id_, File(ViewKind.RESIZED, size))
            entry.st_ino = pyfuse3.InodeT(overlay_inode(node.view))
            return entry
        image = self._image_by_number(node.image_number)
        if node.slot is Slot.LINK:
            self._describe(entry, image, stat.S_IFLNK | 0o777, len(_target(image)))
        elif node.slot is Slot.SIZES:
            self._describe(entry, image, stat.S_IFDIR | 0o555, 0)
            entry.st_nlink = 2
        elif node.slot is Slot.RAW:
            # Without a size what is refused, and what nobody has looked at: a listing does not fetch. Whoever has
            # it open since before it was refused is to get errors, not its end.
            known = image.disk.size if image.disk is not None else None
            if known is None:
                opened = self._by_inode.get(inode_of(node.slot, node.image_number), ())
                known = max((one.view.size for one in opened), default=0)
            self._describe_file(entry, image, known, self._stored(image, Slot.RAW))
            self._date(entry, image.id, File(ViewKind.RAW))
            if image.disk is None:
                entry.entry_timeout = entry.attr_timeout = 0
        else:
            self._describe_file(entry, image, image.size, self._stored(image))
            self._date(entry, image.id, File(ViewKind.ORIGINAL))
        entry.st_ino = pyfuse3.InodeT(inode_of(node.slot, node.image_number))
        return entry

    def _new_entry(self) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_uid, entry.st_gid = self._config.uid, self._config.gid
        entry.entry_timeout, entry.attr_timeout = ENTRY_TIMEOUT_S, ATTR_TIMEOUT_S
        return entry

    def _describe(self, entry: EntryAttributes, image: Image, mode: int, size: int) -> None:
        entry.st_mode, entry.st_size = pyfuse3.ModeT(mode), size
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = image.updated_s * 10**9

    def _describe_file(self, entry: EntryAttributes, image: Image, size: int, stored: StoredView | None) -> None:
        self._describe(entry, image, stat.S_IFREG | self._config.file_mode, size)
        entry.st_blksize = 65536
        # Not 0: `tar -S` takes a file without blocks for one hole, and does not read it.
        entry.st_blocks = max(0 if stored is None else -(-stored.cached // 512), min(size, 1))
        entry.attr_timeout = ATTR_TIMEOUT_FILE_S
        if stored is None or not stored.complete:
            entry.attr_timeout = ATTR_TIMEOUT_PARTIAL_S

    def _date(self, entry: EntryAttributes, image: str, file: File) -> None:
        """Times that somebody gave this file. Not those of another of the image: a file whose time of modification
        is another one has its pages dropped by the kernel."""
        touch = self._leases.touches.of(image, file)
        if touch is not None:
            entry.st_atime_ns, entry.st_mtime_ns = touch.atime_ns, touch.mtime_ns

    async def readlink(self, inode: int, ctx: RequestContext) -> Any:
        return await _answer(self._readlink, inode)

    async def _readlink(self, inode: int) -> bytes:
        return _target(self._image(inode, Slot.LINK))

    # ── changes ──

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """The times of a file can be set: whoever does so is about to need it. The kernel has looked who may."""
        node = node_of(inode)
        if isinstance(node, ScratchNode):
            changes = Changes(
                attr.st_size if fields.update_size else None,
                attr.st_mode if fields.update_mode else None,
                attr.st_uid if fields.update_uid else None,
                attr.st_gid if fields.update_gid else None,
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
            )
            return await _answer(self._change, node.number, changes)
        if fields.update_size:
            raise FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            is_so = await _answer(self._getattr, inode)
            # Who has a whole tree belong to somebody, as deployments do, is not to fail over what does.
            if (
                (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(is_so.st_mode))
                or (fields.update_uid and attr.st_uid != is_so.st_uid)
                or (fields.update_gid and attr.st_gid != is_so.st_gid)
            ):
                raise FUSEError(errno.EROFS)
            if not (fields.update_atime or fields.update_mtime):
                return is_so
        atime_ns = attr.st_atime_ns if fields.update_atime else None
        mtime_ns = attr.st_mtime_ns if fields.update_mtime else None
        return await _answer(self._touch, inode, atime_ns, mtime_ns)

    async def _touch(self, inode: int, atime_ns: int | None, mtime_ns: int | None) -> EntryAttributes:
        found, node = self._file(inode), node_of(inode)
        if found is None:
            raise FUSEError(errno.EROFS)
        image, slot = found
        if isinstance(node, Overlay):
            file = File(ViewKind.RESIZED, self.sizes.meant(node.view)[1])
        else:
            file = File(ViewKind.RAW if slot is Slot.RAW else ViewKind.ORIGINAL)
        if atime_ns is not None or mtime_ns is not None:
            before = await self._getattr(inode)
            atime_ns = before.st_atime_ns if atime_ns is None else atime_ns
            mtime_ns = before.st_mtime_ns if mtime_ns is None else mtime_ns
            self._leases.touch(image.id, file, atime_ns, mtime_ns)
            self.on_touch(image.id, file.kind)
        return await self._getattr(inode)

    async def _read_only(self, *what: Any, **named: Any) -> Any:
        """The mount is not read-only to the kernel, which would keep touches from us."""
        raise FUSEError(errno.EROFS)

    mknod = mkdir = symlink = link = rmdir = setxattr = removexattr = _read_only

    # ── changes in nova/ ──

    def _in_nova(self, *parents: int) -> NovaFolder:
        """Where something can be changed: in this folder, and nowhere else."""
        if self._nova is None or any(parent != Folder.NOVA for parent in parents):
            raise ReadOnly("outside nova/")
        return self._nova

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        return await _answer(self._create, parent_inode, name, Owner(ctx.uid, ctx.gid, mode), flags)

    async def _create(
        self, parent: int, name: bytes, owner: Owner, flags: int
    ) -> tuple[FileInfo, EntryAttributes]:
        file, attributes = await self._in_nova(parent).scratch.create(name, owner, flags)
        return self._open_scratch(file), self._describe_scratch(attributes)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await _answer(self._unlink, parent_inode, name)

    async def _unlink(self, parent: int, name: bytes) -> None:
        await self._in_nova(parent).unlink(name)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        await _answer(self._rename, parent_inode_old, name_old, parent_inode_new, name_new, flags)

    async def _rename(self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int) -> None:
        nova = self._in_nova(old_parent, new_parent)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        await nova.rename(old, new, may_replace=not flags)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await _answer(self._write, fh, off, buf)

    async def _write(self, fh: int, off: int, buf: bytes) -> int:
        opened = self._open[fh]
        if not isinstance(opened, _OpenedScratch):
            raise ReadOnly("an image")
        return await opened.view.write(off, buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Of an image nothing was written."""
        opened = self._open[fh]
        if isinstance(opened, _OpenedScratch):
            await _answer(partial(opened.view.sync, only_data=bool(datasync)))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        if self._nova is not None:
            await _answer(self._nova.scratch.sync)

    def _open_scratch(self, file: ScratchFile) -> FileInfo:
        handle = next(self._handles)
        self._open[handle] = _OpenedScratch(file)
        return FileInfo(fh=pyfuse3.FileHandleT(handle))

    async def _change(self, number: int, changes: Changes) -> EntryAttributes:
        return self._describe_scratch(await self._in_nova(Folder.NOVA).scratch.change(number, changes))

    def _describe_scratch(self, file: Attributes) -> EntryAttributes:
        entry = self._new_entry()
        entry.st_ino, entry.generation = pyfuse3.InodeT(scratch_inode(file.number)), file.generation
        entry.st_uid, entry.st_gid = file.owner.uid, file.owner.gid
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | file.owner.mode)
        entry.st_size, entry.st_blocks, entry.st_blksize = file.size, file.blocks, 65536
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = file.atime_ns, file.mtime_ns, file.ctime_ns
        entry.attr_timeout = ATTR_TIMEOUT_PARTIAL_S
        return entry

    # ── folders ──

    async def opendir(self, inode: int, ctx: RequestContext) -> Any:
        return await _answer(self._opendir, inode)

    async def _opendir(self, inode: int) -> int:
        folder = node_of(inode)
        entries = await self._entries(folder)
        handle = next(self._handles)
        self._folders[handle] = folder, entries
        return handle

    async def _entries(self, folder: _Inode) -> list[_Entry]:
        match folder:
            case Folder.ROOT:
                return list(self._tops.items())
            case Folder.NOVA:
                return list(self._in_nova(folder).entries())
            case Folder.IMAGES | Folder.RAW | Folder.RESIZED:
                slot = _SLOT_OF[folder]
                return [(image.id.encode(), Node(slot, image.number)) for image in await self._catalog.listing()]
            case Folder.BY_NAME:
                await self._catalog.listing()
                return [(name, Node(Slot.LINK, number)) for name, number in self._catalog.links.items()]
            case Node(Slot.SIZES, number):
                views = self._store.resized_views(self._image_by_number(number).id)
                return [(size_name(view.size), Overlay(view.number)) for view in views]
        raise FUSEError(errno.ENOTDIR)

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        await _answer(self._readdir, fh, start_id, token)

    async def _readdir(self, fh: int, start_id: int, token: Any) -> None:
        folder, entries = self._folders[fh]
        for position, (name, listed) in enumerate(entries[start_id : start_id + 1000], start_id + 1):
            # What is told here the kernel believes as it does a look-up, and it changes no name meanwhile.
            node = self._in_nova(folder).still(name, listed) if folder is Folder.NOVA else listed
            if node is None:
                continue
            try:
                attributes = await self._describe_node(node)
            except (NoEntry, ScratchFailed):
                continue  # Gone since the folder was opened.
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, position):
                return

    async def releasedir(self, fh: int) -> None:
        del self._folders[fh]

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        usage = os.statvfs(self._store.path)
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        # What can be written in nova/ is what the store's filesystem has; all else is taken.
        found.f_bfree = found.f_bavail = 0 if self._nova is None else usage.f_bavail * usage.f_frsize // 4096
        found.f_blocks = sum(image.size for image in self._catalog.shown()) // 4096 + found.f_bfree
        found.f_files = len(self._catalog)
        found.f_namemax = usage.f_namemax
        return found

    # ── extended attributes ──

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> Any:
        return await _answer(self._getxattr, inode, name)

    async def _getxattr(self, inode: int, name: bytes) -> bytes:
        found = self._file(inode)
        if found is None or not name.startswith(XATTR_PREFIX):
            raise FUSEError(pyfuse3.ENOATTR)
        value = self._xattrs(*found).get(name.removeprefix(XATTR_PREFIX).decode(errors="replace"))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode(errors="replace")  # JSON lets a name have a lone surrogate.

    async def listxattr(self, inode: int, ctx: RequestContext) -> Any:
        return await _answer(self._listxattr, inode)

    async def _listxattr(self, inode: int) -> list[bytes]:
        found = self._file(inode)
        return [] if found is None else [XATTR_PREFIX + name.encode() for name in self._xattrs(*found)]

    def _file(self, inode: int) -> tuple[Image, Slot] | None:
        """Whose file an inode is, and whether its own or that of its disk; None for what is no file."""
        node = node_of(inode)
        if isinstance(node, Overlay):
            return self._known(self.sizes.meant(node.view)[0]), Slot.RAW
        if isinstance(node, Node) and node.slot in (Slot.ORIGINAL, Slot.RAW):
            return self._image_by_number(node.image_number), node.slot
        return None

    def _xattrs(self, image: Image, slot: Slot) -> dict[str, str]:
        stored = self._stored(image, slot)
        found = {
            "id": image.id,
            "name": image.name or "",
            "disk_format": image.disk_format or "",
            "state": state_of(stored, image),
            "cached_bytes": str(stored.cached if stored else 0),
            "in_use": "1" if self.open_count[image.id] else "0",
            "pinned": "1" if self._leases.pin_of(image.id) else "0",
            "priority": self.priority_of(image),
        }
        if image.disk is not None and image.disk.refused is not None:
            found["refused"] = image.disk.refused
            found["state"] = "refused" if slot is Slot.RAW else found["state"]
        return found

    # ── what stands behind an inode ──

    def inodes_of(self, image: Image) -> list[int]:
        """Of the image's own file, of its disk, and of those of other sizes."""
        overlays = {view.number for view in self._store.resized_views(image.id)}
        overlays |= {ViewNo(node.view) for node in map(node_of, self._by_inode) if isinstance(node, Overlay)}
        return [inode_of(slot, image.number) for slot in (Slot.ORIGINAL, Slot.RAW)] + [
            overlay_inode(number) for number in overlays
        ]

    def _image(self, inode: int, slot: Slot | None = None) -> Image:
        node = node_of(inode)
        wrong = isinstance(node, Node) and slot is not None and node.slot is not slot
        if not isinstance(node, Node) or wrong or (slot is None and node.slot is Slot.SIZES):
            is_folder = isinstance(node, Folder) or (isinstance(node, Node) and node.slot is Slot.SIZES)
            raise FUSEError(errno.EISDIR if is_folder else errno.EINVAL)
        return self._image_by_number(node.image_number)

    def _image_by_number(self, number: int) -> Image:
        image = self._catalog.by_number(number)
        if image is None:
            raise NoEntry(number)
        return image

    def _known(self, id_: str) -> Image:
        image = self._catalog.known(id_)
        if image is None:
            raise NoEntry(id_)
        return image

    def _stored(self, image: Image, slot: Slot = Slot.ORIGINAL) -> StoredView | None:
        inside = slot is Slot.RAW and image.disk_format not in PLAIN
        return self._store.known_view(image.id, ViewKind.RAW if inside else ViewKind.ORIGINAL)


class _Opened(NamedTuple):
    """One handle: what it reads, the view that the store has of it, of which image as it was then, and the views
    that it leases."""

    inode: int
    view: View
    stored: StoredView
    image: Image
    leased: list[ViewNo]


class _OpenedScratch(NamedTuple):
    """One handle of a file in `nova/` that is no image's."""

    view: ScratchFile


_Inode = Folder | Node | Overlay | ScratchNode | None
_Entry = tuple[bytes, Folder | Node | Overlay | ScratchNode]
_SLOT_OF = {Folder.IMAGES: Slot.ORIGINAL, Folder.RAW: Slot.RAW, Folder.RESIZED: Slot.SIZES}


def _target(image: Image) -> bytes:
    return b"../images/" + image.id.encode()


async def _answer(work: Callable[[*Args], Awaitable[Answer]], *args: *Args) -> Answer:
    """The border: our failures become errnos, and what nobody expected EIO and a traceback in the log."""
    try:
        return await work(*args)
    except FUSEError:
        raise
    except NoEntry as error:
        raise FUSEError(error.errno) from None
    except ScratchFailed as error:
        raise FUSEError(error.code) from None
    except CachefsError as error:
        # They come as often as somebody tries. What an image is refused for was said when that was found.
        level = logging.INFO if isinstance(error, NotPermitted) else logging.WARNING
        if isinstance(error, ReadOnly):
            level = logging.DEBUG if error.image is None else logging.INFO
        level = logging.DEBUG if isinstance(error, ImageRefused) else level
        repeats.log(level, type(error), "%s", error, image=error.image)
        raise FUSEError(error.errno) from None
    except Exception:  # One net, and only here: a bug must not take the mount down with it.
        log.exception("unexpected failure of %s%r", work, args)
        raise FUSEError(errno.EIO) from None


# ── Mounting ──────────────────────────────────────────────────────────────────────────────────────────


class Mount:
    """The session with the kernel. Nothing else knows how it is mounted."""

    def __init__(self, filesystem: Filesystem, config: MountConfig) -> None:
        self._filesystem = filesystem
        self.mountpoint = os.path.abspath(config.mountpoint)
        self._allow_other = config.allow_other
        self._mounted = False
        self._notices = Notices()

    def open(self) -> None:
        """Mounts. Raises MountError with what is to be done."""
        prepare_mountpoint(self.mountpoint)
        options = {"fsname=cachefs", "subtype=cachefs", "default_permissions"}
        if self._allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(self._filesystem, self.mountpoint, options)
        except RuntimeError as error:
            hint = (
                " (allow_other needs user_allow_other in /etc/fuse.conf)"
                if self._allow_other and os.geteuid()
                else ""
            )
            raise MountError(self.mountpoint, f"cannot be mounted: {error}{hint}") from error
        self._mounted = True

    async def wait_ready(self) -> None:
        """Returns when `serve` has the kernel's hello: from now on the mount can be used."""
        await self._filesystem.handshake.wait()
        await trio.to_thread.run_sync(tune, self.mountpoint)

    async def serve(self) -> None:
        """Answers the kernel until it unmounts or the caller cancels."""
        await pyfuse3.main(max_tasks=TASKS_MAX)

    @property
    def is_ready(self) -> bool:
        """Whether it is mounted and can be used."""
        return self._mounted and self._filesystem.handshake.is_set()

    def forget(self, image: Image) -> None:
        """What was looked up of the image is not to be found by its names any more."""
        self._filesystem.sizes.end(image.id)
        self.withdraw(image)

    def withdraw(self, image: Image) -> None:
        """Has the kernel look the image's name up again."""
        if self._mounted:
            name = pyfuse3.FileNameT(image.id.encode())
            for folder in (Folder.IMAGES, Folder.RAW, Folder.RESIZED):
                self._notices.put(partial(pyfuse3.invalidate_entry, pyfuse3.InodeT(folder), name))
            name = pyfuse3.FileNameT(base_name(image.id))
            self._notices.put(partial(pyfuse3.invalidate_entry, pyfuse3.InodeT(Folder.NOVA), name))

    def drop_pages(self, image: Image) -> None:
        """Nothing of what the kernel keeps of the image is given to anybody any more: who reads asks here."""
        for inode in self._filesystem.inodes_of(image) if self._mounted else ():
            self._notices.put(partial(pyfuse3.invalidate_inode, pyfuse3.InodeT(inode)))

    def drop_attributes(self, image: Image) -> None:
        """Has the kernel ask again how much of the image's files is here."""
        for inode in self._filesystem.inodes_of(image) if self._mounted else ():
            self._notices.put(partial(pyfuse3.invalidate_inode, pyfuse3.InodeT(inode), attr_only=True))

    def close(self) -> None:
        """Unmounts, lazily where files are open; their readers get an error from now on."""
        if self._mounted:
            self._mounted = False
            self._notices.close()
            pyfuse3.close(unmount=True)
