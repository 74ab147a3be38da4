"""How important an image is: `critical`, `normal` or `low`, and who may say so. Rule: pure; what anybody who owns
an image can write into its metadata makes it less important, but never more, unless the operator trusts its owner.

An operator's rules come first: critical, then normal, then low, and the first that fits decides. After them comes
the image's own property `cachefs_priority`. An image's id and its owner are not for its owner to choose, so rules
of these hold for every image. Its name, its tags and its properties are: they lift only an image that is trusted.
Anybody may say that an image is `low`: that takes nothing from anybody.

Trusted is, by `trust_properties`:

    public    images that everybody sees. Publishing one is for administrators, by Glance's default policies;
              changing its metadata afterwards is also for the members of the project that owns it
    owner:ID  images of this project
    all       every image: where Glance's property protections keep tenants from writing `cachefs_*`, or all
              tenants are friends
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

from cachefs.plan.eviction import Priority
from cachefs.plan.metadata import PRIORITY


class Described(Protocol):
    """What is looked at of an image."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    @property
    def owner(self) -> str | None: ...

    @property
    def visibility(self) -> str | None: ...

    @property
    def tags(self) -> Sequence[str]: ...

    @property
    def properties(self) -> Sequence[tuple[str, str]]: ...


class By(Enum):
    """What a rule looks at; the value is how it is written."""

    ID = "id"
    OWNER = "owner"
    TAG = "tag"
    NAME = "name"


_FITS: dict[By, Callable[[Described, str], bool]] = {
    By.ID: lambda image, wanted: image.id == wanted,
    By.OWNER: lambda image, wanted: image.owner == wanted,
    By.TAG: lambda image, wanted: wanted in image.tags,
    By.NAME: lambda image, wanted: image.name is not None and fnmatchcase(image.name, wanted),
}


class Rule(NamedTuple):
    """Images of one id, owner or tag, or with names like a pattern."""

    by: By
    value: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`owner:ID`, `tag:TAG`, `name:PATTERN` or `id:UUID`. Raises ValueError."""
        by, _, value = text.strip().partition(":")
        if by not in [member.value for member in By] or not value.strip():
            raise ValueError(f"{text!r} is no rule: write owner:ID, tag:TAG, name:PATTERN or id:UUID")
        return cls(By(by), value.strip())

    def fits(self, image: Described) -> bool:
        return _FITS[self.by](image, self.value)

    def __str__(self) -> str:
        return f"{self.by.value}:{self.value}"


TRUST_PUBLIC, TRUST_ALL, _TRUST_OWNER = "public", "all", "owner:"


def parse_trust(text: str) -> str:
    """`public`, `all` or `owner:ID`, as it is. Raises ValueError."""
    said = text.strip()
    if said in (TRUST_PUBLIC, TRUST_ALL) or (said.startswith(_TRUST_OWNER) and len(said) > len(_TRUST_OWNER)):
        return said
    raise ValueError(f"{text!r} is nobody to trust: write public, owner:ID or all")


class Ranking(NamedTuple):
    """What an image is, and why in words."""

    priority: Priority
    why: str


DEFAULT = Ranking(Priority.NORMAL, "by default")


@dataclass(frozen=True, slots=True)
class Rules:
    """All of `[priorities]`."""

    critical: tuple[Rule, ...] = ()
    normal: tuple[Rule, ...] = ()
    low: tuple[Rule, ...] = ()
    trust: tuple[str, ...] = (TRUST_PUBLIC,)

    def trusts(self, image: Described) -> bool:
        """Whether what the image's owner wrote into its metadata counts."""
        return any(
            said == TRUST_ALL
            or (said == TRUST_PUBLIC and image.visibility == "public")
            or (image.owner is not None and said == _TRUST_OWNER + image.owner)
            for said in self.trust
        )

    def rank(self, image: Described) -> Ranking:
        """How important the image is."""
        trusted = self.trusts(image)
        for priority, rules in ((Priority.CRITICAL, self.critical), (Priority.NORMAL, self.normal)):
            for rule in rules:
                if (trusted or rule.by in (By.ID, By.OWNER)) and rule.fits(image):
                    return Ranking(priority, f"[priorities] {rule}")
        for rule in self.low:
            if rule.fits(image):
                return Ranking(Priority.LOW, f"[priorities] {rule}")
        return self._by_property(image, trusted)

    @staticmethod
    def _by_property(image: Described, trusted: bool) -> Ranking:
        said = next((value for name, value in image.properties if name == PRIORITY), None)
        if said is None:
            return DEFAULT
        try:
            priority = Priority[said.strip().upper()]
        except KeyError:
            return Ranking(Priority.NORMAL, f"{PRIORITY} says none of critical, normal, low")
        if priority > Priority.NORMAL and not trusted:
            return Ranking(Priority.NORMAL, f"{PRIORITY}={said.strip()} is not trusted of this image")
        return Ranking(priority, f"property {PRIORITY}")
