# SPDX-License-Identifier: Apache-2.0
"""Encryption of volumes by the storage: a LUKS2 header in the volume's file.

A request records a command. A worker carries it out, as a storage target does, and the volume's document shows the
response. Passphrases are kept in memory and only until then: a command that a crash interrupted is answered as failed
at the next start, and must be requested again.

A header is written only into a volume that no client ever had. Unlike the storage's own client, the loop device of this
manager does not protect the header from writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from csi_driver.background import Worker
from csi_driver.embedded.documents import VOLUME_NOT_FOUND, ApiError, detail
from csi_driver.embedded.model import VOLUMES, Document, Encryption, Volume
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.requests import EncryptionInit
from csi_driver.embedded.settings import LuksHeaders
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import DriverError

_log = logging.getLogger(__name__)

REQUIRED = "initEncryptionRequired"
"""Action of a volume before its encryption is initialized."""
_COMMAND, _RUNNING = "initEncryption", "initializingEncryption"
_SUCCEEDED, _REFUSED, _INTERRUPTED = 1, 2, 3
"""encryption.command.response.result"""
_WHY_INTERRUPTED = "the storage manager ended before the command did; retry"
_FIRST_RETRY_S, _MOST_RETRY_S = 0.2, 5.0


@dataclass(eq=False)
class Encryptions:
    store: Store
    pool: Pool
    locks: VolumeLocks
    headers: LuksHeaders | None
    has_device: Callable[[str], bool]
    worker: Worker = field(default_factory=lambda: Worker("storage-encryption", _FIRST_RETRY_S, _MOST_RETRY_S))

    def initialize(self, item: EncryptionInit) -> None:
        """Record the command and let it be carried out. Raises ApiError."""
        index = self.store.write(lambda change: self._accept(change, item.id, item.uuid))
        self.worker.later(f"encrypt {item.uuid}", lambda: self._execute(item, index), 0.0)

    def _accept(self, change: Change, name: str, identity: str) -> int:
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            raise ApiError(VOLUME_NOT_FOUND, "Volume not found")
        state = volume.encryption
        if state is None:
            raise _failed(detail(16793, f"volume {name} was created without isEncrypted; create another with it"))
        if state.initialized:
            raise _failed(detail(16792, f"the encryption of volume {name} is already initialized"))
        if volume.action != REQUIRED:
            reason = f"the action of volume {name} is {volume.action}, expected {REQUIRED}; retry"
            raise _failed(detail(167921, reason))
        if self.headers is None:
            raise _failed(detail(16799, f"{_COMMAND} needs cryptsetup, which the storage manager does not have"))
        index = state.index + 1
        begun = replace(state, command={"commandIndex": index, "name": _COMMAND, "status": "sent"})
        change.put(VOLUMES, name, replace(volume, encryption=begun, action=_RUNNING))
        return index

    def _execute(self, item: EncryptionInit, index: int) -> bool:
        with self.locks.hold(item.uuid):
            volume = self.store.get(VOLUMES, item.id)
            if volume is not None and volume.uuid == item.uuid and volume.encryption is not None:
                result, error = self._write_header(volume, volume.encryption, item)
                self.store.write(lambda change: _respond(change, volume, index, result, error))
        return True

    def _write_header(self, volume: Volume, state: Encryption, item: EncryptionInit) -> tuple[int, str]:
        """Return the result, and why it is no success."""
        if self.headers is None:
            return _INTERRUPTED, _WHY_INTERRUPTED
        if state.initialized or volume.reservation.version != 1 or volume.made or self.has_device(volume.uuid):
            error = "a client had the volume before, so no header is written over its data; create another volume"
            _log.warning("%s of volume %s failed: %s", _COMMAND, volume.name, error)
            return _REFUSED, error
        try:
            self.headers.format(
                self.pool.file(volume.uuid),
                item.passphrase,
                slot=item.slot - 1,
                key_size_bits=item.key_size,
                header_bytes=state.header_mib << 20,
                volume_uuid=volume.uuid,
            )
        except DriverError as problem:
            _log.warning("%s of volume %s failed: %s", _COMMAND, volume.name, problem)
            return _REFUSED, str(problem)
        _log.info("volume %s, uuid %s: the encryption is initialized", volume.name, volume.uuid)
        return _SUCCEEDED, ""

    def recover(self) -> None:
        """Answer the commands that the last run did not finish: their passphrases are lost."""
        for volume in self.store.all(VOLUMES):
            if volume.encryption is not None and volume.encryption.command.get("status") == "sent":
                self._interrupt(volume, volume.encryption.index)

    def _interrupt(self, volume: Volume, index: int) -> None:
        self.store.write(lambda change: _respond(change, volume, index, _INTERRUPTED, _WHY_INTERRUPTED))


def _respond(change: Change, asked: Volume, index: int, result: int, error: str) -> None:
    volume = change.get(VOLUMES, asked.name)
    state = volume.encryption if volume is not None and volume.uuid == asked.uuid else None
    if volume is None or state is None or state.index != index:
        return
    response: Document = {"result": result, "retryable": result == _INTERRUPTED, "commandIndex": index}
    if error:
        response["error"] = error
    initialized = state.initialized or result == _SUCCEEDED
    command = {**state.command, "status": "executed", "response": response}
    action = volume.action
    if action == _RUNNING:  # else it is being deleted
        action = "none" if initialized else REQUIRED
    answered = replace(state, initialized=initialized, command=command)
    change.put(VOLUMES, volume.name, replace(volume, encryption=answered, action=action))


def _failed(inner: Document) -> ApiError:
    return ApiError(14591, "Running encryption command failed", inner)
