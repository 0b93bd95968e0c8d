# SPDX-License-Identifier: Apache-2.0
"""A node that is started in a few milliseconds: each call runs in a process of its own, forked from this one.

Run as `python -m tests.integration.fault_server DIRECTORY`. Reads calls from stdin, a JSON object a line, and writes
how each ended: "ok", "killed", or the class and text of the failure. The forked process makes the adapters and the
use-cases anew, as a start of the node does, so nothing but the kernel is remembered from one call to the next.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.model import AccessMode, BlockAccess, Capability, CapacityRange, MountAccess
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.node.service import NodeUseCases, assemble
from csi_driver.node.usage_records import UsageRecords
from csi_driver.node_settings import NodeSettings
from tests.faults import Faults

CALL_TIME_S = 60.0


def node(directory: Path) -> NodeUseCases:
    """Compose a node as the program does, with faults."""
    devices = LinuxDevices(directory / "dev", directory / "proc")
    paths = LinuxPaths([directory / "kubelet"])
    settings = NodeSettings(node_name="faults", state_directory=directory / "state")
    return Faults(directory / "faults").compose(
        assemble,
        devices=devices,
        encryption=LinuxEncryption(devices),
        read_only_devices=ReadOnlyLoops(LoopDevices()),
        mounts=LinuxMounts(paths.open),
        filesystems=LinuxFilesystems(devices),
        paths=paths,
        probes=LinuxProbes(),
        records=UsageRecords(directory / "state"),
        tools=MachineTools([directory / "kubelet"]),
        settings=settings,
    )


def carry_out(use: NodeUseCases, call: dict[str, Any]) -> None:
    """Make one call of a use-case."""
    volume_id, staging, target = call["volume_id"], call["staging"], call["target"]
    access = BlockAccess() if call["kind"] == "block" else MountAccess(call["kind"], tuple(call["flags"]))
    capability = Capability(access, AccessMode.SINGLE_NODE_WRITER)
    deadline = Deadline.after(CALL_TIME_S)
    match call["verb"]:
        case "stage":
            parameters, secrets = call["parameters"], call["secrets"]
            stage = StageRequest(volume_id, staging, capability, call["context"], parameters, secrets)
            use.stage.stage(stage, deadline=deadline)
        case "unstage":
            use.stage.unstage(volume_id, staging, deadline=deadline)
        case "publish":
            request = NodePublishRequest(volume_id, staging, target, capability, call["read_only"], call["context"])
            use.publish.publish(request, deadline=deadline)
        case "unpublish":
            use.publish.unpublish(volume_id, target, deadline=deadline)
        case "expand":
            size = CapacityRange(call["required_bytes"])
            expand = NodeExpandRequest(volume_id, target, size, staging, capability, call["secrets"])
            use.expand.expand(expand, deadline=deadline)
        case other:
            raise ValueError(other)


def in_a_process_of_its_own(directory: Path, call: dict[str, Any]) -> str:
    """Make the call in a forked process; return how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "ok"
        try:
            carry_out(node(directory), call)
        except DriverError as error:
            outcome = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001  # the answer is the only way out of here
            outcome = f"bug {type(error).__name__}: {error}"
        os.write(writer, outcome.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        outcome = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return outcome


def main() -> None:
    directory = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(in_a_process_of_its_own(directory, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
