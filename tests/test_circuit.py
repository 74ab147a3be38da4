"""When an endpoint is asked, when it is left alone, and how load comes back to it: facts of a pure machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachefs.sources.circuit import FAILURES_MAX, PAUSE_FIRST_S, PAUSE_MAX_S, Circuit, State, Width
from tests.stores import examples


def failed(circuit: Circuit, times: int, now_s: float = 0.0, subject: str | None = None) -> bool:
    found = [circuit.failed(circuit.ticket, now_s, "why", subject) for _ in range(times)]
    return True in found


def opened(chance: float = 1.0) -> Circuit:
    circuit = Circuit(lambda: chance)
    assert failed(circuit, FAILURES_MAX)
    return circuit


def test_it_opens_after_several_failures_in_a_row() -> None:
    circuit = Circuit(lambda: 0.5)
    for _ in range(5):
        assert not failed(circuit, FAILURES_MAX - 1)
        assert circuit.may_ask
        circuit.succeeded(circuit.ticket)
    assert failed(circuit, FAILURES_MAX)
    assert (circuit.state, circuit.may_ask) == (State.OPEN, False)


def test_one_subject_alone_does_not_open_it_and_two_do() -> None:
    circuit = Circuit(lambda: 0.5)
    assert not failed(circuit, 100, subject="an image")
    assert circuit.may_ask
    assert circuit.suspected
    assert failed(circuit, 1, subject="another")


def test_a_failure_that_is_nobodys_but_its_own_opens_it_among_those_of_one_subject() -> None:
    circuit = Circuit(lambda: 0.5)
    failed(circuit, FAILURES_MAX - 1, subject="an image")
    assert failed(circuit, 1)


def test_a_probe_tells_an_images_trouble_from_the_endpoints() -> None:
    circuit = Circuit(lambda: 0.5)
    failed(circuit, FAILURES_MAX, subject="an image")
    circuit.suspicion_was_wrong(circuit.ticket)
    assert not circuit.suspected
    failed(circuit, FAILURES_MAX, subject="an image")
    assert circuit.suspicion_was_right(circuit.ticket, 0.0, "away")
    assert circuit.state is State.OPEN


def test_pauses_double_up_to_their_bound_and_no_probe_makes_them_shorter() -> None:
    circuit = opened()
    pauses = [circuit.probe_at_s]
    now_s = 0.0
    for _ in range(8):
        now_s = circuit.probe_at_s
        circuit.probe()
        circuit.probe_failed(now_s, "still")
        pauses.append(circuit.probe_at_s - now_s)
    assert pauses[:4] == [PAUSE_FIRST_S, 2 * PAUSE_FIRST_S, 4 * PAUSE_FIRST_S, 8 * PAUSE_FIRST_S]
    assert max(pauses) == PAUSE_MAX_S
    assert circuit.since_s == 0.0, "since it opened first"
    # It answers probes and nothing else.
    circuit.probe()
    circuit.probe_succeeded()
    assert failed(circuit, FAILURES_MAX, now_s)
    assert circuit.probe_at_s - now_s == PAUSE_MAX_S
    # Then it is well.
    circuit.probe()
    circuit.probe_succeeded()
    circuit.succeeded(circuit.ticket)
    failed(circuit, FAILURES_MAX, now_s)
    assert circuit.probe_at_s - now_s == PAUSE_FIRST_S


def test_pauses_are_jittered_over_half_their_length_and_not_below_what_was_asked_for() -> None:
    assert opened(0.0).probe_at_s == PAUSE_FIRST_S / 2
    circuit = Circuit(lambda: 0.0)
    failed(circuit, FAILURES_MAX - 1)
    circuit.failed(circuit.ticket, 100.0, "Retry-After", None, 30.0)
    assert circuit.probe_at_s == 130.0


def test_one_probe_at_a_time_and_its_answer_closes() -> None:
    circuit = opened()
    circuit.probe()
    assert (circuit.state, circuit.may_ask) == (State.HALF_OPEN, False)
    circuit.probe_told_nothing(50.0)
    assert circuit.state is State.OPEN
    assert 50.0 < circuit.probe_at_s <= 50.0 + PAUSE_MAX_S
    circuit.probe()
    circuit.probe_succeeded()
    assert (circuit.state, circuit.failures, circuit.since_s) == (State.CLOSED, 0, None)


def test_what_was_asked_before_a_change_says_nothing_after_it() -> None:
    circuit = Circuit(lambda: 0.5)
    old = circuit.ticket
    failed(circuit, FAILURES_MAX)
    circuit.succeeded(old)
    assert circuit.state is State.OPEN
    circuit.probe()
    circuit.probe_succeeded()
    for _ in range(10):  # Eight requests that were under way run into their time-outs.
        assert not circuit.failed(old, 0.0, "late")
    assert circuit.may_ask


@given(
    st.lists(
        st.sampled_from(["fail", "fail a", "fail b", "succeed", "probe", "probe ok", "probe bad", "late"]),
        max_size=60,
    )
)
@examples(200)
def test_whatever_comes_it_is_in_one_state_and_asked_in_one(events: list[str]) -> None:
    circuit, now_s, old = Circuit(lambda: 0.5), 0.0, 0
    for event in events:
        now_s += 0.1
        was, is_old = circuit.state, old != circuit.ticket
        match event:
            case "fail" | "fail a" | "fail b":
                failed(circuit, 1, now_s, event.removeprefix("fail").strip() or None)
            case "succeed":
                circuit.succeeded(circuit.ticket)
            case "late":
                circuit.failed(old, now_s, "late")
                circuit.succeeded(old)
            case "probe" if was is State.OPEN:
                old = circuit.ticket
                circuit.probe()
            case "probe ok" if was is State.HALF_OPEN:
                circuit.probe_succeeded()
            case "probe bad" if was is State.HALF_OPEN:
                circuit.probe_failed(now_s, "still")
        assert circuit.may_ask == (circuit.state is State.CLOSED) == (circuit.since_s is None)
        if circuit.state is State.OPEN:
            assert circuit.probe_at_s <= now_s + PAUSE_MAX_S
        if event == "late" and is_old:
            assert circuit.state is was
        # Only a probe takes it out of what it opened into.
        if was is not State.CLOSED and circuit.state is State.CLOSED:
            assert event == "probe ok"


def test_the_width_grows_with_each_answer_after_its_hold() -> None:
    width = Width(4)
    assert width.now == 4
    assert not width.answered(0.0)
    width.begin_anew(10.0, 2.0)
    widths = []
    for now_s in (10.0, 11.0, 12.0, 12.1, 12.2, 12.3):
        width.answered(now_s)
        widths.append(width.now)
    assert widths == [1, 1, 2, 3, 4, 4]
