"""Looks at the driver that runs here, and for others that get in its way."""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from csi_driver.local.doctor_findings import Check, Finding, fault, fine, unknown, warning
from csi_driver.local.doctor_settings import Patient

_CALL_S = 3.0
_CONNECT_S = 1.0
_REGISTRY = "plugins_registry"


def driver(patient: Patient) -> Iterator[Finding]:
    """Ask the driver's own socket who is there and whether it is ready."""
    if patient.endpoint is None:
        yield unknown(
            Check.DRIVER, "no driver runs here, as far as can be seen", "run it beside one, or give --endpoint"
        )
        return
    if not patient.endpoint.exists():
        yield fault(
            Check.DRIVER, f"there is no socket {patient.endpoint}", "the driver's socket",
            "see the log of the node's container: it says why it does not serve",
        )  # fmt: skip
        return
    yield from _asked(patient, patient.endpoint)


def _asked(patient: Patient, endpoint: Path) -> Iterator[Finding]:
    from csi_driver.rpc.client import CallFailed, CsiClient

    mend = "see the log of the driver's container"
    try:
        with CsiClient(endpoint, timeout_s=_CALL_S) as client:
            name = client.plugin_name()
            is_ready = client.is_ready(timeout_s=_CALL_S)
            told = client.node_info() if patient.role == "node" and is_ready else None
    except CallFailed as error:
        yield fault(Check.DRIVER, f"{endpoint}: {error}", "answers of the driver", mend)
        return
    if name != patient.driver_name:
        yield fault(
            Check.DRIVER, f"{endpoint} is served by {name}", patient.driver_name,
            "give each driver a directory of its own (the chart does, by driverName)",
        )  # fmt: skip
    if not is_ready:
        yield fault(Check.DRIVER, f"{name} is not ready", "that Probe answers ready", mend)
    elif told is not None:
        limit = told.max_volumes or "any number of"
        where = ", ".join(f"{key}={value}" for key, value in told.topology.items())
        yield fine(Check.DRIVER, f"{name} serves: node id {told.node_id}, {limit} volumes, {where}")
    else:
        yield fine(Check.DRIVER, f"{name} serves and is ready")


def sockets(patient: Patient) -> Iterator[Finding]:
    """Look for other drivers of the same name in kubelet's directories."""
    given = patient.registration_directory
    if given is not None and not given.is_dir():
        yield fault(
            Check.SOCKETS, f"{given} does not exist: kubelet finds no driver there", "kubelet's plugins_registry",
            "correct --kubelet-registration-directory (value kubeletDirectory), or mount it into the container",
        )  # fmt: skip
    for registry in _registries(patient):
        yield from _registered(patient, registry)
    for root in patient.path_roots:
        own = patient.endpoint
        for other in _sockets_in(root / "plugins" / patient.driver_name):
            if (own is None or not _is_same(own, other)) and _is_served(other):
                judge = fault if own is not None else warning
                yield judge(
                    Check.SOCKETS,
                    f"{other} is served by something else under the name of this driver",
                    "one driver of a name on a node",
                    "remove the other one: kubectl get daemonsets --all-namespaces | grep -i csi",
                )


def _registries(patient: Patient) -> list[Path]:
    given = patient.registration_directory
    found = [root / _REGISTRY for root in patient.path_roots] if given is None else [given]
    return [registry for registry in found if registry.is_dir()]


def _registered(patient: Patient, registry: Path) -> Iterator[Finding]:
    name = patient.driver_name
    found = [each for each in _sockets_in(registry) if each.name in (f"{name}.sock", f"{name}-reg.sock")]
    served = [each for each in found if _is_served(each)]
    if len(served) > 1:
        yield fault(
            Check.SOCKETS,
            f"{name} is registered with kubelet by {', '.join(map(str, served))}",
            "one socket: kubelet refuses the second driver of a name",
            "remove the other driver of this name, or its registrar",
        )
    for dead in (each for each in found if each not in served):
        yield warning(
            Check.SOCKETS, f"{dead} is there and nobody serves it", "a socket that is served",
            "start the driver; where nothing is to serve it: remove the file",
        )  # fmt: skip
    if len(served) == 1:
        yield fine(Check.SOCKETS, f"{served[0]} is served")
    elif patient.registration_directory is not None and not found:
        yield fault(
            Check.SOCKETS, f"{registry} has no socket of {name}", "the driver's registration socket",
            "see the log of the node's container: it says why it is not made",
        )  # fmt: skip


def _sockets_in(directory: Path) -> list[Path]:
    try:
        return [each for each in sorted(directory.iterdir()) if stat.S_ISSOCK(each.lstat().st_mode)]
    except OSError:
        return []


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _is_served(path: Path) -> bool:
    """Tell whether anybody accepts connections; nothing is sent."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


CONTROLLER_LOOKS = ((Check.DRIVER, driver),)
LOOKS = ((Check.DRIVER, driver), (Check.SOCKETS, sockets))
