"""Strong digests of the blocks of verified images, which outlive the bytes: what is fetched again is compared with
them. Rule: a digest is believed only once all of its image was compared with Glance's hash.

Whoever reads all of a view to compare it makes a `Pass`, and tells it the digests of what it read, in order:

    passed = digests.begin(view)
    passed.note(offset, passed.digests(data))    # `passed.digests` in a thread, all else on the loop
    ...
    await passed.trust()                         # the hash was the promised one

Each span's digests are written as soon as they are complete, so a pass over any image needs the memory of one
span. They count for nothing without the view's mark, which is written behind them; a commit holds what was handed
to the writer before, so a mark that is there has all of its spans before it. A pass that is broken off leaves no
mark, and the next one writes over what it left. A view that has its mark is never written to again: its bytes do
not change, and another image is another view. Records go with the view, not with its bytes.

Digests that were lost or have rotted cost the protection of their span, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from cachefs import logs
from cachefs.errors import RecordCorrupt
from cachefs.plan.extents import BLOCK, ceil
from cachefs.store import format as f
from cachefs.store.format import BLOCK_DIGEST_BYTES, SpanNo, Table, ViewKind, ViewNo, block_digests
from cachefs.store.health import DiskUnusable

if TYPE_CHECKING:
    from cachefs.store.content import Store
    from cachefs.store.view import StoredView

log = logs.get(__name__)

# The digests of 4 GiB.
CACHED_BYTES_MAX = 1 << 20
# A pass waits so long for its last records to be committed. If they are later, the next start finds them.
COMMIT_S = 60.0
CHANGED_MAX = 1000  # Images that are named.
# What a pass writes goes with the commits by which a full store writes down what it evicts: they must not fail for
# lack of room. So often, in bytes of the image, it is asked whether so much is left beyond `min_free`.
ROOM_ASKED_EVERY, ROOM_BYTES = 4 << 30, 16 << 20


def first_difference(data: memoryview, digests: bytes) -> int | None:
    """The number of the first block of `data` that has another digest; None when none has. For a thread."""
    for number in range(ceil(len(data), BLOCK) // BLOCK):
        found = block_digests(data[number * BLOCK : (number + 1) * BLOCK])
        if found != digests[number * BLOCK_DIGEST_BYTES : (number + 1) * BLOCK_DIGEST_BYTES]:
            return number
    return None


class Digests:
    """See the module. On the loop, unless said otherwise."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._trusted: set[ViewNo] = set()
        self._cached: OrderedDict[tuple[ViewNo, SpanNo], bytes] = OrderedDict()
        self._cached_bytes = 0
        # Images of which other bytes came than were verified, since the start: where the first were.
        self.changed: dict[str, int] = {}
        self.on_changed: Callable[[StoredView, int], None] = lambda view, offset: None

    def load_marks(self) -> None:
        """Once, at the start."""
        with self._store.index.reading() as snapshot:
            for view in self._store.views():
                key = f.view_key(view.number)
                mark = snapshot.get(Table.BLOCK_DIGESTS, key)
                try:
                    if mark is not None and f.decode_digests_mark(key, mark) == view.size:
                        self._trusted.add(view.number)
                except RecordCorrupt as error:
                    log.error("%s: what is fetched again of view %d is not compared", error, view.number)

    # ── looking up ──

    def trusted(self, view: StoredView) -> bool:
        """Whether what arrives of the view is to be compared."""
        return view.number in self._trusted

    def of(self, view: StoredView, span: SpanNo) -> bytes | None:
        """The digests of a span's blocks, if they are in memory."""
        return self._cached.get((view.number, span))

    async def load(self, view: StoredView, span: SpanNo) -> bytes | None:
        """The digests of a span's blocks; None where there are none to be believed, or none can be had now. No
        checkpoint when they are in memory."""
        found = self.of(view, span)
        if found is not None:
            self._cached.move_to_end((view.number, span))
            return found
        if not self.trusted(view) or not self._store.health.may_look_up:
            return None
        key = f.span_key(view.number, span)
        try:
            record = await self._store.read_disk("a look-up", self._store.get, Table.BLOCK_DIGESTS, key)
            found = None if record is None else f.decode_block_digests(key, record, self._blocks(view, span))
        except DiskUnusable:
            return None
        except RecordCorrupt as error:
            log.error("%s: what comes of this span is not compared", error, image=view.record.image)
        if found is not None:
            self._cache((view.number, span), found)
        return found

    def _cache(self, key: tuple[ViewNo, SpanNo], digests: bytes) -> None:
        self._cached_bytes += len(digests) - len(self._cached.get(key, b""))
        self._cached[key] = digests
        while self._cached_bytes > CACHED_BYTES_MAX:
            self._cached_bytes -= len(self._cached.popitem(last=False)[1])

    def _blocks(self, view: StoredView, span: SpanNo) -> int:
        return ceil(view.extent_of(span).length, BLOCK) // BLOCK

    # ── remembering ──

    def begin(self, view: StoredView) -> Pass:
        """All of the view is to be read, from its first byte to its last, and compared."""
        return Pass(self._store, self, view)

    def believe(self, view: StoredView) -> None:
        """The view's mark is durable, and all of it is here and right."""
        self._trusted.add(view.number)
        self.changed.pop(view.record.image, None)

    def forget(self, view: ViewNo) -> None:
        """The view is no more. Its records went with it."""
        self._trusted.discard(view)
        for key in [key for key in self._cached if key[0] == view]:
            self._cached_bytes -= len(self._cached.pop(key))

    # ── what differed ──

    def note_changed(self, view: StoredView, offset: int) -> None:
        """The block at `offset` came otherwise than it was verified. Nobody gets it, and it is not kept."""
        image = view.record.image
        if image in self.changed:
            return
        if len(self.changed) < CHANGED_MAX:
            self.changed[image] = offset
        log.error(
            "CHANGED AT ITS ORIGIN: what came for offset %d is not what was verified, and is refused. "
            "What is cached is right, and goes on being served", offset, image=image,
        )  # fmt: skip
        if view.record.kind is not ViewKind.ENDED:
            self.on_changed(view, offset)

    def status(self) -> dict[str, Any]:
        """For `status`: views that are protected so; images that changed since the start and were not verified
        again, and where."""
        return {"with_digests": len(self._trusted), "origin_changed": dict(self.changed)}


class Pass:
    """All of a view as somebody reads it, in order. Nothing comes of one that leaves something out, of a view that
    ended meanwhile, of one whose digests are known already, or where the store has no room for them."""

    def __init__(self, store: Store, digests: Digests, view: StoredView) -> None:
        self._store, self._digests, self._view = store, digests, view
        self._at = 0
        self._held = bytearray()  # Of the span that `_at` is in.
        self._void = digests.trusted(view)
        self._until_asked = 0

    def digests(self, data: memoryview) -> bytes:
        """What `note` wants of whole blocks, or of blocks up to the view's end; for a thread. Nothing where that
        is not wanted."""
        self._until_asked -= len(data)
        if not self._void and self._until_asked < 0:
            self._until_asked = ROOM_ASKED_EVERY
            usage = self._store.usage()
            self._void = usage.free - usage.min_free < ROOM_BYTES
        return b"" if self._void else block_digests(data)

    def note(self, offset: int, digests: bytes) -> None:
        """The digests of the blocks from `offset` on: it follows what was noted before."""
        if self._void:
            return
        out_of_order = offset != self._at or offset % BLOCK
        if out_of_order or not self._is_current or self._store.writer.trouble is not None:
            self._void = True
            return
        store, size = self._store, self._view.size
        self._held += digests
        self._at = min(offset + len(digests) // BLOCK_DIGEST_BYTES * BLOCK, size)
        whole = store.span_size // BLOCK * BLOCK_DIGEST_BYTES
        first = offset - offset % store.span_size
        while len(self._held) >= whole or (self._held and self._at == size):
            key = f.span_key(self._view.number, SpanNo(first // store.span_size))
            store.put(Table.BLOCK_DIGESTS, key, f.encode_block_digests(key, bytes(self._held[:whole])))
            del self._held[:whole]
            first += store.span_size

    async def trust(self) -> bool:
        """All that was noted had the promised hash: it is believed from now on, if that was all of the view and is
        durable. False when it is not."""
        view, store = self._view, self._store
        if self._digests.trusted(view):
            self._digests.believe(view)
            return True
        if self._void or self._at != view.size or not self._is_current:
            return False
        key, mark = f.view_key(view.number), f.encode_digests_mark(view.number, view.size)
        store.put(Table.BLOCK_DIGESTS, key, mark)
        with trio.move_on_after(COMMIT_S):
            await store.flush()
            # It was not, if that commit failed; then older records may still be in place of those before it.
            if store.health.may_look_up and await self._committed(key) == mark and self._is_current:
                self._digests.believe(view)
                return True
        return False

    async def _committed(self, key: bytes) -> bytes | None:
        try:
            return await self._store.read_disk("a look-up", self._store.get, Table.BLOCK_DIGESTS, key)
        except DiskUnusable:
            return None

    @property
    def _is_current(self) -> bool:
        view = self._view
        return view.condemned is None and self._store.view_by_number(view.number) is view
