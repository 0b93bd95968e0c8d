"""Who this node is, and whether it can do its work."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.node.ports import Devices, Tools
from csi_driver.node.requests import NodeInfo, NodeSettings


class Identity:
    """NodeGetInfo, and the node's part of Probe."""

    def __init__(self, *, devices: Devices, tools: Tools, settings: NodeSettings) -> None:
        self._devices = devices
        self._tools = tools
        self._settings = settings

    def info(self) -> NodeInfo:
        """Tell the node's id (its storage client's uuid, else its name), volume limit and topology."""
        settings = self._settings
        return NodeInfo(
            node_id=self._devices.client_uuid() or settings.node_name,
            max_volumes=settings.max_volumes_per_node,
            topology={settings.topology_key: settings.zone},
        )

    def problems(self) -> Sequence[str]:
        """Tell what keeps this machine from serving volumes, a sentence each; empty = all well."""
        return self._tools.problems()
