"""How many volumes are on this node, by what is mounted: for measurement, not for decisions."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from csi_driver.host_model import Mount
from csi_driver.node.kubelet import publication_data, staging_data
from csi_driver.node.ownership import Ownership
from csi_driver.node.ports import Mounts, ReadOnlyDevices
from csi_driver.node.questions import NoAnswer, Questions

LOOK_LIMIT_S = 5.0


class State(StrEnum):
    """Where a volume is mounted. A raw block volume is mounted nowhere while it is only staged."""

    STAGED = "staged"
    PUBLISHED = "published"
    ELSEWHERE = "elsewhere"
    """Not where kubelet has its volumes: another orchestrator's, or an administrator's."""


class Census:
    """Counts volumes by the mount table, in a thread that can be lost to a mount that hangs."""

    def __init__(
        self, mounts: Mounts, read_only_devices: ReadOnlyDevices, ownership: Ownership, *, driver_name: str
    ) -> None:
        self._mounts = mounts
        self._read_only_devices = read_only_devices
        self._ownership = ownership
        self._driver_name = driver_name
        self._looks: Questions[Mapping[str, int]] = Questions("census")

    def volumes(self) -> Mapping[str, int]:
        """Return the number of volumes in each `State`; empty where a mount does not let itself be looked at."""
        try:
            return self._looks.ask("any", "a look", self._count, LOOK_LIMIT_S)
        except NoAnswer:
            return {}

    def _count(self) -> Mapping[str, int]:
        names: dict[State, set[str]] = {state: set() for state in State}
        over = {reader.number: reader.over for reader in self._read_only_devices.present()}
        for mounted in self._mounts.table():
            path = over.get(mounted.node_number) if mounted.node_number is not None else None
            name = self._ownership.name_at(path) if path is not None else self._ownership.name_of(mounted)
            if name is not None:
                names[self._state_of(mounted)].add(name)
        return {state: len(found) for state, found in names.items()}

    def _state_of(self, mounted: Mount) -> State:
        if staging_data(mounted.path, self._driver_name) is not None:
            return State.STAGED
        return State.PUBLISHED if publication_data(mounted.path) is not None else State.ELSEWHERE
