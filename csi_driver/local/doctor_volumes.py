"""Looks at the volumes that are mounted here, and at what the node remembers of volumes. No volume is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import HostFailure
from csi_driver.host import machine_checks
from csi_driver.host.connectors.nvmesh import StatusFiles
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.mount_table import read_table
from csi_driver.local.doctor_findings import Check, Finding, fine, unknown, warning
from csi_driver.local.doctor_settings import Patient
from csi_driver.local.held import held_in
from csi_driver.node.usage_records import UsageRecords


def volumes(patient: Patient) -> Iterator[Finding]:
    """Look whether what is mounted still has its device, and kubelet its record."""
    table = {entry.path: entry for entry in read_table()}
    client = StatusFiles(patient.status_directory)
    held = list(held_in(table, patient.driver_name))
    for mount in held:
        entry = table[mount.path]
        if not machine_checks.is_there(entry.number):
            yield warning(
                Check.VOLUMES,
                f"volume {mount.name} is mounted at {mount.path}, and its device {entry.number} is gone",
                "the device that was mounted",
                "delete the pods that use it: kubelet then unmounts it, and the volume is attached again",
            )
        elif not mount.handle:
            yield warning(
                Check.VOLUMES,
                f"{mount.path} is mounted, and kubelet has no record of it",
                "kubelet's vol_data.json beside it",
                "nothing, where the node runs: what two looks prove orphaned it unmounts; else: umount that path",
            )
        elif (status := client.volume(Path(entry.source).name)) is not None and status.preempted:
            yield warning(
                Check.VOLUMES,
                f"volume {mount.name} at {mount.path} was taken over by another node: {status.words}",
                "an attachment that carries I/O",
                "delete the pods here: kubelet then takes the dead mount off, and the client gives the volume up",
            )
        elif status is not None and status.io_enabled is not True:
            yield warning(
                Check.VOLUMES,
                f"volume {mount.name} at {mount.path} carries no I/O: {status.words}",
                "an attachment that carries I/O",
                "look at the volume in the management: where its data has no path, programs wait until it has",
            )
    yield fine(Check.VOLUMES, f"{len(held)} mounts of volumes of this driver, by kubelet's layout")


def marks(patient: Patient) -> Iterator[Finding]:
    """Look through what the node remembers of formats and of use."""
    kept = UsageRecords(patient.state_directory)
    present = LinuxDevices(patient.device_directory, patient.status_directory).present()
    here = None if present is None else {uuid.lower() for uuid in present.values()}
    used = begun = absent = 0
    for uuid in sorted(kept.recorded()):
        try:
            mark = kept.read(uuid)
        except HostFailure as error:
            yield warning(
                Check.MARKS,
                str(error),
                "a mark that can be read: until then this volume is not formatted here",
                f"see what the volume holds, then remove {kept.path_of(uuid)}",
            )
            continue
        if mark is None:
            continue
        if here is not None and uuid.lower() not in here:
            absent += 1
        elif mark.is_use:
            used += 1
        else:
            begun += 1
            yield unknown(
                Check.MARKS,
                f"a format ({mark.filesystem}) of volume {mark.volume_uuid} was begun and not finished",
                "nothing, where a pod is about to use it: the next stage makes it again",
            )
    gone = f"; records of volumes that are no longer here: {absent} (the node removes them in time)" if absent else ""
    yield fine(Check.MARKS, f"{used} volumes in use on record, {begun} formats begun{gone}")


LOOKS = ((Check.VOLUMES, volumes), (Check.MARKS, marks))
