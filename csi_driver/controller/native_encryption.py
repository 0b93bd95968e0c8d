"""The passphrase with which the storage begins to encrypt a new volume: given once, never blindly again."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from csi_driver.controller.ports import Management
from csi_driver.controller.volume_metadata import (
    read_attachments,
)
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    InvalidRequest,
    StorageUnavailable,
    shown,
)
from csi_driver.parameters.encryption import EncryptionRequest, required_passphrase
from csi_driver.storage_model import Volume

_log = logging.getLogger(__name__)
_DONE = 1
"""`encryption.command.response.result` of a command that succeeded."""


class EncryptionNotBegun(StorageUnavailable):
    """The storage did not take the passphrase, or could not make the header; the volume is there and waits for it."""

    def __init__(self, volume: Volume, reason: str) -> None:
        super().__init__(
            f"encryption of volume {volume.name} is not initialised: {reason}; a retry of CreateVolume continues"
        )


class NativeEncryption:
    """Hands the passphrase of one CreateVolume over, at most once."""

    def __init__(self, management: Management, request: EncryptionRequest, secrets: Mapping[str, str]) -> None:
        self._management = management
        self._request = request
        self._secrets = secrets
        self._index_before: int | None = None

    def is_done(self, volume: Volume, *, deadline: Deadline) -> bool:
        """Tell whether nothing of the volume's encryption is left to be done; do what can be done now."""
        state = volume.encryption
        if state is None or state.is_initialized:
            return True
        if not volume.wants_passphrase:
            return False
        if self._index_before is None:
            self._index_before = state.command_index
            self._begin(volume, deadline=deadline)
        elif state.command_index > self._index_before and state.command_result not in (None, _DONE):
            said = state.command_error.replace(required_passphrase(self._secrets), "[passphrase]")
            reason = f"{state.command_result} ({shown(said) if said else 'no reason given'})"
            raise EncryptionNotBegun(volume, f"the storage answers {reason}")
        return False

    def _begin(self, volume: Volume, *, deadline: Deadline) -> None:
        # The server refuses this too; a header over data would be the end of it.
        if volume.reservation.version != 1 or read_attachments(volume.metadata).number:
            raise EncryptionNotBegun(volume, "it was attached before; delete it")
        try:
            begun = self._management.init_encryption(
                volume,
                required_passphrase(self._secrets),
                slot=self._request.slot,
                key_size_bits=self._request.key_size_bits,
                deadline=deadline,
            )
        except InvalidRequest as refusal:
            raise EncryptionNotBegun(volume, str(refusal)) from refusal
        if begun:
            _log.info("handed the passphrase of volume %s, uuid %s, to the storage", volume.name, volume.uuid)
