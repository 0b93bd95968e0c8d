"""The storage management behind its REST API, in nouns of `csi_driver.model`."""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import Client, ReservationMode, SystemInfo, Volume, VolumeSpec, Vpg


class ManagementClient:
    """The storage management of one cluster, over its REST API. Thread-safe; close it when done."""

    def __init__(self, settings: ManagementSettings, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings

    def close(self) -> None:
        raise NotImplementedError

    def system_info(self, *, deadline: Deadline) -> SystemInfo:
        raise NotImplementedError

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        raise NotImplementedError

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> list[Volume]:
        raise NotImplementedError

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> str | None:
        raise NotImplementedError

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        raise NotImplementedError

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> bool:
        raise NotImplementedError

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        raise NotImplementedError

    def client(self, client_id: str, *, deadline: Deadline) -> Client | None:
        raise NotImplementedError

    def client_by_uuid(self, uuid: str, *, deadline: Deadline) -> Client | None:
        raise NotImplementedError

    def clients(self, *, deadline: Deadline) -> list[Client]:
        raise NotImplementedError

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        raise NotImplementedError

    def attach(
        self,
        client: Client,
        volume: Volume,
        *,
        mode: ReservationMode,
        reference_id: str | None,
        version: int | None = None,
        preempt: bool = False,
        detach_others: bool = False,
        deadline: Deadline,
    ) -> None:
        raise NotImplementedError

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> None:
        raise NotImplementedError

    def vpg(self, name: str, *, deadline: Deadline) -> Vpg | None:
        raise NotImplementedError

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int | None:
        raise NotImplementedError

    def raw_free_bytes(self, *, vpg: str | None = None, deadline: Deadline) -> int:
        raise NotImplementedError
