# SPDX-License-Identifier: Apache-2.0
"""Fault points: every effect of every port has two, and a plan triggers once."""

from __future__ import annotations

import inspect
import logging
import threading
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from csi_driver.errors import SystemCallFailed
from csi_driver.node import service
from csi_driver.node.node_info import NodeZone
from csi_driver.node.ports import Tools
from csi_driver.node_settings import NodeSettings
from csi_driver.reporting import Reporter
from tests import faults
from tests.fakes.node import FakeNode
from tests.faults import PORTS, Faults

DOCUMENT = Path(__file__).parents[2] / "docs" / "fault-points.md"


def port_protocols() -> dict[str, Any]:
    """Return the ports that `assemble` takes, by parameter."""
    hints = get_type_hints(service.assemble)
    del hints["return"]
    kinds = {name: next(k for k in getattr(hint, "__args__", (hint,))) for name, hint in hints.items()}
    return {name: kind for name, kind in kinds.items() if kind not in (NodeSettings, Tools, NodeZone, Reporter)}


def test_every_port_is_declared() -> None:
    assert set(PORTS) == set(port_protocols())


@pytest.mark.parametrize("name", PORTS)
def test_every_method_of_a_port_is_a_read_or_has_points(name: str) -> None:
    protocol = port_protocols()[name]
    methods = {name for name, _ in inspect.getmembers(protocol, callable) if not name.startswith("_")}
    declared = PORTS[name]
    assert methods == declared.reads | set(declared.effects)
    assert not declared.reads & set(declared.effects)


def test_the_document_shows_every_point_and_no_other() -> None:
    shown = {cell.strip("` ") for line in DOCUMENT.read_text().splitlines() for cell in line.split("|")[1:2]}
    assert {name for name in shown if "." in name} == {point.partition(":")[0] for point in faults.points()}


@pytest.fixture
def faulty(tmp_path: Path) -> Faults:
    return Faults(tmp_path)


def test_a_plan_triggers_once(faulty: Faults, tmp_path: Path) -> None:
    paths = faulty.wrap("paths", FakeNode().host.paths)
    (tmp_path / "plan").write_text("paths.make_directory:after fail")
    made = paths.check("/var/lib/kubelet/a", "target_path")
    with pytest.raises(SystemCallFailed):
        paths.make_directory(made)
    assert paths.kind(made) == "directory"
    paths.make_directory(made)


def test_a_failure_before_an_effect_prevents_it(faulty: Faults, tmp_path: Path) -> None:
    paths = faulty.wrap("paths", FakeNode().host.paths)
    (tmp_path / "plan").write_text("paths.make_directory:before fail")
    with pytest.raises(SystemCallFailed):
        paths.make_directory(Path("/var/lib/kubelet/a"))
    assert paths.kind(Path("/var/lib/kubelet/a")) == "absent"


def test_a_stall_ends_when_its_file_appears(faulty: Faults, tmp_path: Path) -> None:
    paths = faulty.wrap("paths", FakeNode().host.paths)
    (tmp_path / "plan").write_text(f"paths.make_directory:before stall {tmp_path / 'go'}")
    worker = threading.Thread(target=paths.make_directory, args=(Path("/var/lib/kubelet/a"),))
    worker.start()
    worker.join(0.05)
    assert worker.is_alive()
    (tmp_path / "go").touch()
    worker.join(10)
    assert not worker.is_alive()


def test_passed_points_are_traced(faulty: Faults, tmp_path: Path) -> None:
    (tmp_path / "trace").touch()
    faulty.wrap("paths", FakeNode().host.paths).make_directory(Path("/var/lib/kubelet/a"))
    assert (tmp_path / "trace").read_text().split() == ["paths.make_directory:before", "paths.make_directory:after"]


def test_an_effect_that_was_not_declared_cannot_be_reached(faulty: Faults) -> None:
    class Undeclared:
        def destroy(self) -> None: ...

    with pytest.raises(AttributeError, match="neither a read nor an effect"):
        faulty.wrap("paths", Undeclared()).destroy()


def test_the_injection_is_logged_as_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Faults(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR


def test_only_the_ports_of_a_composition_are_wrapped(faulty: Faults, tmp_path: Path) -> None:
    paths = FakeNode().host.paths
    composed: dict[str, Any] = faulty.compose(dict, paths=paths, settings="as it is")
    assert composed["settings"] == "as it is"
    (tmp_path / "plan").write_text("paths.make_directory:before fail")
    with pytest.raises(SystemCallFailed):
        composed["paths"].make_directory(Path("/var/lib/kubelet/a"))


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Faults(tmp_path / "absent")
