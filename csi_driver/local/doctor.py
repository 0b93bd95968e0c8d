"""`nvmesh-csi doctor`: checks the machine and what the driver needs, and prints each problem with its fix.

It changes nothing. Every check has a thread of its own, so one that hangs delays no other. All have the same deadline;
a check that has not finished by then is reported as skipped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.local.doctor_findings import Check, Finding, document, is_bad, table, unknown
from csi_driver.local.doctor_settings import DoctorSettings, Patient

_LOG = logging.getLogger(__name__)

NODE, CONTROLLER = "node", "controller"

Look = Callable[[Patient], Iterable[Finding]]


def looks(role: str) -> Sequence[tuple[Check, Look]]:
    """Return what is looked at in a role, each with the check that stands for it where it does not end."""
    from csi_driver.local import (
        doctor_client,
        doctor_driver,
        doctor_kubernetes,
        doctor_machine,
        doctor_management,
        doctor_places,
        doctor_volumes,
    )

    management = doctor_management.LOOKS
    if role == CONTROLLER:
        return (*management, *doctor_driver.CONTROLLER_LOOKS, *doctor_machine.ANY_LOOKS)
    return (
        *doctor_machine.LOOKS, *doctor_places.LOOKS, *doctor_client.LOOKS, *management, *doctor_driver.LOOKS,
        *doctor_kubernetes.LOOKS, *doctor_volumes.LOOKS,
    )  # fmt: skip


def run_doctor(settings: DoctorSettings, write: Callable[[str], None] = print) -> int:
    """Make all checks and print the findings. Exit status: 1 when a check fails, else 0."""
    patient = settings.patient
    deadline = Deadline.after(patient.timeout_s)
    findings = examine(looks(patient.role), patient, deadline)
    if settings.json:
        write(document(patient.driver_name, patient.node_name, findings))
    else:
        for line in table(_title(patient), findings, deadline.elapsed_s()):
            write(line)
    return int(is_bad(findings, strict=settings.strict))


def _title(patient: Patient) -> str:
    running = patient.running
    of = f", with the settings of process {running.pid} ({running.role})" if running is not None else ""
    where = f"node {patient.node_name}" if patient.role == NODE else patient.role
    return f"driver {patient.driver_name}, {where}{of}"


# --- looking --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """One look in its thread. `findings` grow while it lasts."""

    check: Check
    look: Look
    patient: Patient
    findings: list[Finding] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    has_ended: bool = False

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"look-{self.check}", daemon=True).start()

    def _run(self) -> None:
        try:
            for finding in self.look(self.patient):
                self.findings.append(finding)
            self.has_ended = True
        except (DriverError, OSError) as error:
            self.findings.append(unknown(self.check, str(error)))
            self.has_ended = True
        finally:
            self.done.set()

    def found(self, deadline: Deadline) -> list[Finding]:
        """Return what was found, and that more may be where the look did not end."""
        in_time = self.done.wait(deadline.remaining_s())
        found = list(self.findings)
        if not in_time:
            found.append(
                unknown(
                    self.check,
                    f"no result within {deadline.elapsed_s():.0f} s",
                    "find out what hangs, or raise --timeout",
                )
            )
        elif not self.has_ended:  # its traceback was printed
            found.append(unknown(self.check, "the check failed by an error of this program; see its traceback"))
        return found


def examine(chosen: Sequence[tuple[Check, Look]], patient: Patient, deadline: Deadline) -> list[Finding]:
    """Look at everything at once; return what was found until the deadline."""
    runs = [_Run(check, look, patient) for check, look in chosen]
    for run in runs:
        run.start()
    return [finding for run in runs for finding in run.found(deadline)]
