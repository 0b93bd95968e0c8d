"""What the clients of this machine say of their devices: the rows of `block_devices`, and the end of attachments."""

from __future__ import annotations

from dataclasses import replace

from csi_driver.embedded.records import ATTACHMENTS, CLIENTS, DETACHED, REPORTS, VOLUMES, Attachment, Report
from csi_driver.embedded.reservations import released
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import now


class Reports:
    """Writes what clients report; each change is one of the store's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def tell(self, wish: Attachment, status: int, *, io_enabled: int) -> None:
        """Report the state of an attachment; nothing is written where the same was said before."""
        old = self._store.get(REPORTS, wish.uuid, wish.client)
        told = (status, io_enabled, wish.references, wish.version, wish.reservation["mode"])
        if old is None or _told(old) != told:
            self._store.write(lambda change: _put(change, wish, status, io_enabled=io_enabled))

    def detached(self, wish: Attachment) -> None:
        """Report the detach; end the attachment unless it is wished for again in the meantime."""
        self._store.write(lambda change: _end(change, wish))

    def take_back(self, client: str, identity: str) -> Report | None:
        """Report as detached what was reported attached after its wish had been withdrawn, or a crash left so.

        Returns the report that is taken back.
        """

        def detached(change: Change) -> None:
            report, told = change.get(REPORTS, identity, client), change.get(CLIENTS, client)
            if report is None or told is None or change.get(ATTACHMENTS, identity, client) is not None:
                return
            told = replace(told, report_id=told.report_id + 1)
            change.put(CLIENTS, client, told)
            change.put(REPORTS, identity, replace(report, status=DETACHED, report_id=told.report_id), client)

        report = self._store.get(REPORTS, identity, client)
        if report is None or report.status == DETACHED:
            return None
        self._store.write(detached)
        return report


def _told(report: Report) -> tuple[object, ...]:
    """Return what a client reports anew when it changes."""
    return report.status, report.io_enabled, report.references, report.version, report.reservation["mode"]


def _end(change: Change, wish: Attachment) -> None:
    _put(change, wish, DETACHED, io_enabled=1)
    current = change.get(ATTACHMENTS, wish.uuid, wish.client)
    if current is None or current.action != "detaching":
        return
    change.delete(ATTACHMENTS, wish.uuid, wish.client)
    volume = change.get(VOLUMES, wish.volume)
    if volume is not None and volume.uuid == wish.uuid:
        reservation = released(volume.reservation, wish.client, now())
        change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))


def _put(change: Change, wish: Attachment, status: int, *, io_enabled: int) -> None:
    client = change.get(CLIENTS, wish.client)
    volume = change.get(VOLUMES, wish.volume)
    if client is None or volume is None or volume.uuid != wish.uuid:
        return
    client = replace(client, report_id=client.report_id + 1)
    change.put(CLIENTS, client.name, client)
    change.put(
        REPORTS,
        wish.uuid,
        Report(
            client=wish.client,
            volume=wish.volume,
            uuid=wish.uuid,
            status=status,
            io_enabled=io_enabled,
            reservation=wish.reservation,
            references=wish.references,
            attachments_version=wish.attachments_version,
            version=wish.version,
            report_id=client.report_id,
        ),
        wish.client,
    )
