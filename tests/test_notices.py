"""What the kernel is told, and that it is told nothing after the end."""

from __future__ import annotations

import threading
import time

from cachefs.notices import CLOSE_WAIT_S, Notices


def test_notices_are_told_in_order_whatever_one_of_them_meets() -> None:
    told: list[int] = []
    done = threading.Event()

    def unknown() -> None:
        raise FileNotFoundError

    notices = Notices()
    for number in range(3):
        notices.put(lambda number=number: told.append(number))  # type: ignore[misc]
        notices.put(unknown)
    notices.put(done.set)
    assert done.wait(10)
    assert told == [0, 1, 2]
    notices.close()


def test_nothing_is_told_after_the_end() -> None:
    told: list[int] = []
    begun, release = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        release.wait(10)
        told.append(1)

    notices = Notices()
    notices.put(slow)
    notices.put(lambda: told.append(2))
    assert begun.wait(10)
    threading.Timer(CLOSE_WAIT_S / 4, release.set).start()
    notices.close()  # Waits for the one under way.
    assert told == [1]
    notices.put(lambda: told.append(3))
    assert notices._thread is not None
    notices._thread.join(10)
    assert told == [1]


def test_the_end_does_not_wait_for_one_that_waits_for_it() -> None:
    begun, release = threading.Event(), threading.Event()

    def waits() -> None:
        begun.set()
        release.wait(10)

    notices = Notices()
    notices.put(waits)
    assert begun.wait(10)
    began_s = time.monotonic()
    notices.close()
    assert CLOSE_WAIT_S <= time.monotonic() - began_s < 10 * CLOSE_WAIT_S
    release.set()
