"""The state of a tracker, and the facts that belong to that state alone.

*Spec*: spec/lifecycle.md, "States".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap
from qcow2bm.migration.evidence import Departure
from qcow2bm.migration.lifecycle import Event, State, after
from qcow2bm.migration.sentinel import Sentinel
from qcow2bm.storage.file_identity import FilePath
from qcow2bm.tracker.reports import Activation


class Migration(NamedTuple):
    """The facts that hold for one migration, until it is cancelled or the image is taken back.

    Attributes:
        carried: the names of the bitmaps that the migration carries, which are not stored here.
        sentinel: what will tell of writes elsewhere; None if there is none.
        sentinel_bitmap: the bitmap of the sentinel, which is in_use by us until `inactivate`.
        departure: the image as it was given away; None before that.
        data_file: the path of the external data file, if the caller gave it.
        change_token: the storage's change token when the image was given away; None where the
            storage has none.
        next_token: the generation token that this tracker writes when it takes the image back. A
            second attempt writes the same, so that the tracker recognizes its own.
    """

    carried: frozenset[str]
    sentinel: Sentinel | None = None
    sentinel_bitmap: TrackedBitmap | None = None
    departure: Departure | None = None
    data_file: FilePath | None = None
    change_token: object = None
    next_token: bytes = b""


class Phase(NamedTuple):
    """The state of a tracker with its data: one value, so that an interrupt never splits it.

    Attributes:
        state: see `qcow2bm.migration.lifecycle.TRANSITIONS`.
        migration: in the states "migrating" and "inactive"; None in all others.
        activation: the last one, until the image is given away again.
        cause: what made the state "failed".
    """

    state: State = "tracking"
    migration: Migration | None = None
    activation: Activation | None = None
    cause: BaseException | None = None

    def after(
        self,
        event: Event,
        *,
        migration: Migration | None = None,
        activation: Activation | None = None,
        cause: BaseException | None = None,
    ) -> Phase:
        """The phase that an event leads to, with the data that it comes with.

        Raises:
            StateError: the event is not allowed in this state.
        """
        if event != "inactivate":
            activation = activation or self.activation
        return Phase(after(self.state, event), migration, activation, cause)
