"""Who this node is, and whether it can do its work."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.errors import DriverError, HostFailure, StorageUnavailable
from csi_driver.node.marks import Marks
from csi_driver.node.ports import Devices, Tools
from csi_driver.node.requests import NodeInfo, NodeSettings
from csi_driver.node.zone import NodeZone


class Identity:
    """NodeGetInfo, and the node's part of Probe."""

    def __init__(self, *, devices: Devices, tools: Tools, zone: NodeZone, marks: Marks, settings: NodeSettings) -> None:
        self._devices = devices
        self._marks = marks
        self._zone = zone
        self._tools = tools
        self._settings = settings
        self._client_uuid: str | None = None
        self._client_limit = 0

    def info(self) -> NodeInfo:
        """Tell the node's id (its storage client's uuid, else its name), volume limit and topology.

        Raises `StorageUnavailable` while the id cannot be told: where a client belongs and has not shown itself since
        this process began; `PreconditionFailed` where it is not clear to which zone the node belongs.
        """
        settings = self._settings
        return NodeInfo(
            node_id=self._client_id() or settings.node_name,
            max_volumes=self._limit(),
            topology=self._zone.segments(),
        )

    def _client_id(self) -> str | None:
        """Return the client's uuid as it is or, during an upgrade, was; None where no client belongs.

        A node that changed its id for a moment would be another node for the CO: its volumes could not be detached.
        """
        client = self._devices.client()
        if client.uuid is not None:
            self._client_uuid, self._client_limit = client.uuid, client.volume_limit
        if self._client_uuid is None and client.is_expected:
            state = "is being upgraded, or starts" if client.is_upgrading else "is not running yet (no status files)"
            raise StorageUnavailable(f"the storage client of this node {state}: its uuid, the node's id, is not known")
        return self._client_uuid

    def _limit(self) -> int:
        """Return how many volumes of CSI this node takes: what was configured, at most what its client can; 0 = any.

        The orchestrator counts its own volumes alone against it, so what others attached is taken off. Full of those
        it says 1, as 0 means no limit; the controller then refuses.
        """
        limits = (self._settings.max_volumes_per_node, self._client_limit)
        limit = min((limit for limit in limits if limit), default=0)
        return max(1, limit - foreign(self._devices, self._marks)) if limit else 0

    def why_not_ready(self) -> str:
        """Tell why this node could not be registered, or serve, now; empty = it could."""
        try:
            self.info()
        except DriverError as problem:
            return str(problem)
        return "; ".join(self.problems())

    def problems(self) -> Sequence[str]:
        """Tell what keeps this machine from serving volumes, a sentence each; empty = all well."""
        found = list(self._tools.problems())
        try:
            self._zone.segments()
        except DriverError as problem:
            found.append(str(problem))
        return found


def foreign(devices: Devices, marks: Marks) -> int:
    """Return how many volumes somebody else than CSI attached to this node.

    A static handle leaves nothing in the storage that tells it from a hand, but its use on this node is on record here.
    One whose record outlived its use counts as CSI's: a limit too high is refused by the controller, one too low keeps
    pods away for nothing.
    """
    return sum(not _was_used(marks, uuid) for uuid in devices.unnamed())


def _was_used(marks: Marks, uuid: str) -> bool:
    try:
        return marks.read(uuid) is not None
    except HostFailure:
        return True  # there is one, though it cannot be read, and nobody but this driver makes any
