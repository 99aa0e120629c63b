"""The states of a tracker, the events allowed in each, and where they lead.

*Spec*: spec/lifecycle.md, "States".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from qcow2bm.errors import StateError

State = Literal["tracking", "migrating", "inactive", "stopped", "abandoned", "failed", "forked"]
Event = Literal[
    "mark",
    "flush",
    "edit",
    "begin_migration",
    "cancel_migration",
    "inactivate",
    "activate",
    "stop",
    "abandon",
    "fail",
    "fork",
]

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    "tracking": {
        "mark": "tracking",
        "flush": "tracking",
        "edit": "tracking",
        "begin_migration": "migrating",
        "inactivate": "inactive",
        "stop": "stopped",
        "abandon": "abandoned",
        "fail": "failed",
        "fork": "forked",
    },
    "migrating": {
        "mark": "migrating",
        "flush": "migrating",
        "cancel_migration": "tracking",
        "inactivate": "inactive",
        "stop": "stopped",
        "abandon": "abandoned",
        "fail": "failed",
        "fork": "forked",
    },
    "inactive": {
        "activate": "tracking",
        "abandon": "abandoned",
        "fail": "failed",
        "fork": "forked",
    },
    "stopped": {"abandon": "stopped", "fork": "stopped"},
    "abandoned": {"abandon": "abandoned", "fork": "abandoned"},
    "failed": {"abandon": "failed", "fork": "failed"},
    "forked": {"abandon": "forked", "fork": "forked"},
}
"""By state the events that are allowed in it, and the state that each leads to if it succeeds.

`flush` stands for everything that stores what is pending or looks at it, `edit` for everything
that changes the set of bitmaps. `fail` is a write or a barrier that failed. `fork` concerns only
the copy of the tracker in a forked process.
"""


def after(state: State, event: Event) -> State:
    """The state that an event leads to.

    Raises:
        StateError: the event is not allowed in this state.
    """
    if event not in TRANSITIONS[state]:
        allowed = " or ".join(other for other, events in TRANSITIONS.items() if event in events)
        raise StateError(state, allowed, "the tracker")
    return TRANSITIONS[state][event]


def has_ended(state: State) -> bool:
    """Whether tracking has ended: nothing can fail any more."""
    return "fail" not in TRANSITIONS[state]
