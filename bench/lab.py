"""What benchmarks share: a throw-away folder on a real disk, one Glance, and images in it. Rule: what is made here
is gone when the lab closes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.node import Node
from tests.cloud import Glance

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Lab:
    """`quick` halves what takes long."""

    def __init__(self, parent: Path, quick: bool) -> None:
        self.quick = quick
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=parent))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._numbers = count(1)
        self._images: dict[int, str] = {}
        self._began_s = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    @cached_property
    def glance(self) -> Glance:
        self.say("starting Glance")
        # Without the inspection of formats: images here are random bytes.
        return self._stack.enter_context(Glance(self.folder / "glance", check_formats=False))

    def image(self, size: int) -> str:
        """A raw image of random bytes in Glance, made once for all: no page is zero, no two are alike."""
        if size not in self._images:
            self.say(f"making an image of {size // MIB} MiB")
            source = self.folder / "upload"
            with source.open("wb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
            self._images[size] = self.glance.upload(f"bench-{size}", source)
            source.unlink()
        return self._images[size]

    def warm_origin(self, image: str) -> Path:
        """Brings Glance's own file of the image into the page cache."""
        path = self.glance.data_path(image)
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(MIB)
            while file.readinto(buffer):
                pass
        return path

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that is gone afterwards, with what it held."""
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def node(self, endpoint: str, **sections: Mapping[str, object]) -> Iterator[Node]:
        """A daemon with an empty store."""
        with self.scratch() as folder, Node(folder, endpoint, **sections) as node:
            yield node

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
