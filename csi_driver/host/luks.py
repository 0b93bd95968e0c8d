"""Encryption of volumes on this node: cryptsetup on devices that were proven, and what the kernel has opened.

Decides nothing: whether a header may be made, and with what, is the node's to say. A passphrase reaches cryptsetup as a
file in memory that it inherits: it is in no argument list, no environment and on no disk. The device reaches it as a
descriptor, like every tool that writes (see `filesystem`); programs of a killed driver hold its lock until they end.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import CommandFailed, Denied, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import device_mapper, ioctls
from csi_driver.host.ciphertext import read_header
from csi_driver.host.command import Completed, run
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.passphrases import held as _secret
from csi_driver.host.passphrases import path_of as _path
from csi_driver.host_model import (
    LUKS_SUBSYSTEM,
    DamagedHeader,
    Device,
    DeviceNumber,
    LuksHeader,
    LuksMapping,
    LuksSettings,
    OpenDevice,
)

_WRITE_LIMIT_S = 30 * 60.0
_READ_LIMIT_S = 5 * 60.0
"""Trying a passphrase takes as long as whoever made the header wanted, on whatever machine that was."""
_BUSY_GRACE_S = 5.0
"""udev looks at a mapped device for a moment whenever it changes; a filesystem that was unmounted may still be busy."""

# cryptsetup(8), "RETURN CODES"
_WRONG_PARAMETERS, _WRONG_PASSPHRASE, _BUSY = 1, 2, 5
# Without it cryptsetup waits for udev to answer through a semaphore that is another one in a container.
_ENVIRONMENT = {"DM_DISABLE_UDEV": "1"}


class LinuxEncryption:
    """Fits `csi_driver.node.ports.Encryption`."""

    def __init__(
        self, devices: LinuxDevices, mapper_directory: Path = Path("/dev/mapper"), *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._devices = devices
        self._directory = mapper_directory
        self._clock = clock

    def why_unusable(self) -> str:
        """Say why no encrypted device can be opened on this machine; empty = they can."""
        return device_mapper.why_unusable()

    # --- headers ---

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        """Return the LUKS header on the device, read past the page cache; None when there is no trace of one."""
        return read_header(device)

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        """Make a LUKS2 header that names the volume, destroying what is there. Has half an hour.

        Raises `InvalidField` for a cipher or a key size that cryptsetup or this kernel does not have; it finds that
        out before it writes anything.
        """
        label = ("--label", volume_uuid, "--subsystem", LUKS_SUBSYSTEM)
        words = ("luksFormat", "--type", "luks2", *label, *_arguments(settings), "--key-file")
        try:
            with _secret(passphrase) as key:
                self._cryptsetup((*words, _path(key)), device, (key,), timeout_s=_WRITE_LIMIT_S)
        except CommandFailed as failure:
            if failure.status == _WRONG_PARAMETERS and (settings.cipher or settings.key_bits):
                asked = " ".join(_arguments(LuksSettings(settings.cipher, settings.key_bits)))
                reason = failure.stderr.strip().splitlines()[-1:] or ["it printed no reason"]
                raise InvalidField("encryption", asked, f"what cryptsetup takes here ({reason[0]})") from failure
            raise

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        """Tell whether the passphrase opens the volume; nothing is opened."""
        with _secret(passphrase) as key:
            answer = self._cryptsetup(
                ("open", "--test-passphrase", "--key-file", _path(key)),
                device,
                (key,),
                timeout_s=_READ_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        return answer.status == 0

    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None:
        """Let a new passphrase open the volume, too. Raises `Denied` when `passphrase` does not open it."""
        with _secret(passphrase) as key, _secret(new) as new_key:
            answer = self._cryptsetup(
                ("luksAddKey", *_arguments(settings, with_key=False), "--key-file", _path(key)),
                device,
                (key, new_key),
                operand=_path(new_key),
                timeout_s=_WRITE_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        """Let a passphrase open the volume no more; the last one is never removed.

        Raises `PreconditionFailed` when it is the last one, `Denied` when it opens nothing.
        """
        found = read_header(device)
        if not isinstance(found, LuksHeader) or found.key_slots < 2:
            raise PreconditionFailed(f"{device.device.path} has no other key than the one to be removed")
        with _secret(passphrase) as key:
            answer = self._cryptsetup(
                ("luksRemoveKey",),
                device,
                (key,),
                operand=_path(key),
                timeout_s=_WRITE_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    # --- opened devices ---

    def path_of(self, name: str) -> Path:
        """Return where the opened device of a volume appears: what a mount of it names as its source."""
        return self._directory / name

    def mapping(self, name: str) -> LuksMapping | None:
        """Return what is opened under the volume's name; None when nothing is."""
        return device_mapper.mapping_named(name)

    def below(self, number: DeviceNumber) -> DeviceNumber | None:
        """Return the device under an opened one; None when `number` is none such, or the one below is gone."""
        return device_mapper.below(number)

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        """Open the volume under its own name. Raises `Denied` when the passphrase does not open it."""
        switches = ["--readonly"] * read_only + ["--allow-discards"] * allow_discards
        with _secret(passphrase) as key:
            answer = self._cryptsetup(
                ("open", "--type", "luks", *switches, "--key-file", _path(key)),
                device,
                (key,),
                operand=device.device.name,
                timeout_s=_READ_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        """Return an opened device as one of the volume, with a node of its own name that is no link.

        Raises `PreconditionFailed` when what is under it is not the volume, or it carries no I/O.
        """
        node = self.path_of(mapping.name)
        _ensure_node(node, mapping.number)
        found = self._devices.device_at(mapping.name, node, uuid)
        if found is None or found.number != mapping.number:
            raise PreconditionFailed(f"{node} is not there or has no size, expected device {mapping.number}")
        if found.uuid is not None and uuid is not None and found.uuid != uuid:
            raise PreconditionFailed(f"what lies under {node} claims {found.uuid}, expected {uuid}")
        return found

    def resume(self, mapping: LuksMapping) -> None:
        """Let a device carry I/O again that a cut-off change of its table left suspended."""
        device_mapper.resume(mapping)

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        """Let an opened device take the present size of the one below.

        Raises `Denied` when the passphrase does not open it, or none is given and the kernel keeps the key to itself.
        """
        argv: tuple[str, ...] = ("cryptsetup", "resize", "--batch-mode")
        with contextlib.ExitStack() as held:
            fds: list[int] = []
            if passphrase is not None:
                fds.append(held.enter_context(_secret(passphrase)))
                argv = (*argv, "--key-file", _path(fds[0]))
            try:
                answer = run(
                    (*argv, "--", mapping.name),
                    timeout_s=_WRITE_LIMIT_S,
                    accept=(0, _WRONG_PASSPHRASE),
                    pass_fds=fds,
                    environment=_ENVIRONMENT,
                    on_device=True,
                )
            except CommandFailed as failure:
                if passphrase is None:
                    raise Denied(f"{self.path_of(mapping.name)} grows only with its passphrase") from failure
                raise
        if answer.status == _WRONG_PASSPHRASE:
            raise Denied(f"the passphrase given does not open {self.path_of(mapping.name)}")

    def close(self, mapping: LuksMapping) -> None:
        """Close an opened device; gone already is success. Raises `PreconditionFailed` while anything uses it."""
        if not Deadline.after(_BUSY_GRACE_S, self._clock).wait_until(lambda: device_mapper.remove(mapping)):
            raise PreconditionFailed(f"{self.path_of(mapping.name)} is busy: it is mounted or otherwise in use")
        node = self.path_of(mapping.name)
        # Where no udev takes it away.
        if _node_number(node) == mapping.number or node.is_symlink():
            node.unlink(missing_ok=True)

    def _cryptsetup(
        self,
        words: Sequence[str],
        device: OpenDevice,
        keys: Sequence[int],
        *,
        timeout_s: float,
        operand: str | None = None,
        accept: Sequence[int] = (0,),
    ) -> Completed:
        operands = (_path(device.fd),) if operand is None else (_path(device.fd), operand)
        try:
            return run(
                ("cryptsetup", words[0], "--batch-mode", *words[1:], "--", *operands),
                timeout_s=timeout_s,
                accept=accept,
                pass_fds=(device.fd, *keys),
                environment=_ENVIRONMENT,
                on_device=True,
            )
        except CommandFailed as failure:
            if failure.status == _BUSY:
                raise PreconditionFailed(f"{device.device.path} is busy: {failure.stderr.strip()[-200:]}") from failure
            raise


def _require(answer: Completed, device: Device) -> None:
    if answer.status == _WRONG_PASSPHRASE:
        raise Denied(f"the passphrase given does not open {device.path}")


def _arguments(settings: LuksSettings, *, with_key: bool = True) -> tuple[str, ...]:
    """Return what cryptsetup is told of a header or, without the volume key's part, of a new key slot."""
    wanted: list[tuple[str, str | int]] = [("--cipher", settings.cipher), ("--key-size", settings.key_bits)] * with_key
    wanted += [
        ("--pbkdf", settings.pbkdf),
        ("--pbkdf-memory", settings.pbkdf_memory_kib),
        ("--pbkdf-force-iterations", settings.pbkdf_iterations),
    ]
    return tuple(word for option, value in wanted if value for word in (option, str(value)))


def _node_number(node: Path) -> DeviceNumber | None:
    try:
        status = os.lstat(node)
    except OSError:
        return None
    return ioctls.device_number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _ensure_node(node: Path, number: DeviceNumber) -> None:
    """Make `node` the device's own, in one step: udev makes links, and a link cannot be bound at a target."""
    if _node_number(node) == number:
        return
    draft = node.with_name(f".{node.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        draft.unlink(missing_ok=True)
        os.mknod(draft, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))
        os.replace(draft, node)
    except OSError as error:
        raise SystemCallFailed(f"make the device node {node}", error.errno or 0) from error
    finally:
        draft.unlink(missing_ok=True)
