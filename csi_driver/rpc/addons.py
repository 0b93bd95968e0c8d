# SPDX-License-Identifier: Apache-2.0
"""The services of CSI-Addons, on an endpoint of their own (--csi-addons-endpoint).

`rpc.boundary` checks their requests. Loaded only where they are served. Source: https://github.com/csi-addons/spec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver.deadline import Deadline
from csi_driver.rpc.boundary import Service
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.pb import encryptionkeyrotation_pb2 as key_pb
from csi_driver.rpc.pb import identity_pb2 as id_pb
from csi_driver.rpc.pb import reclaimspace_pb2 as space_pb

if TYPE_CHECKING:
    from csi_driver.controller.reclaim_space import ReclaimSpace
    from csi_driver.node.addons import NodeAddons
    from csi_driver.rpc.identity import IdentityService

_Capability = id_pb.Capability
_Mode = csi_pb2.VolumeCapability.AccessMode
_OF_ONE_NODE = (_Mode.SINGLE_NODE_WRITER, _Mode.SINGLE_NODE_SINGLE_WRITER, _Mode.SINGLE_NODE_MULTI_WRITER)


@dataclass(slots=True)
class AddonsIdentity(Service):
    """Identity of CSI-Addons: the same name, version and readiness as those of CSI."""

    file: ClassVar[FileDescriptor] = id_pb.DESCRIPTOR
    name: ClassVar[str] = "Identity"

    csi: IdentityService

    def GetIdentity(self, request: id_pb.GetIdentityRequest, deadline: Deadline) -> id_pb.GetIdentityResponse:
        return id_pb.GetIdentityResponse(name=self.csi.driver_name, vendor_version=self.csi.version())

    def GetCapabilities(
        self, request: id_pb.GetCapabilitiesRequest, deadline: Deadline
    ) -> id_pb.GetCapabilitiesResponse:
        service, space, keys = _Capability.Service, _Capability.ReclaimSpace, _Capability.EncryptionKeyRotation
        if self.csi.features is None:
            capabilities = [
                _Capability(service=service(type=service.NODE_SERVICE)),
                _Capability(reclaim_space=space(type=space.ONLINE)),
                _Capability(encryption_key_rotation=keys(type=keys.ENCRYPTIONKEYROTATION)),
            ]
        else:
            capabilities = [_Capability(service=service(type=service.CONTROLLER_SERVICE))]
            if self.csi.features.offered(deadline=deadline).reclaims_space:
                capabilities.append(_Capability(reclaim_space=space(type=space.OFFLINE)))
        return id_pb.GetCapabilitiesResponse(capabilities=capabilities)

    def Probe(self, request: id_pb.ProbeRequest, deadline: Deadline) -> id_pb.ProbeResponse:
        return id_pb.ProbeResponse(ready=BoolValue(value=self.csi.is_ready()))


@dataclass(slots=True)
class ReclaimSpaceController(Service):
    file: ClassVar[FileDescriptor] = space_pb.DESCRIPTOR
    name: ClassVar[str] = "ReclaimSpaceController"

    do: ReclaimSpace

    def ControllerReclaimSpace(
        self, request: space_pb.ControllerReclaimSpaceRequest, deadline: Deadline
    ) -> space_pb.ControllerReclaimSpaceResponse:
        taken = self.do.reclaim(request.volume_id, deadline=deadline)
        if taken is None:
            return space_pb.ControllerReclaimSpaceResponse()
        before, after = (space_pb.StorageConsumption(usage_bytes=each) for each in taken)
        return space_pb.ControllerReclaimSpaceResponse(pre_usage=before, post_usage=after)


@dataclass(slots=True)
class ReclaimSpaceNode(Service):
    file: ClassVar[FileDescriptor] = space_pb.DESCRIPTOR
    name: ClassVar[str] = "ReclaimSpaceNode"

    do: NodeAddons

    def NodeReclaimSpace(
        self, request: space_pb.NodeReclaimSpaceRequest, deadline: Deadline
    ) -> space_pb.NodeReclaimSpaceResponse:
        """Leave the usage out: the filesystem uses as much as before, and a node does not know it of the storage."""
        is_block = request.volume_capability.WhichOneof("access_type") == "block"
        paths = (request.volume_path, request.staging_target_path)
        self.do.reclaim(request.volume_id, paths, is_block=is_block, deadline=deadline)
        return space_pb.NodeReclaimSpaceResponse()


@dataclass(slots=True)
class EncryptionKeyRotation(Service):
    file: ClassVar[FileDescriptor] = key_pb.DESCRIPTOR
    name: ClassVar[str] = "EncryptionKeyRotationController"

    do: NodeAddons

    def EncryptionKeyRotate(
        self, request: key_pb.EncryptionKeyRotateRequest, deadline: Deadline
    ) -> key_pb.EncryptionKeyRotateResponse:
        self.do.rotate(
            request.volume_id,
            dict(request.parameters),
            dict(request.secrets),
            new_passphrase=request.encryption_key,
            is_shared=request.volume_capability.access_mode.mode not in _OF_ONE_NODE,  # nor known to be
            deadline=deadline,
        )
        return key_pb.EncryptionKeyRotateResponse()


def controller_services(csi: IdentityService, do: ReclaimSpace) -> tuple[Service, ...]:
    return AddonsIdentity(csi), ReclaimSpaceController(do)


def node_services(csi: IdentityService, do: NodeAddons) -> tuple[Service, ...]:
    return AddonsIdentity(csi), ReclaimSpaceNode(do), EncryptionKeyRotation(do)
