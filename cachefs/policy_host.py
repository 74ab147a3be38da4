"""Asking a policy that anybody may have written. Rule: whatever a plug-in does, its decisions come back, or the
words for what went wrong; nothing else of it reaches the loop.

A policy is loaded and asked in a thread, within a time. A thread cannot be ended: one that is late is left behind,
and its policy is not asked again before it has come back. It still is code in this process: one that keeps
Python's lock for itself (a regular expression that does not end) holds up everything. Install what you trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from uuid import UUID

import trio
from stevedore.named import NamedExtensionManager

from cachefs.policies import NAMESPACE, Decision, Keep, Node, Policy

LIMIT_S = 30.0
DECISIONS_MAX = 10_000
IMAGE_CHARS_MAX, REASON_CHARS_MAX = 255, 200


class PolicyFailed(Exception):
    """What went wrong, in words."""


class PolicyHost:
    """One policy of the configuration, with its options."""

    def __init__(self, name: str, options: Mapping[str, str], limit_s: float = LIMIT_S) -> None:
        self.name = name
        self._options, self._limit_s = dict(options), limit_s
        self._policy: Policy | None = None
        self._one_thread = trio.CapacityLimiter(1)  # Given back when the thread is, however late.

    async def ask(self, node: Node) -> tuple[Decision, ...]:
        """What it decides. Raises PolicyFailed."""
        if self._one_thread.borrowed_tokens:
            raise PolicyFailed("it has not come back from an earlier time that it was asked")
        with trio.move_on_after(self._limit_s):
            outcome = await trio.to_thread.run_sync(
                self._work, node, limiter=self._one_thread, abandon_on_cancel=True
            )
            if isinstance(outcome, str):
                raise PolicyFailed(outcome)
            return outcome
        raise PolicyFailed(f"no answer within {self._limit_s:g} s")

    def _work(self, node: Node) -> tuple[Decision, ...] | str:
        """In a thread. A text is what went wrong."""
        try:
            if self._policy is None:
                self._policy = _load(self.name, self._options)
            return _checked(self._policy.decide(node))
        except BaseException as error:  # noqa: BLE001  # SystemExit, too: it is no reason to end this process.
            return printable(f"{type(error).__name__}: {error}", REASON_CHARS_MAX)


def _load(name: str, options: Mapping[str, str]) -> Policy:
    def failed(manager: object, point: object, error: BaseException) -> None:
        raise error

    def missing(names: object) -> None:
        raise LookupError(f"nothing that is installed has an entry point {name} in {NAMESPACE}")

    found: NamedExtensionManager[Policy] = NamedExtensionManager(
        NAMESPACE,
        [name],
        invoke_on_load=True,
        invoke_args=(options,),
        on_load_failure_callback=failed,
        on_missing_entrypoints_callback=missing,
    )
    if len(found.extensions) != 1:
        raise LookupError(f"{len(found.extensions)} entry points in {NAMESPACE} have the name {name}")
    policy = found.extensions[0].obj
    if not callable(getattr(policy, "decide", None)):
        raise TypeError(f"it makes {policy!r:.100}, which is no Policy: it cannot decide")
    assert policy is not None
    return policy


def _checked(answer: Iterable[Decision]) -> tuple[Decision, ...]:
    """The answer, if it is one: bounded, and of values that are what they are said to be."""
    decisions = tuple(_decision(said) for said in islice(iter(answer), DECISIONS_MAX + 1))
    if len(decisions) > DECISIONS_MAX:
        raise ValueError(f"it answered with more than {DECISIONS_MAX} decisions")
    return decisions


def _decision(said: object) -> Decision:
    if not isinstance(said, Decision):
        raise TypeError(f"it answered with {said!r:.100}, which is no Decision")
    if not isinstance(said.image, str) or not isinstance(said.reason, str) or not isinstance(said.keep, Keep):
        raise TypeError(f"it answered with {said!r:.100}, whose fields are of other types than they must be")
    try:
        image = str(UUID(said.image))
    except ValueError:
        image = printable(said.image, IMAGE_CHARS_MAX)
    return Decision(image, said.keep, printable(said.reason, REASON_CHARS_MAX), bool(said.owners_word))


def printable(text: str, chars_max: int) -> str:
    """`text` on one line, with nothing in it that a log or a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text[:chars_max])
