"""Encryption of volumes by the storage: a real LUKS2 header in the volume's file, and the passphrases that open it.

A request only records a command; a thread of its own carries it out, as a storage target does, and its answer stands in
the volume's document. Passphrases are in memory alone, and only until then: a command that a crash cut off is answered
as failed at the next start, and asked for again by whoever wants it.

A header is made, or made again, only in a volume that no client ever had. Unlike the storage's own client, the loop
device of this manager does not protect the header from being written to.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from csi_driver.background import Worker
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.ports import LuksHeaders
from csi_driver.embedded.records import VOLUMES, Encryption, Group, Volume
from csi_driver.embedded.refusals import Document, Refusal, detail, envelope, refused_item, volume_not_found
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.work import Holds, Locks
from csi_driver.errors import DriverError

_log = logging.getLogger(__name__)

INIT, ADD, ROTATE, DELETE = "initEncryption", "addPassphrase", "rotatePassphrase", "deletePassphrase"
ACTIONS = {
    INIT: "initializingEncryption",
    ADD: "addingPassphrase",
    ROTATE: "rotatingPassphrase",
    DELETE: "deletingPassphrase",
}
"""What a volume's action says while a command is under way."""
REQUIRED = "initEncryptionRequired"
HELD = "encrypt"
"""Tests hold commands back under this name."""

SUCCESS, REFUSED, CUT_OFF = 1, 2, 3
"""`encryption.command.response.result`"""
_FIRST_RETRY_S, _MOST_RETRY_S = 0.2, 5.0
_DEFAULT_HEADER_MIB = 16


def wished(item: Mapping[str, object], group: Group | None) -> Encryption | None:
    """Return the encryption that a new volume begins with: the request's own, or its group's; None = plain."""
    if group is not None and group.encryption is not None:
        return group.encryption
    if not item.get("isEncrypted"):
        return None
    asked = cast("Mapping[str, int]", item.get("encryption") or {})
    return Encryption(header_mib=int(asked.get("headerSize", _DEFAULT_HEADER_MIB)))


@dataclass(frozen=True, slots=True)
class _Order:
    """A command with what must not be written down."""

    index: int
    fields: Mapping[str, object]


class Encryptions:
    """The use-cases on encrypted volumes."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        locks: Locks,
        holds: Holds,
        headers: LuksHeaders | None,
        has_device: Callable[[str], bool],
        targets: tuple[str, ...],
        fault: Callable[[str], None],
    ) -> None:
        self._store = store
        self._pool = pool
        self._locks = locks
        self._holds = holds
        self._headers = headers
        self._has_device = has_device
        self._targets = targets
        self._fault = fault
        self._guard = threading.Lock()
        self._orders: dict[str, _Order] = {}
        self.worker = Worker("storage-encryption", _FIRST_RETRY_S, _MOST_RETRY_S)

    # --- requests ---------------------------------------------------------------------------------------

    def command(self, name: str, item: Mapping[str, object]) -> Document:
        """Record a command and let it be carried out. Returns the API's envelope of one object."""
        volume_name, identity = str(item["_id"]), str(item["uuid"])
        try:
            index = self._store.write(lambda change: self._accept(change, name, volume_name, identity))
        except Refusal as refusal:
            return refused_item(volume_name, identity, refusal)
        with self._guard:
            self._orders[identity] = _Order(index, item)
        self._fault("encrypt:accepted")
        self.carry_out(volume_name, identity)
        return envelope(volume_name, identity, True)

    def _accept(self, change: Change, command: str, name: str, identity: str) -> int:
        volume = change.get(VOLUMES, name)
        keys: Document = {"volumeID": name, "volumeUUID": identity}
        if volume is None or volume.uuid != identity:
            raise volume_not_found(name, identity)
        state = volume.encryption
        if state is None:
            raise _failed(keys, detail(16793, f"volume {name} was created without isEncrypted; make another with it"))
        if command == INIT and state.initialized:
            raise _failed(keys, detail(16792, f"the encryption of volume {name} is initialized already", **keys))
        if command == INIT and volume.action != REQUIRED:
            reason = f"the action of volume {name} is {volume.action}, expected {REQUIRED}; retry"
            raise _failed(keys, detail(167921, reason, **keys))
        if command != INIT and not state.initialized:
            raise _failed(
                keys, detail(167922, f"the encryption of volume {name} is not initialized; run {INIT} first", **keys)
            )
        if self._headers is None:
            raise _failed(keys, detail(16799, f"{command} needs cryptsetup, which the storage manager does not have"))
        if state.command.get("status") == "sent":
            raise _failed(
                keys, detail(16794, f"{state.command.get('name')} of volume {name} is in progress; retry", **keys)
            )
        index = state.index + 1
        sent: Document = {
            "commandIndex": index,
            "name": command,
            "executingTOMA": self._targets[index % len(self._targets)],
            "bootTime": None,
            "status": "sent",
        }
        begun = replace(state, command=sent, last_message={"type": command, "commandIndex": index})
        change.put(VOLUMES, name, replace(volume, encryption=begun, action=ACTIONS[command]))
        return index

    def acknowledge(self, item: Mapping[str, object]) -> Document:
        """Note that somebody has read a command's answer."""
        name, identity = str(item["_id"]), str(item["uuid"])
        command = cast("Mapping[str, Mapping[str, object]]", item["encryption"])["command"]

        def put(change: Change) -> None:
            volume = change.get(VOLUMES, name)
            state = volume.encryption if volume is not None and volume.uuid == identity else None
            if volume is None or state is None or state.index != command["commandIndex"]:
                keys: Document = {"volumeID": name, "volumeUUID": identity}
                raise Refusal(1464, "Failed acknowledging encryption response: no command has that commandIndex", keys)
            response = {**cast("Document", state.command.get("response", {})), "acknowledged": True}
            seen = replace(state, command={**state.command, "response": response})
            change.put(VOLUMES, name, replace(volume, encryption=seen))

        try:
            self._store.write(put)
        except Refusal as refusal:
            return refused_item(name, identity, refusal)
        return envelope(name, identity, True)

    # --- work -------------------------------------------------------------------------------------------

    def carry_out(self, name: str, identity: str) -> None:
        """Let the command of a volume, if it has one, be carried out soon."""
        with self._guard:
            if identity not in self._orders:
                return
        self.worker.later(f"encrypt {identity}", lambda: self._execute(name, identity), 0.0)

    def _execute(self, name: str, identity: str) -> bool:
        with self._guard:
            order = self._orders.get(identity)
        if order is None:
            return True
        if HELD in self._holds:
            return False
        with self._locks.hold(identity):
            volume = self._store.get(VOLUMES, name)
            if volume is not None and volume.uuid == identity and volume.encryption is not None:
                result, error = self._do(volume, volume.encryption, order)
                self._fault("encrypt:header")
                self._store.write(lambda change: _answer(change, name, identity, order.index, result, error))
                self._fault("encrypt:answered")
        with self._guard:
            if self._orders.get(identity) is order:
                del self._orders[identity]
        return True

    def _do(self, volume: Volume, state: Encryption, order: _Order) -> tuple[int, str]:
        """Change the header as the command says; return the result and, where it is no success, why."""
        command = str(state.command.get("name"))
        headers, file = self._headers, self._pool.file(volume.uuid)
        if headers is None or state.index != order.index:
            return CUT_OFF, "the storage manager ended before the command did; retry"
        try:
            if command == INIT:
                self._make_header(headers, volume, state, order.fields)
            elif command == ADD:
                _add(headers, file, order.fields)
            elif command == ROTATE:
                _add(headers, file, order.fields)
                headers.remove(file, str(order.fields["currentPassphrase"]))
            else:
                headers.remove(file, str(order.fields["currentPassphrase"]))
        except DriverError as problem:
            _log.warning("%s of volume %s failed: %s", command, volume.name, problem)
            return REFUSED, str(problem)
        _log.info("%s of volume %s, uuid %s, is done", command, volume.name, volume.uuid)
        return SUCCESS, ""

    def _make_header(
        self, headers: LuksHeaders, volume: Volume, state: Encryption, fields: Mapping[str, object]
    ) -> None:
        if state.initialized or volume.reservation.version != 1 or volume.made or self._has_device(volume.uuid):
            raise Refusal(
                167921, "a client had the volume before, so no header is made over its data; delete it and make another"
            )
        headers.format(
            self._pool.file(volume.uuid),
            str(fields["passphrase"]),
            slot=_slot(fields),
            key_size_bits=int(cast("int", fields.get("keySize", 512))),
            header_bytes=state.header_mib << 20,
            volume_uuid=volume.uuid,
        )

    def recover(self) -> None:
        """Answer the commands that the last run left without an answer: their passphrases are gone."""
        for volume in self._store.all(VOLUMES):
            if volume.encryption is not None and volume.encryption.command.get("status") == "sent":
                self._give_up(volume, volume.encryption.index)

    def _give_up(self, volume: Volume, index: int) -> None:
        reason = "the storage manager ended before the command did; retry"
        self._store.write(lambda change: _answer(change, volume.name, volume.uuid, index, CUT_OFF, reason))

    def release(self) -> None:
        """Carry out what was held back."""
        for volume in self._store.all(VOLUMES):
            self.carry_out(volume.name, volume.uuid)


def _answer(change: Change, name: str, identity: str, index: int, result: int, error: str) -> None:
    volume = change.get(VOLUMES, name)
    state = volume.encryption if volume is not None and volume.uuid == identity else None
    if volume is None or state is None or state.index != index:
        return
    response: Document = {"result": result, "retryable": result == CUT_OFF, "commandIndex": index}
    if error:
        response["error"] = error
    initialized = state.initialized or result == SUCCESS
    answered = replace(
        state, initialized=initialized, command={**state.command, "status": "executed", "response": response}
    )
    action = volume.action
    if action in ACTIONS.values():  # else it is being deleted
        action = "none" if initialized else REQUIRED
    change.put(VOLUMES, name, replace(volume, encryption=answered, action=action))


def _add(headers: LuksHeaders, file: Path, fields: Mapping[str, object]) -> None:
    """Let a new passphrase open the volume. Done already is success: a rotation may have been cut off after it."""
    current, new = str(fields["currentPassphrase"]), str(fields["newPassphrase"])
    if headers.opens(file, new) and headers.opens(file, current):
        return
    headers.add(
        file,
        current,
        new,
        slot=_slot(fields) if "slot" in fields else None,
    )


def _slot(fields: Mapping[str, object]) -> int:
    """Return the key slot as LUKS counts, from 0; the API counts from 1."""
    return int(cast("int", fields.get("slot", 1))) - 1


def _failed(keys: Document, inner: Document) -> Refusal:
    return Refusal(14591, "Running encryption command failed", keys, inner)
