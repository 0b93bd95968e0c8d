"""Stage and publish on a node that attaches its volumes itself (`--attach-by node`).

Nobody asks for ControllerPublish then, so the publish context, by which the node knows the volume's history and who
encrypts it, is made here. Attaching is repeated with every stage: that finds the attachment as it is, and mends one
that a crash cut short. To publish, it must be there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, NotAttached, OperationPending, StorageUnavailable
from csi_driver.node.ports import Attachments
from csi_driver.node.requests import NodePublishRequest, StageRequest

logger = logging.getLogger(__name__)


class Staging(Protocol):
    """What `stage.Stage` does."""

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None: ...

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None: ...

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool: ...


class Publishing(Protocol):
    """What `publish.Publish` does."""

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None: ...

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None: ...


class StillAttached(StorageUnavailable):
    """The volume is attached by this node and could not be staged; whoever gives it up for that must unstage it."""

    def __init__(self, reason: DriverError) -> None:
        super().__init__(f"{reason}; the volume stays attached to this node until it is unstaged here")


class AttachingStage:
    """Attaches before it stages, and detaches after it has unstaged.

    What fails in between is answered by an error after which kubelet unstages. After most others it takes the volume
    for not staged (pkg/volume/csi, csi_client.go `isFinalError`), and nobody would ever detach it. It is not detached
    here: what a retry may do goes by the attachment's number, such as to make a half-made filesystem again.
    """

    def __init__(self, stage: Staging, attachments: Attachments) -> None:
        self._stage = stage
        self._attachments = attachments

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        """Attach the volume and stage it. Raises what `Attachments.attach` raises, else `StorageUnavailable`."""
        context = self._attached(request, deadline=deadline)
        try:
            self._stage.stage(replace(request, publish_context=context), deadline=deadline)
        except (OperationPending, StorageUnavailable):
            raise
        except DriverError as error:
            raise StillAttached(error) from error

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        """Tell what `Stage.is_staged` tells."""
        return self._stage.is_staged(volume_id, staging_target_path)

    def _attached(self, request: StageRequest, *, deadline: Deadline) -> Mapping[str, str]:
        """Attach the volume, or find it attached. What is mounted already must not be met by a new attachment.

        It was taken from this node then, and another one may have written to it: what this kernel keeps of it in memory
        is of the time before, and is taken off first.
        """
        attach = self._attachments.attach
        volume_id, path = request.volume_id, request.staging_target_path
        if self._stage.is_staged(volume_id, path):
            try:
                return attach(volume_id, request.capability, request.volume_context, is_again=True, deadline=deadline)
            except NotAttached as lost:
                logger.warning("%s; that is done now", lost)
                self._stage.unstage(volume_id, path, deadline=deadline)
        return attach(volume_id, request.capability, request.volume_context, deadline=deadline)

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        """Unstage the volume, then give it up: also what an earlier call, or an earlier driver, has left attached."""
        self._stage.unstage(volume_id, staging_target_path, deadline=deadline)
        self._attachments.detach(volume_id, deadline=deadline)


class AttachingPublish:
    """Publishes with the context of the attachment that is there."""

    def __init__(self, publish: Publishing, attachments: Attachments) -> None:
        self._publish = publish
        self._attachments = attachments

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        """Publish the staged volume. Raises what `Publish.publish` raises, and `NotAttached`.

        It is never attached anew: what was staged belongs to the attachment that it was staged under.
        """
        context = self._attachments.attach(
            request.volume_id, request.capability, request.volume_context, is_again=True, deadline=deadline
        )
        self._publish.publish(replace(request, publish_context=context), deadline=deadline)

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        """Take the volume off the target path; it stays attached until it is unstaged."""
        self._publish.unpublish(volume_id, target_path, deadline=deadline)
