"""When a volume may be taken from the nodes that hold it: the decision behind every preemption.

A lost node may still write. What stops it is the storage: an attachment that preempts the reservation cuts the I/O of
all who held it. Whether a node is lost the storage cannot tell, its client's silence may be a broken cable; somebody
else must have decided it. By default that is the orchestrator: it asks for ControllerUnpublish on the lost node
(because the pod is gone and the node is tainted out-of-service, or its time is over), which leaves a desired that the
volume be detached there. That desired, on a client that is down, is the leave to preempt it.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from csi_driver.controller.holding import others
from csi_driver.controller.locate import Located
from csi_driver.controller.record import read_attachments
from csi_driver.controller.requests import Fencing
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed
from csi_driver.storage_model import Client, ClientStatus, ReservationMode, Volume

_log = logging.getLogger(__name__)


class TakeOver:
    """Judges those who hold a volume. Every judgement is of one version of the reservation, which is passed on to the
    storage: it refuses whoever judged an older one, so that of two controllers at once one wins."""

    def __init__(self, fencing: Fencing) -> None:
        self._fencing = fencing

    def judge(self, located: Located, client: Client, *, deadline: Deadline) -> int:
        """Return the version of the reservation for which the volume may be taken to `client`.

        `located` must have been read before this is called: whoever comes to hold the volume later raises the version.
        Raises `PreconditionFailed` naming who holds it and why they keep it, `OperationPending` when nobody does.
        """
        volume = located.volume
        holders = others(located, client, deadline=deadline)
        owner = self._owner(located, client, holders, deadline=deadline)
        kept = {holder.id: reason for holder in holders if (reason := self._reason_to_keep(volume, holder, owner))}
        if kept:
            raise _held_elsewhere(volume, holders, kept)
        if not holders and self._fencing is Fencing.NEVER:
            raise OperationPending(f"volume {volume.name} was released just now; retry")
        if self._fencing is Fencing.RECORDED:
            self._refuse_contradiction(located, {client.id, *(holder.id for holder in holders)}, deadline=deadline)
        return volume.reservation.version

    def _refuse_contradiction(self, located: Located, judged: set[str], *, deadline: Deadline) -> None:
        """Raise `OperationPending` where the volume's document names one who has it and whom nobody has judged.

        The clients' documents may come from a server that has not yet heard of an attachment. Of a client that is down
        such an answer is new enough, or it would not say so; one that is gone has nothing any more.
        """
        volume = located.volume
        for name in volume.reservation.attached:
            if name in judged:
                continue
            unseen = located.management.client(name, deadline=deadline)
            if unseen is not None and unseen.status is not ClientStatus.DOWN:
                raise OperationPending(
                    f"volume {volume.name} is attached to {name} by its own document and not by that client's; "
                    "retry (if this persists, attach it there and detach it again in the management)"
                )

    def confirm(self, located: Located, client: Client, version: int, *, deadline: Deadline) -> None:
        """Judge again right before the volume is taken. Raises as `judge` does, and `OperationPending` when the
        reservation has another version by now."""
        volume = located.volume
        present = located.management.volume(volume.name, deadline=deadline)
        if present is None or present.uuid != volume.uuid or present.reservation.version != version:
            raise OperationPending(f"volume {volume.name} was attached or detached concurrently; retry")
        self.judge(replace(located, volume=present), client, deadline=deadline)
        holder = present.reservation.reserved_by or "nobody"
        _log.warning(
            "taking volume %s, uuid %s, version %d, from %s to %s: %s",
            *(present.name, present.uuid, version, holder, client.id, _LEAVES[self._fencing]),
        )

    def refusal(self, located: Located, client: Client, *, deadline: Deadline) -> PreconditionFailed | OperationPending:
        """Return the answer to a call that the storage refused because the volume is held."""
        volume = located.volume
        holders = others(located, client, deadline=deadline)
        if not holders:
            return OperationPending(f"volume {volume.name} was released just now; retry")
        owner = self._owner(located, client, holders, deadline=deadline)
        return _held_elsewhere(volume, holders, {h.id: self._reason_to_keep(volume, h, owner) for h in holders})

    def _owner(self, located: Located, client: Client, holders: list[Client], *, deadline: Deadline) -> str | None:
        """Return the id of the one client for whom the volume is reserved; None where it is nobody's alone.

        None as well for an id that no client has: it may be the old one of a holder that was given another name.
        """
        reservation = located.volume.reservation
        owner = reservation.reserved_by
        if not holders or owner is None or reservation.mode is not ReservationMode.EXCLUSIVE_READ_WRITE:
            return None
        is_known = owner in {client.id, *(holder.id for holder in holders)}
        return owner if is_known or located.management.client(owner, deadline=deadline) is not None else None

    def _reason_to_keep(self, volume: Volume, holder: Client, owner: str | None) -> str:
        """Say why the volume may not be taken from this holder; empty when it may.

        A holder that was preempted by the owner has no I/O any more, whether or not it has noticed.
        """
        desired = holder.desired.get(volume.uuid)
        is_given_up = desired is None or desired.is_detaching
        match self._fencing:
            case Fencing.ALWAYS:
                return ""
            case Fencing.NEVER:
                return "volumes are never taken over (--fencing never)"
        if is_given_up and owner not in (None, holder.id):
            return ""
        if holder.status is not ClientStatus.DOWN:
            state = "is being detached there" if is_given_up else "is attached there"
            return f"the storage client is {holder.status.name.lower()} and the volume {state}"
        if not is_given_up:
            return "the storage client is down, but the volume was not released there (no ControllerUnpublish)"
        return ""


def was_preempted(volume: Volume, holder: Client) -> bool:
    """Tell whether a client that is down can no longer write to a volume that nobody has now.

    The desired keeps the version of the reservation under which the client had the volume, and the volume's record the
    latest version under which another node took the volume and then had I/O on it (`Attachments.taken`): from then on
    the storage refuses the I/O of the former holder until it is detached and attached again, whether or not it has
    noticed. A version that was only raised proves nothing: the management raises it when it is asked to preempt, and
    the storage preempts when the new node attaches, which it may never have done.
    """
    desired, held = holder.desired.get(volume.uuid), volume.reservation
    if desired is None or not desired.is_detaching or holder.status is not ClientStatus.DOWN:
        return False
    record = read_attachments(volume.metadata)
    is_nobodys = held.mode is ReservationMode.NONE and not held.attached
    return is_nobodys and not record.is_broken and 0 < desired.version < record.taken < held.version


_LEAVES = {
    Fencing.RECORDED: "it was released there, and the storage client is down",
    Fencing.ALWAYS: "--fencing always",
    Fencing.NEVER: "",
}


def _held_elsewhere(volume: Volume, holders: list[Client], kept: dict[str, str]) -> PreconditionFailed:
    names = ", ".join(
        f"{holder.uuid} ({holder.id}{f': {kept[holder.id]}' if kept.get(holder.id) else ''})"
        for holder in sorted(holders, key=lambda holder: holder.id)
    )
    return PreconditionFailed(f"volume {volume.name} is attached to node {names}; detach it there first")
