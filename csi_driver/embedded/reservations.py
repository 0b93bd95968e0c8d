"""Who may attach a volume, and how: the cluster-wide reservation of each volume. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from csi_driver.embedded.records import EXCLUSIVE_READ_WRITE, MODE_NAMES, NONE, SHARED_READ_ONLY, Reservation
from csi_driver.embedded.refusals import Document, detail


class ReservationRefused(Exception):
    """The mode cannot be had. `inner` is the API's innerMessage."""

    def __init__(self, inner: Document) -> None:
        self.inner = inner
        super().__init__(str(inner["message"]))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The reservation that an attach asks for."""

    mode: int
    version: int | None = None
    preempt: bool = False
    detach_others: bool = False
    given: bool = False
    """The request had a `reservation` at all."""


def reserved(
    current: Reservation, client: str, wanted: Wanted, *, read_only: bool, moment: str, keys: Document
) -> Reservation:
    """Return the volume's reservation with `client` attached in the wanted mode. Raises ReservationRefused."""
    if read_only and wanted.mode != SHARED_READ_ONLY:
        reason = f"{MODE_NAMES[wanted.mode]} was asked for and the volume is read-only; attach it as SHARED_READ_ONLY"
        raise ReservationRefused(detail(1716, reason, **keys))
    attached = current.attached if client in current.attached else (*current.attached, client)
    joins = current.mode == wanted.mode and (current.mode != EXCLUSIVE_READ_WRITE or current.reserved_by == client)
    if joins:
        return replace(current, attached=attached)
    if current.mode != NONE:
        held = f"the volume is reserved as {MODE_NAMES[current.mode]} for {', '.join(current.attached)}"
        if wanted.version != current.version:
            reason = f"{held}; the version of the reservation is {current.version}, the request has {wanted.version}"
            raise ReservationRefused(detail(1717, reason, volumeReservation=current.version, **keys))
        if not wanted.preempt:
            raise ReservationRefused(detail(1718, f"{held}; detach it there, or set preempt to take it over", **keys))
    if wanted.detach_others and current.mode != NONE:
        # They are no longer counted, also where they are down and keep device and attachment: the last of those who
        # are counted ends the reservation.
        attached = (client,)
    return Reservation(wanted.mode, current.version + 1, client, attached, moment)


def holds(current: Reservation, client: str, mode: int) -> bool:
    """Tell whether a client that attached in this mode may do I/O, or was preempted since."""
    return current.mode == mode and (mode != EXCLUSIVE_READ_WRITE or current.reserved_by == client)


def released(current: Reservation, client: str, moment: str) -> Reservation:
    """Return the reservation after `client` has gone; the last one to go ends it."""
    left = tuple(name for name in current.attached if name != client)
    if left == current.attached:
        return current
    if left:
        return replace(current, attached=left)
    return Reservation(NONE, current.version + 1, None, (), moment)
