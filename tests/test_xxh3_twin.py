"""The twins are what they claim to be, by the real library."""

from __future__ import annotations

import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.xxh3_twin import (
    BLOCK_SIZE_MIN_BYTES,
    PAYLOAD_SIZE_MAX_BYTES,
    ROUND_SIZE_BYTES,
    factors,
    lane_sums,
    twin,
)

PAGE = 4096
SIZES = [BLOCK_SIZE_MIN_BYTES, PAGE, PAGE + 1, 16 << 10, 64 << 10, 256 << 10, 1 << 20]


def same_digests(one: bytes, other: bytes) -> bool:
    one_128, other_128 = xxhash.xxh3_128_digest(one), xxhash.xxh3_128_digest(other)
    return one_128 == other_128 and xxhash.xxh3_64_digest(one) == xxhash.xxh3_64_digest(other)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_a_twin_differs_and_has_equal_digests(size: int, seed: int) -> None:
    block = random.Random(seed).randbytes(size)
    forged = twin(block)
    assert len(forged) == size
    assert forged != block
    assert same_digests(forged, block)


@pytest.mark.parametrize("block", [bytes(PAGE), b"\xff" * PAGE, bytes(range(256)) * 16])
def test_a_plain_block_has_a_twin_too(block: bytes) -> None:
    forged = twin(block)
    assert forged != block
    assert same_digests(forged, block)


@given(seed=st.integers(0, 2**32), payload=st.binary(max_size=1000))
def test_the_twin_begins_with_the_payload(seed: int, payload: bytes) -> None:
    block = random.Random(seed).randbytes(PAGE)
    forged = twin(block, payload=payload)
    assert forged != block
    assert same_digests(forged, block)
    assert forged.startswith(payload[:PAYLOAD_SIZE_MAX_BYTES])


def test_only_the_first_page_differs_and_its_own_digests_do_not() -> None:
    block = random.Random(5).randbytes(64 << 10)
    forged = twin(block, payload=b"#!/bin/sh\n")
    assert forged[ROUND_SIZE_BYTES:] == block[ROUND_SIZE_BYTES:]
    assert same_digests(forged[:PAGE], block[:PAGE]), "page hashes decide where chunks are cut"


def test_the_twin_of_a_twin_is_not_the_twin() -> None:
    block = random.Random(6).randbytes(PAGE)
    forged = twin(block, payload=b"again")
    again = twin(forged, payload=b"again")
    assert len({block, forged, again}) == 3
    assert same_digests(again, block)


def test_a_payload_equal_to_the_target_still_makes_a_twin() -> None:
    block = random.Random(7).randbytes(PAGE)
    forged = twin(block, payload=block)
    assert forged != block
    assert same_digests(forged, block)


def test_blocks_without_a_whole_round_before_the_last_stripe_are_refused() -> None:
    with pytest.raises(ValueError, match="1087 bytes"):
        twin(bytes(BLOCK_SIZE_MIN_BYTES - 1))


def test_a_seed_takes_the_twin_away() -> None:
    # The construction knows the secret, and a seed changes it. (That does not make a seed a defence.)
    block = random.Random(8).randbytes(PAGE)
    assert xxhash.xxh3_128_digest(twin(block), seed=1) != xxhash.xxh3_128_digest(block, seed=1)


def test_the_sums_are_all_that_a_round_leaves() -> None:
    block = random.Random(9).randbytes(PAGE)
    assert lane_sums(twin(block)[:ROUND_SIZE_BYTES]) == lane_sums(block[:ROUND_SIZE_BYTES])


TOP = 2**64


@given(st.integers(0, TOP - 1) | st.integers(TOP - 2**33, TOP - 1) | st.integers(0, 2**33))
def test_every_product_has_its_factors(product: int) -> None:
    check_factors(product)


@pytest.mark.parametrize("product", [0, 1, TOP - 1, TOP - 2, TOP - 3, TOP - 2**32, TOP - 2**32 - 1])
def test_products_at_the_edges_have_their_factors(product: int) -> None:
    check_factors(product)


def check_factors(product: int) -> None:
    (a, b), (c, d) = factors(product)
    assert a * b + c * d == product
    assert max(a, b, c, d) < 2**32
    assert min(a, b, c, d) >= 0
