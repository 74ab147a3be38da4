"""Forges a second block with a given block's xxh3_128. Rule: no search; each lane is solved for.

XXH3 was never meant to resist this, so whatever shares blocks by that hash must compare their bytes, and
these twins are what the tests try it with. How it goes, on the path for inputs above 240 bytes:

A round takes 1,024 bytes as 16 stripes of 8 words. For word `d` in lane `i`, with the public secret word
`s` and `v = d ^ s`, it adds `d` to accumulator `i ^ 1` and `low32(v) * high32(v)` to accumulator `i`. Nothing
mixes before the round ends. So a lane may hold any 16 words whose plain sum and whose sum of products, both
modulo 2**64, are the target's. Twelve of them are chosen freely, and four restore the sums:

    two words whose products make up the missing product (`factors`),
    `v = (any, 0)` and `v = (0, any)`: no product, and 32 free bits each for the missing plain sum.

The last 64 bytes are a stripe of their own, which must lie outside that round. Every longer prefix has its
target's digests too, the first 4 KiB page for one, so whoever cuts chunks by the hash of pages cuts alike.
"""

from __future__ import annotations

import struct

ROUND_SIZE_BYTES = 1024
BLOCK_SIZE_MIN_BYTES = ROUND_SIZE_BYTES + 64  # A whole round, and the last stripe clear of it.
PAYLOAD_SIZE_MAX_BYTES = 768  # Twelve stripes of the sixteen.

_LANES = 8
_STRIPES = 16
_CHOSEN = PAYLOAD_SIZE_MAX_BYTES // (8 * _LANES)
_M32 = 2**32 - 1
_M64 = 2**64 - 1

# The first 184 bytes of the default secret (xxhash_spec.md): stripe n, lane i meets word n + i.
_SECRET = struct.unpack(
    "<23Q",
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428"
    ),
)


def twin(block: bytes, *, payload: bytes = b"") -> bytes:
    """Another block of the same length, xxh3_128 and xxh3_64; they differ only within the first 1,024 bytes.

    As much of `payload` as fits (768 bytes) is what the twin begins with.
    """
    if len(block) < BLOCK_SIZE_MIN_BYTES:
        raise ValueError(f"{len(block)} bytes are fewer than {BLOCK_SIZE_MIN_BYTES}")
    # What the payload leaves free is the target's complement, so that no byte there is equal.
    head = payload[:PAYLOAD_SIZE_MAX_BYTES]
    head += bytes(byte ^ 0xFF for byte in block[len(head) : PAYLOAD_SIZE_MAX_BYTES])
    for swap in (False, True):  # A twin's twin with the same payload would be itself: take the other one.
        forged = _restore(block[:ROUND_SIZE_BYTES], head, swap) + block[ROUND_SIZE_BYTES:]
        if forged != block:
            return forged
    raise AssertionError("two different answers cannot both be the target")


def lane_sums(first_round: bytes) -> list[tuple[int, int]]:
    """Per lane, what one round adds to the two accumulators: the plain sum and the sum of products."""
    return [_sums(lane, _column(first_round, lane)) for lane in range(_LANES)]


def _restore(target: bytes, head: bytes, swap: bool) -> bytes:
    """`head`, and the four stripes after it that give the round the target's sums."""
    lanes = []
    for lane, (plain, product) in enumerate(lane_sums(target)):
        chosen = _column(head, lane)
        chosen_plain, chosen_product = _sums(lane, chosen)
        wanted = (plain - chosen_plain) & _M64, (product - chosen_product) & _M64
        lanes.append([*chosen, *_four_words(lane, *wanted, swap)])
    return struct.pack(f"<{_STRIPES * _LANES}Q", *(words[n] for n in range(_STRIPES) for words in lanes))


def _four_words(lane: int, plain: int, product: int, swap: bool) -> list[int]:
    """Words for the lane's last four stripes, with these two sums."""
    secrets = [_SECRET[n + lane] for n in range(_CHOSEN, _STRIPES)]
    words = []
    for (high, low), secret in zip(factors(product), secrets, strict=False):
        words.append(((low << 32 | high) if swap else (high << 32 | low)) ^ secret)
    # The third is (x, its secret's low half), the fourth (its secret's high half, y): no product, and x and y
    # are free.
    third, fourth = secrets[2] & _M32, secrets[3] & ~_M32
    rest = plain - sum(words) - third - fourth
    return [*words, third + (rest & ~_M32 & _M64), fourth + (rest & _M32)]


def factors(product: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two pairs of 32-bit factors: a*b + c*d is `product`, any 64-bit number."""
    high, rest = divmod(product, _M32)
    if high <= _M32:
        return (_M32, high), (1, rest)
    # The top 2**32 numbers are 2**64 - 1 - below. m*(m+2-below) + below*(m-1), where m = 2**32-1, is that.
    match below := _M64 - product:
        case 0:
            return (_M32, _M32), (2, _M32)
        case 1:
            return (_M32, _M32 - 1), (4, (3 << 30) - 1)
        case _:
            return (_M32, _M32 + 2 - below), (below, _M32 - 1)


def _column(stripes: bytes, lane: int) -> tuple[int, ...]:
    return struct.unpack(f"<{len(stripes) // 8}Q", stripes)[lane::_LANES]


def _sums(lane: int, words: tuple[int, ...]) -> tuple[int, int]:
    mixed = [word ^ _SECRET[n + lane] for n, word in enumerate(words)]
    return sum(words) & _M64, sum((v & _M32) * (v >> 32) for v in mixed) & _M64
