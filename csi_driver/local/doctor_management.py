"""Looks at the storage management, where its servers are known: every server by itself, up to who is known there."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, Unauthenticated
from csi_driver.host.connectors.nvmesh import StatusFiles
from csi_driver.local.doctor_findings import Check, Finding, fault, fine, unknown, warning
from csi_driver.local.doctor_settings import Patient
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import parse_clusters, read_cluster_names
from csi_driver.management.connection_check import ConnectionCheck, Step, check_connection
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import Client
from csi_driver.yaml_document import InvalidDocument, read_source

_STEP_S = 3.0
_SOON_S = 30 * 86400.0
_SKEW_S = 30.0
_DAY_S = 86400.0

_MEND = {
    Step.NAME: "correct the server's name, or this machine's name service (getent hosts NAME)",
    Step.CONNECTION: "see that the management runs there, that address and port are right, and no firewall is between",
    Step.FILES: "correct the file; in the chart: management.tls",
    Step.ANSWER: "see what listens there: use the port of the REST API (4000 by default)",
    Step.HANDSHAKE: "give the authority that signed its certificate to --management-ca-file (value"
    " management.tls.caSecret), and use a name that is in the certificate",
}


def description(patient: Patient) -> Iterator[Finding]:
    """Look whether the description of the clusters can be read."""
    path = patient.clusters_file
    if path is None:
        return
    try:
        names = read_cluster_names(path, None)
    except InvalidDocument as unusable:
        for problem in unusable.problems:
            yield fault(Check.DESCRIPTION, f"{path}: {problem}", "a description of the clusters", "correct the file")
        return
    zones = sorted({*names.servers, *names.nodes})
    yield fine(Check.DESCRIPTION, f"{path} names {', '.join(zones) or 'no zone'}")


def managements(patient: Patient) -> Iterator[Finding]:
    """Look at every server of every management that the driver is given with credentials, all at once."""
    known = _known(patient)
    if not known:
        yield fine(Check.MANAGEMENT, "no management is configured: this role needs none")
        return
    looks = [_Server(patient, zone, settings, url) for zone, settings in known.items() for url in settings.servers]
    for look in looks:
        threading.Thread(target=look.run, name="look-server", daemon=True).start()
    deadline = Deadline.after(patient.timeout_s - 0.5)
    for look in looks:
        in_time = look.done.wait(deadline.remaining_s())
        yield from list(look.findings)
        if not in_time:
            yield unknown(
                Check.MANAGEMENT,
                f"{look.url} did not respond in time ({look.at})",
                "find out what hangs there, or raise --timeout",
            )


def _known(patient: Patient) -> Mapping[str, ManagementSettings]:
    if patient.management.servers:
        return {patient.clusters_defaults.zone: patient.management}
    if patient.clusters_file is None:
        return {}
    try:
        return parse_clusters(read_source(patient.clusters_file), patient.clusters_defaults).zones
    except InvalidDocument:
        return {}  # on a node it may be a copy without credentials; `description` tells what cannot be read


@dataclass(slots=True)
class _Server:
    """A look at one server in a thread of its own."""

    patient: Patient
    zone: str
    settings: ManagementSettings
    url: str
    findings: list[Finding] = field(default_factory=list)
    at: str = "not started"
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            for finding in self._look():
                self.findings.append(finding)
        finally:
            self.done.set()

    def _look(self) -> Iterator[Finding]:
        for told in self.settings.warnings():
            if self.url in told:
                yield warning(Check.CERTIFICATE, told, "verified https", "give a server by https, and its authority")
        self.at = "connecting"
        seen = check_connection(self.url, self.settings, timeout_s=_STEP_S)
        yield from _reached(self.url, seen, self.settings)
        if seen.failed is not None:
            return
        self.at = "logging in"
        yield from self._logged_in()

    def _logged_in(self) -> Iterator[Finding]:
        client = ManagementClient(replace(self.settings, servers=(self.url,)))
        deadline = Deadline.after(2 * _STEP_S)
        try:
            info = client.system_info(deadline=deadline)
            clients = client.clients(deadline=deadline)
        except Unauthenticated as error:
            yield fault(
                Check.LOGIN, str(error), "a login",
                "correct user and password in the Secret (value management.existingSecret), or in the management",
            )  # fmt: skip
            return
        except DriverError as error:
            yield fault(Check.LOGIN, str(error), "an answer after the login", "read the log of the management")
            return
        finally:
            client.close()
        yield fine(Check.LOGIN, f"{self.url} accepts the login; management {info.version}, API {info.api_version}")
        yield from judge_clients(self.patient, clients)


def _reached(url: str, seen: ConnectionCheck, settings: ManagementSettings) -> Iterator[Finding]:
    if seen.failed is not None:
        check = Check.CERTIFICATE if seen.failed in (Step.HANDSHAKE, Step.FILES) else Check.MANAGEMENT
        mend = "renew the server's certificate" if seen.is_expired else _MEND[seen.failed]
        at = f" at {', '.join(seen.addresses)}" if seen.addresses else ""
        judge = fault if len(settings.servers) == 1 or check is Check.CERTIFICATE else warning
        yield judge(check, f"{url}{at}: cannot {seen.failed}: {seen.reason}", "an answer of the management", mend)
        return
    yield fine(Check.MANAGEMENT, f"{url} answers at {', '.join(seen.addresses)}")
    now_s = time.time()
    if seen.valid_until_s is not None:
        left_s = seen.valid_until_s - now_s
        until = time.strftime("%Y-%m-%d", time.gmtime(seen.valid_until_s))
        if left_s < _SOON_S:
            yield warning(
                Check.CERTIFICATE, f"the certificate of {url} ends on {until}, in {left_s / _DAY_S:.0f} days",
                "30 days or more", "renew the server's certificate",
            )  # fmt: skip
        else:
            yield fine(Check.CERTIFICATE, f"the certificate of {url} is valid until {until}")
    if seen.date_s is not None and abs(seen.date_s - now_s) > _SKEW_S:
        yield warning(
            Check.CLOCK, f"the clock of {url} differs from this machine's by {seen.date_s - now_s:+.0f} s",
            f"less than {_SKEW_S:.0f} s", "have both kept by a time service",
        )  # fmt: skip


def judge_clients(patient: Patient, clients: Sequence[Client]) -> Iterator[Finding]:
    """Look whether this machine's client is known, and no two clients are taken for one."""
    for uuid, ids in _shared(clients):
        yield fault(
            Check.CLIENTS,
            f"the clients {', '.join(ids)} have one uuid, {uuid}: volumes are attached to either of them",
            "a uuid of its own for each machine",
            "these machines were cloned: reinstall the NVMesh client on all but one, so that it gets a new uuid",
        )
    own = StatusFiles(patient.status_directory).client().uuid
    if own is None:
        return
    found = next((client for client in clients if client.uuid == own), None)
    if found is None:
        yield warning(
            Check.CLIENTS,
            f"the management does not know this machine's client {own}",
            "it known there, in the zone that this node belongs to",
            "see that client and driver use the same management (client-management, zone)",
        )
    else:
        yield fine(Check.CLIENTS, f"this machine's client is {found.id} there, {found.status.name}")


def _shared(clients: Sequence[Client]) -> Iterator[tuple[str, list[str]]]:
    numbers = Counter(client.uuid for client in clients if client.uuid)
    for uuid in sorted(uuid for uuid, number in numbers.items() if number > 1):
        yield uuid, sorted(client.id for client in clients if client.uuid == uuid)


LOOKS = ((Check.DESCRIPTION, description), (Check.MANAGEMENT, managements))
