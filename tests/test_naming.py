"""Which image somebody means who names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pytest
import trio

from cachefs.errors import AmbiguousImage, NoEntry
from cachefs.naming import OFFERED_MAX, Naming, meant, offered

A: Final = "21dced0f-d203-4786-9b93-710d2b98aae0"
B: Final = "21dce000-0000-4000-8000-00000000beef"
C: Final = "beef0000-0000-4000-8000-000000000001"


@dataclass(frozen=True)
class Known:
    id: str
    name: str | None


IMAGES: Final = [Known(A, "debian 13"), Known(B, "twice"), Known(C, "twice"), Known(str(C[:-1] + "2"), None)]


@pytest.mark.parametrize(
    ("text", "id_"),
    [
        (A, A), (A.upper(), A), (A.replace("-", ""), A), ("21dced", A), ("21DCED0F-D2", A), ("21dced0fd2", A),
        ("debian 13", A), ("21dce0", B), ("beef0000-0000-4000-8000-000000000001", C),
        ("ffffffff-ffff-4fff-8fff-ffffffffffff", "ffffffff-ffff-4fff-8fff-ffffffffffff"),
    ],
)  # fmt: skip
def test_an_id_its_beginning_or_a_name_means_one_image(text: str, id_: str) -> None:
    assert meant(text, IMAGES) == id_


@pytest.mark.parametrize("text", ["", "21d", "debian", "Debian 13", "abcd", "----", "21dced0f/../x", "dced0f"])
def test_what_is_less_means_nothing(text: str) -> None:
    with pytest.raises(NoEntry, match="is no image id, nor the first 4 or more digits of one"):
        meant(text, IMAGES)


def test_where_no_list_was_ever_had_only_a_whole_id_is_one() -> None:
    assert meant(A, []) == A
    with pytest.raises(NoEntry, match="'21dced': no image is known here yet, so only a whole id says which one"):
        meant("21dced", [])


def test_what_may_be_several_is_said_with_all_of_them() -> None:
    with pytest.raises(AmbiguousImage) as raised:
        meant("21dce", IMAGES)
    assert str(raised.value) == f"21dce may be any of 2 images: {A} (debian 13), {B} (twice); name one by its id"
    with pytest.raises(AmbiguousImage, match="twice may be any of 2 images"):
        meant("twice", IMAGES)
    with pytest.raises(AmbiguousImage, match="any of 3 images"):  # A name, and the beginning of two ids.
        meant("beef", [*IMAGES, Known(A, "beef")])
    many = [Known(f"aaaa{n:04x}-0000-4000-8000-000000000000", None) for n in range(100)]
    with pytest.raises(AmbiguousImage, match=r"any of 100 images: .* and 95 more; name one by its id$"):
        meant("aaaa", many)


def test_a_shell_is_offered_plain_names_and_ids_that_were_begun() -> None:
    evil = [
        Known(str(B[:-1] + at), name) for at, name in (("1", "x$(id)"), ("2", "a:b"), ("3", "-rf"), ("4", "e\nf"))
    ]
    images = [*IMAGES, *evil]
    assert offered("", images) == sorted(["debian 13", *(image.id for image in images[1:])]), "all of them, once"
    assert offered("deb", images) == ["debian 13"]
    assert offered("21dced", images) == [A]
    assert offered("twice", images) == [], "which of the two?"
    assert offered("x", images) == offered("-", images) == []
    many = [Known(A, f"n{at}") for at in range(2 * OFFERED_MAX)]
    assert len(offered("n", many)) == OFFERED_MAX


def test_glance_is_asked_for_what_nobody_knows_yet() -> None:
    known: list[Known] = []
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        known[:] = IMAGES

    naming = Naming(lambda: known, ask)
    assert trio.run(naming.id_of, "21dced") == A
    assert trio.run(naming.id_of, "debian 13") == A
    assert asked == 1
    with pytest.raises(NoEntry):
        trio.run(naming.id_of, "nothing")
    assert asked == 2
