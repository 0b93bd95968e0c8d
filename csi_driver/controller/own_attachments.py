"""Attachments that a node makes for itself, by the rules by which the controller makes them for all.

It fits `csi_driver.node.ports.Attachments`, which it must not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from csi_driver.controller.attach import Attach
from csi_driver.controller.requests import PublishRequest
from csi_driver.deadline import Deadline
from csi_driver.model import Capability


class OwnAttachments:
    """`node_id` tells who this node is, at each call: its storage client may come up after the driver."""

    def __init__(self, attach: Attach, node_id: Callable[[], str]) -> None:
        self._attach = attach
        self._node_id = node_id

    def attach(
        self,
        volume_id: str,
        capability: Capability,
        volume_context: Mapping[str, str],
        *,
        is_again: bool = False,
        deadline: Deadline,
    ) -> Mapping[str, str]:
        """Attach the volume to this node, or find it attached, and return its publish context."""
        node_id = self._node_id()
        request = PublishRequest(volume_id, node_id, capability, False, context=volume_context, is_again=is_again)
        return self._attach.publish(request, deadline=deadline).as_map()

    def detach(self, volume_id: str, *, deadline: Deadline) -> None:
        """Give up this handle's hold of the volume on this node."""
        self._attach.unpublish(volume_id, self._node_id(), deadline=deadline)
