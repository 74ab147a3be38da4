"""Whose piece is next, and for whom there is no room: values to values."""

from __future__ import annotations

from cachefs.plan.hydration import Candidate, Claim, first, without_room

CRITICAL, NORMAL, LOW = 0, 1, 2


def test_the_one_opened_last_is_next_among_equals() -> None:
    candidates = [Candidate(1, NORMAL, 5.0), Candidate(2, NORMAL, 9.0), Candidate(3, NORMAL, 7.0)]
    assert first(candidates) == candidates[1]
    assert first([]) is None


def test_important_ones_come_before_those_opened_later() -> None:
    candidates = [Candidate(1, LOW, 9.0), Candidate(2, CRITICAL, 1.0), Candidate(3, NORMAL, 5.0)]
    assert first(candidates) == candidates[1]
    assert first([candidates[0], candidates[2]]) == candidates[2]


def test_boot_sets_come_before_everything_and_what_has_no_room_last() -> None:
    boots = Candidate(1, LOW, 0.0, boots=True)
    big = Candidate(2, CRITICAL, 9.0, fits=False)
    plain = Candidate(3, LOW, 1.0)
    assert first([big, plain, boots]) == boots
    assert first([big, plain]) == plain
    assert first([big]) == big, "it is tried all the same"


def claim(number: int, cached: int, missing: int, priority: int = NORMAL, since_s: float = 0.0) -> Claim:
    return Claim(number, f"image {number}", cached, missing, priority, since_s)


def test_what_fits_together_is_no_risk() -> None:
    assert without_room([claim(1, 50, 0), claim(2, 10, 30), claim(3, 0, 10)], 100, 1.0) == {}


def test_what_is_larger_than_the_store_is_named_so() -> None:
    found = without_room([claim(1, 0, 101), claim(2, 0, 10)], 100, 1.0)
    assert list(found) == [1]
    assert "more than the store may hold" in found[1]


def test_of_what_does_not_fit_together_the_first_to_come_has_the_room() -> None:
    claims = [claim(1, 0, 60, since_s=1.0), claim(2, 0, 60, since_s=2.0), claim(3, 0, 30, since_s=0.0)]
    found = without_room(claims, 100, 1.0)
    assert list(found) == [1], "the last opened fits, and the small one beside it"
    assert "beside what else is leased" in found[1]
    critical = without_room([claims[0]._replace(priority=CRITICAL), *claims[1:]], 100, 1.0)
    assert list(critical) == [2]


def test_what_is_whole_takes_what_it_takes_on_the_disk() -> None:
    whole = claim(1, 1000, 0)
    assert without_room([whole, claim(2, 0, 50)], 100, 1.0).keys() == {2}
    assert without_room([whole, claim(2, 0, 50)], 100, 0.01) == {}, "it is sparse, or shared"
