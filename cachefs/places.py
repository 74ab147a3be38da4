"""Where in the mount an image can be opened. Rule: nobody is asked anything; what is named can be opened, as far
as is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cachefs.catalog import Catalog, Image
from cachefs.guest_disks import GuestDisks
from cachefs.namespace import Slot, base_name
from cachefs.nova_folder import NovaFolder


@dataclass
class Paths:
    """Of one image, absolute. `file`: as Glance has it; `disk`: the guest disk; `resized`: the folder in which
    each size is a name; `scratch`: the scratch file that has the image's name in `nova/`."""

    file: list[str] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)
    resized: str | None = None
    scratch: str | None = None


class Places:
    """On the loop."""

    def __init__(self, mountpoint: str, catalog: Catalog, disks: GuestDisks, nova: NovaFolder | None) -> None:
        self._mountpoint, self._catalog, self._disks, self._nova = mountpoint, catalog, disks, nova

    def of(self, image: Image) -> Paths:
        """All of them; none of what may not be opened."""
        paths, nova = Paths(), self._nova
        base = base_name(image.id)
        in_nova = f"{self._mountpoint}/nova/{base.decode()}"
        if nova is not None and nova.scratch.number_of(base) is not None:
            paths.scratch, nova = in_nova, None  # It stands before the image.
        if image.condemned is not None or not self._catalog.may_be_opened(image):
            return paths
        paths.file.append(f"{self._mountpoint}/images/{image.id}")
        is_served = self._disks.why_not(image) is None
        if is_served:
            paths.disk.append(f"{self._mountpoint}/raw/{image.id}")
            paths.resized = f"{self._mountpoint}/resized/{image.id}"
        if nova is not None and nova.slot_of(image) is Slot.ORIGINAL:
            paths.file.append(in_nova)
        elif nova is not None and is_served:
            paths.disk.append(in_nova)
        return paths
