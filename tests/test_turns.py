"""Work that leaves room for reads: it comes to its end in steps, and threads change as before afterwards."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from time import perf_counter

import pytest
import trio

from cachefs.store import turns


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


def _steps(count: int, each_s: float = turns.STEP_S / 2) -> Generator[None, None, int]:
    for _ in range(count):
        until_s = perf_counter() + each_s
        while perf_counter() < until_s:
            pass
        yield
    return count


def test_others_run_between_steps() -> None:
    ticks: list[int] = []
    done = trio.Event()

    async def other() -> None:
        while not done.is_set():
            ticks.append(1)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await turns.OnLoop().run(_steps(100)) == 100
            done.set()

    trio.run(main)
    assert len(ticks) >= 30, "after every second or third step"


def test_a_request_meets_one_step_and_not_one_in_each_of_its_passes() -> None:
    passes: list[int] = []
    done = trio.Event()

    async def request() -> None:
        while not done.is_set():
            began = len(steps_done)
            for _ in range(turns.PASSES):
                await trio.lowlevel.checkpoint()
            passes.append(len(steps_done) - began)

    steps_done: list[int] = []

    def steps() -> Generator[None, None, None]:
        for _ in _steps(50, 2 * turns.STEP_S):
            steps_done.append(1)
            yield

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(request)
            await turns.OnLoop().run(steps())
            done.set()

    trio.run(main)
    assert max(passes) == 1


def test_a_thread_pauses_while_others_are_in_a_hurry_and_else_never(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(turns, "sleep", pauses.append)

    def work(bits: int) -> int:
        before, some = len(pauses), turns.Pauses(4)
        for _ in range(bits):
            some.may_come()
        return len(pauses) - before

    assert work(100) == 0
    with turns.changing_often():
        assert [work(bits) for bits in (3, 4, 9)] == [0, 1, 2]
    assert work(100) == 0


def test_cancelling_waits_for_the_end() -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await turns.OnLoop().run(_steps(20)) == 20

    trio.run(main)


def test_what_a_step_raises_is_raised() -> None:
    def steps() -> Generator[None, None, None]:
        yield
        raise KeyError("a step")

    with pytest.raises(KeyError, match="a step"):
        trio.run(turns.OnLoop().run, steps())


def test_threads_change_often_until_the_last_who_wants_it() -> None:
    sys.setswitchinterval(0.003)
    with turns.changing_often(wanted=False):
        assert sys.getswitchinterval() == pytest.approx(0.003)
    with turns.changing_often():
        with pytest.raises(KeyError), turns.changing_often():
            raise KeyError
        assert sys.getswitchinterval() == pytest.approx(turns.SWITCH_INTERVAL_S)
    assert sys.getswitchinterval() == pytest.approx(0.003)
