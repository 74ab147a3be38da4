"""What a value may look like, beyond oslo.config's own types. Rule: text in, value or ValueError out."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import ip_address

from oslo_config import types

from cachefs.plan.priorities import Rule, parse_trust

SPAN_SIZE_MIN, SPAN_SIZE_MAX = 1 << 20, 64 << 20


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of bytes, or a part of the filesystem on which the store lies."""

    number: int | float
    is_percent: bool = False

    def of(self, filesystem_bytes: int) -> int:
        """In bytes."""
        return int(filesystem_bytes * self.number / 100) if self.is_percent else int(self.number)

    def __str__(self) -> str:
        return f"{self.number:g}%" if self.is_percent else str(self.number)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|([KMGTP]?)(?:iB|i)?)", re.IGNORECASE | re.ASCII)


def _amount(text: str) -> Amount:
    """`1048576`, `200G` (GiB), `1.5 TiB`, `60%`. Not `200GB`: for some that is 7 % less."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write bytes, 200G for GiB, or 60%")
    number, percent, unit = match.groups()
    if percent:
        return Amount(float(number), is_percent=True)
    return Amount(int(Decimal(number) * 1024 ** (" KMGTP".index(unit.upper() or " "))))


class _TextType(types.ConfigType):
    """Shown in the sample as it is written in the code."""

    def _formatter(self, value: str) -> str:
        return value


class AmountType(_TextType):
    """`zero`: nothing at all is sensible. `whole`: all of the filesystem is."""

    def __init__(self, *, zero: bool, whole: bool) -> None:
        super().__init__("bytes, 200G for GiB, or 60% of the filesystem")
        self._zero, self._whole = zero, whole

    def __call__(self, value: str) -> Amount:
        amount = _amount(value)
        if amount.number == 0 and not self._zero:
            raise ValueError(f"{value!r} leaves no room at all")
        if amount.is_percent and (amount.number > 100 or (amount.number == 100 and not self._whole)):
            raise ValueError(f"{value!r} is {'more than' if self._whole else 'all of'} the filesystem")
        return amount


class ShareType(_TextType):
    """A share in percent, of what is said where it is used. The value is a fraction: 0 < x <= 1."""

    def __init__(self) -> None:
        super().__init__("percent, as in 95%")

    def __call__(self, value: str) -> float:
        amount = _amount(value)
        if not amount.is_percent or not 0 < amount.number <= 100:
            raise ValueError(f"{value!r} is no share: write a percentage above 0% and up to 100%")
        return amount.number / 100


class RateType(_TextType):
    """Bytes per second."""

    def __init__(self) -> None:
        super().__init__("bytes per second, or 100M for MiB/s")

    def __call__(self, value: str) -> int:
        amount = _amount(value)
        if amount.is_percent:
            raise ValueError(f"{value!r} is no rate: write bytes per second, or 100M for MiB/s")
        return int(amount.number)


@dataclass(frozen=True, slots=True)
class Hours:
    """From the beginning of hour `first` to that of hour `last`, which may be on the next day."""

    first: int
    last: int

    def include(self, hour: int) -> bool:
        return (hour - self.first) % 24 < (self.last - self.first) % 24


class HoursType(_TextType):
    def __init__(self) -> None:
        super().__init__("hours of the day, as in 22-6")

    def __call__(self, value: str) -> Hours:
        match = re.fullmatch(r"(\d{1,2})\s*-\s*(\d{1,2})", value.strip(), re.ASCII)
        if match is None or max(first := int(match[1]), last := int(match[2])) > 24 or first % 24 == last % 24:
            raise ValueError(f"{value!r} are no hours: write the first and the one at which to stop, as in 22-6")
        return Hours(first % 24, last % 24)


class SpanSizeType(_TextType):
    def __init__(self) -> None:
        super().__init__("bytes, or 4M for MiB")

    def __call__(self, value: str) -> int:
        amount = _amount(value)
        size = int(amount.number)
        if amount.is_percent or size & (size - 1) or not SPAN_SIZE_MIN <= size <= SPAN_SIZE_MAX:
            raise ValueError(f"{value!r} is no power of two between 1M and 64M")
        return size


class FileModeType(_TextType):
    def __init__(self) -> None:
        super().__init__("octal mode")

    def __call__(self, value: str) -> int:
        if not re.fullmatch(r"(0o?)?[0-7]{3}", value):
            raise ValueError(f"{value!r} is no octal mode such as 0444")
        mode = int(value, 8)
        if mode & 0o222:
            raise ValueError(f"{value!r} has write bits: images are read-only")
        return mode


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: an IP address and a port; port 0 is any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class AddressType(_TextType):
    """The value is an Address, or an empty text for none."""

    def __init__(self) -> None:
        super().__init__("IP address and port, as in 127.0.0.1:19292 or [::1]:19292; or nothing")

    def __call__(self, value: str) -> Address | str:
        if not value.strip():
            return ""
        match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):(\d{1,5})", value.strip(), re.ASCII)
        try:
            if match is None or int(match[3]) > 65535:
                raise ValueError
            host = ip_address(match[1] or match[2])
            if (host.version == 6) != (match[1] is not None):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{value!r} is no address to listen at: write 127.0.0.1:19292 or [::1]:19292, or nothing"
            ) from None
        return Address(str(host), int(match[3]))


class PathType(_TextType):
    def __init__(self) -> None:
        super().__init__("absolute path")

    def __call__(self, value: str) -> str:
        if not value.startswith("/") or "\0" in value:
            raise ValueError(f"{value!r} is no absolute path")
        return os.path.normpath("/" + value.lstrip("/"))  # POSIX lets normpath keep a leading //.


class SecondsType(types.Float):
    def __init__(self, low: float, high: float) -> None:
        super().__init__(min=low, max=high, type_name="seconds")

    def __call__(self, value: str) -> float:
        number = super().__call__(value)
        if number is None or math.isnan(number):  # Neither is caught by a bound.
            raise ValueError(f"{value!r} is no time")
        return float(number)


class RuleType(_TextType):
    """Which images have a priority."""

    def __init__(self) -> None:
        super().__init__("owner:ID, tag:TAG, name:PATTERN or id:UUID")

    def __call__(self, value: str) -> Rule:
        return Rule.parse(value)


class TrustType(_TextType):
    """Whose word about an image counts."""

    def __init__(self) -> None:
        super().__init__("public, owner:ID or all")

    def __call__(self, value: str) -> str:
        return parse_trust(value)


class PolicyType(_TextType):
    """The name of an entry point."""

    def __init__(self) -> None:
        super().__init__("name of a policy")

    def __call__(self, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", value, re.IGNORECASE | re.ASCII):
            raise ValueError(f"{value!r} is no name of a policy: letters, digits, _ and -")
        return value


@dataclass(frozen=True, slots=True)
class PolicyOption:
    """One option of a policy that somebody else wrote."""

    policy: str
    name: str
    value: str


class PolicyOptionType(_TextType):
    def __init__(self) -> None:
        super().__init__("POLICY.NAME = VALUE")

    def __call__(self, value: str) -> PolicyOption:
        match = re.fullmatch(r"\s*([\w-]+)\.([\w-]+)\s*=(.*)", value, re.ASCII | re.DOTALL)
        if match is None:
            raise ValueError(f"{value!r} is no option of a policy: write POLICY.NAME = VALUE")
        return PolicyOption(match[1], match[2], match[3].strip())


class RegexType(_TextType):
    def __init__(self) -> None:
        super().__init__("regular expression")

    def __call__(self, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value
