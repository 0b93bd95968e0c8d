# SPDX-License-Identifier: Apache-2.0
"""The registration with kubelet, against a kubelet that speaks the published protocol, on real sockets."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, PreconditionFailed, StorageUnavailable
from csi_driver.node_settings import RegistrationSettings
from csi_driver.rpc import client as client_module
from csi_driver.rpc import registration as module
from csi_driver.rpc.client import SelfCheck
from csi_driver.rpc.registration import Registration
from tests.fakes.clock import FakeClock
from tests.fakes.kubelet import Kubelet, Plugin
from tests.unit.rpc.fakes import Endpoint, serving

NAME = "nvmesh-csi.example.com"


@dataclass
class Node:
    """A node service that answers, or not."""

    problem: DriverError | None = None

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem


@dataclass
class Scene:
    """A kubelet, its directory, an endpoint that is served, and what registers it."""

    kubelet: Kubelet
    directory: Path
    drafts: Path
    endpoint: Endpoint
    clock: FakeClock = field(default_factory=lambda: FakeClock(1000.0))
    node: Node = field(default_factory=Node)
    cleanup: ExitStack = field(default_factory=ExitStack)

    def registration(self, name: str = NAME) -> Registration:
        settings = RegistrationSettings(self.directory, name, self.endpoint.socket, self.drafts)
        made = Registration(settings, self.node.check, clock=self.clock, jitter=lambda: 1.0)
        self.cleanup.callback(made.close)
        return made

    def socket(self, name: str = NAME) -> Path:
        return self.directory / f"{name}-reg.sock"


@pytest.fixture
def scene(tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("r") / "plugins_registry"  # the path of a socket is short
    directory.mkdir()
    drafts = directory.parent / "own"
    drafts.mkdir()
    scene = Scene(Kubelet(directory), directory, drafts, endpoint)
    with scene.cleanup:
        yield scene


# --- registration -----------------------------------------------------------------------------------------------


def test_kubelet_finds_the_driver_and_its_node(scene: Scene) -> None:
    registration = scene.registration()
    assert registration.tend() == module.LOOK_S
    assert registration.why_not_registered() == "kubelet has not registered the driver yet"
    scene.kubelet.visit()
    assert scene.kubelet.told == ["registered"]
    assert scene.kubelet.nodes == {NAME: "node-1"}
    assert registration.is_registered


def test_the_registration_socket_is_private_and_the_only_file(scene: Scene) -> None:
    scene.registration().tend()
    assert stat.S_IMODE(scene.socket().stat().st_mode) == 0o600
    assert os.listdir(scene.directory) == [scene.socket().name]


def test_get_info_returns_name_endpoint_and_versions(scene: Scene) -> None:
    seen: list[Plugin] = []

    def look(plugin: Plugin) -> str:
        seen.append(plugin)
        return ""

    scene.kubelet.objection = look
    scene.registration().tend()
    scene.kubelet.visit()
    assert seen == [Plugin("CSIPlugin", NAME, str(scene.endpoint.socket), ("1.0.0",))]


def test_a_check_keeps_a_socket_in_place(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    before = scene.socket().stat()
    registration.tend()
    assert scene.socket().stat() == before


def test_nothing_is_registered_until_the_node_service_answers(scene: Scene) -> None:
    scene.node.problem = StorageUnavailable("the storage client does not show self_check yet")
    registration = scene.registration()
    registration.tend()
    assert not scene.socket().exists()
    assert "does not show self_check" in registration.why_not_registered()
    scene.node.problem = None
    registration.tend()
    scene.kubelet.visit()
    assert registration.is_registered


def test_a_silent_node_is_checked_less_often_and_not_restarted(scene: Scene) -> None:
    scene.node.problem = StorageUnavailable("no")
    registration = scene.registration()
    assert [registration.tend() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    scene.clock.now_s += 50
    registration.tend()
    assert registration.why_restart() == ""


def test_the_same_problem_is_logged_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.node.problem = StorageUnavailable("no")
    registration = scene.registration()
    for _ in range(5):
        registration.tend()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_socket_is_complete_when_kubelet_first_sees_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Path.rename

    def looked_at(draft: Path, target: Path) -> None:
        assert draft.is_socket()
        assert draft.parent == scene.drafts
        assert os.listdir(scene.directory) == []
        move(draft, target)
        scene.kubelet.visit()
        assert scene.kubelet.told == ["registered"]

    monkeypatch.setattr(Path, "rename", looked_at)
    scene.registration().tend()
    assert scene.kubelet.told == ["registered"]
    assert os.listdir(scene.drafts) == []


@pytest.mark.parametrize("objection", ["", "not now"])
def test_an_immediate_report_of_kubelet_is_kept(scene: Scene, monkeypatch: pytest.MonkeyPatch, objection: str) -> None:
    move = Path.rename

    def answered_at_once(draft: Path, target: Path) -> None:
        move(draft, target)
        scene.kubelet.visit()

    monkeypatch.setattr(Path, "rename", answered_at_once)
    scene.kubelet.objection = lambda plugin: objection
    registration = scene.registration()
    registration.tend()
    assert registration.is_registered is not bool(objection)
    inode = scene.socket().stat().st_ino
    scene.clock.now_s += module.FIRST_REFUSAL_S
    registration.tend()
    assert (scene.socket().stat().st_ino != inode) is bool(objection)


def test_a_draft_in_kubelets_directory_is_hidden(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Path.rename
    seen: list[str] = []

    def as_from_another_mount(draft: Path, target: Path) -> None:
        if draft.parent != target.parent:
            raise OSError(errno.EXDEV, "no")
        scene.kubelet.visit()
        seen.extend(os.listdir(scene.directory))
        move(draft, target)

    monkeypatch.setattr(Path, "rename", as_from_another_mount)
    registration = scene.registration()
    registration.tend()
    assert [name[0] for name in seen] == ["."]
    scene.kubelet.visit()
    assert registration.is_registered
    assert (os.listdir(scene.directory), os.listdir(scene.drafts)) == ([scene.socket().name], [])


def test_a_failed_rename_leaves_no_file(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(draft: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(Path, "rename", refused)
    registration = scene.registration()
    registration.tend()
    assert "ENOSPC" in registration.why_not_registered()
    assert (os.listdir(scene.directory), os.listdir(scene.drafts)) == ([], [])


# --- removed files ------------------------------------------------------------------------------------------------


def test_a_removed_socket_is_made_again(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    scene.socket().unlink()
    scene.kubelet.visit()
    assert scene.kubelet.nodes == {}
    registration.tend()
    assert not registration.is_registered
    scene.kubelet.visit()
    assert scene.kubelet.nodes == {NAME: "node-1"}
    assert registration.is_registered


def test_a_removed_directory_is_made_with_kubelets_mode(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    shutil.rmtree(scene.directory)
    scene.kubelet.visit()
    registration.tend()
    scene.kubelet.visit()
    assert registration.is_registered
    assert stat.S_IMODE(scene.directory.stat().st_mode) == 0o750


def test_a_replaced_directory_gets_a_socket(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    scene.directory.rename(scene.directory.with_name("old"))
    scene.directory.mkdir()
    registration.tend()
    scene.kubelet.visit()
    assert registration.is_registered


def test_a_missing_kubelet_directory_is_a_reason_to_restart(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    home = scene.directory.parent / "kubelet"
    settings = RegistrationSettings(home / "plugins_registry", NAME, scene.endpoint.socket, scene.drafts)
    lost = Registration(settings, scene.node.check, clock=scene.clock, jitter=lambda: 1.0)
    scene.cleanup.callback(lost.close)
    lost.tend()
    assert not home.exists()
    assert "ENOENT" in lost.why_not_registered()
    assert lost.why_restart() == ""
    scene.clock.now_s += module.OUT_OF_PLACE_S + 1
    lost.tend()
    assert "cannot be made" in lost.why_restart()
    scene.node.problem = StorageUnavailable("the storage client is gone, too")
    lost.tend()
    assert lost.why_restart() == ""
    scene.node.problem = None
    home.mkdir()
    lost.tend()
    assert lost.why_not_registered() == "kubelet has not registered the driver yet"


def test_a_restarted_kubelet_finds_the_driver(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    scene.kubelet.restart()
    assert scene.kubelet.told == ["registered", "registered"]
    assert registration.is_registered


def test_an_absent_kubelet_is_no_reason_to_restart(scene: Scene) -> None:
    registration = scene.registration()
    for _ in range(100):
        scene.clock.now_s += registration.tend() + 30
    assert registration.why_restart() == ""
    assert not registration.is_registered


# --- obstacles -----------------------------------------------------------------------------------------------------


def test_a_stale_registration_socket_is_replaced(scene: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(scene.socket()))
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    assert registration.is_registered


def test_a_socket_that_another_process_serves_is_kept(scene: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(scene.socket()))
        other.listen()
        inode = scene.socket().stat().st_ino
        registration = scene.registration()
        registration.tend()
        assert "another process serves" in registration.why_not_registered()
        assert scene.socket().stat().st_ino == inode
        scene.clock.now_s += 1000
        registration.tend()
        assert registration.why_restart() == ""
    registration.tend()
    scene.kubelet.visit()
    assert registration.is_registered


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_another_kind_of_file_is_kept(scene: Scene, kind: str) -> None:
    path = scene.socket()
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(scene.endpoint.socket)
    before = path.lstat()
    registration = scene.registration()
    registration.tend()
    assert path.lstat().st_ino == before.st_ino
    assert "expected a socket" in registration.why_not_registered()
    assert os.listdir(scene.directory) == [path.name]


def test_two_drivers_of_one_name_do_not_replace_each_others_socket(scene: Scene) -> None:
    first, second = scene.registration(), scene.registration()
    first.tend()
    inode = scene.socket().stat().st_ino
    for _ in range(3):
        second.tend()
        first.tend()
    assert scene.socket().stat().st_ino == inode
    first.close()
    second.tend()
    scene.kubelet.visit()
    assert second.is_registered


def test_drivers_of_different_names_are_both_registered(scene: Scene) -> None:
    names = ("a.example.com", "b.example.com")
    both = [scene.registration(name) for name in names]
    for each in both:
        each.tend()
    scene.kubelet.visit()
    assert set(scene.kubelet.nodes) == set(names)
    both[0].close()
    scene.kubelet.visit()
    assert set(scene.kubelet.nodes) == {names[1]}
    assert both[1].is_registered


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_refusal_is_logged_and_retried_less_often(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.kubelet.objection = lambda plugin: "the topology label has another value\x1b[2J"
    registration = scene.registration()
    registration.tend()
    pauses = []
    for _ in range(8):
        scene.kubelet.visit()
        assert "the topology label has another value" in registration.why_not_registered()
        inode, began_s = scene.socket().stat().st_ino, scene.clock.now_s
        while scene.socket().stat().st_ino == inode:
            scene.clock.now_s += 1
            registration.tend()
        pauses.append(scene.clock.now_s - began_s)
    assert pauses == [2, 4, 8, 16, 32, 64, 120, 120]
    refusals = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(refusals) == 8
    assert all("another value" in each and "\x1b" not in each for each in refusals)


def test_a_refusal_that_ends_is_forgotten(scene: Scene) -> None:
    scene.kubelet.objection = lambda plugin: "not now"
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    scene.kubelet.objection = lambda plugin: ""
    scene.kubelet.retry()
    assert registration.is_registered
    inode = scene.socket().stat().st_ino
    scene.clock.now_s += 1000
    registration.tend()
    assert scene.socket().stat().st_ino == inode
    assert registration.why_restart() == ""


def test_a_lasting_refusal_is_a_reason_to_restart(scene: Scene) -> None:
    scene.kubelet.objection = lambda plugin: "never"
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    scene.clock.now_s += module.REFUSED_S - 1
    registration.tend()
    scene.kubelet.visit()
    assert registration.why_restart() == ""
    scene.clock.now_s += 2
    registration.tend()
    assert "never" in registration.why_restart()


def test_a_lasting_unexpected_error_is_a_reason_to_restart(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    registration = scene.registration()
    with monkeypatch.context() as patched:
        patched.setattr(Registration, "_look", no_threads)
        assert registration.loop.run_once() == module.LONGEST_PAUSE_S
        scene.clock.now_s += module.STALLED_S - 1
        assert registration.why_restart() == ""
        scene.clock.now_s += 2
        assert "can't start new thread" in registration.why_restart()
    registration.loop.run_once()
    assert registration.why_restart() == ""


# --- closing ----------------------------------------------------------------------------------------------------


def test_closing_removes_the_socket(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    scene.kubelet.visit()
    registration.close()
    assert os.listdir(scene.directory) == []
    scene.kubelet.visit()
    assert scene.kubelet.nodes == {}


def test_closing_keeps_the_socket_of_a_successor(scene: Scene) -> None:
    registration = scene.registration()
    registration.tend()
    scene.socket().unlink()
    successor = scene.registration()
    successor.tend()
    registration.close()
    scene.kubelet.visit()
    assert scene.kubelet.told == ["registered"]
    assert successor.is_registered


def test_no_socket_is_made_after_closing(scene: Scene) -> None:
    registration = scene.registration()
    registration.close()
    registration.tend()
    assert os.listdir(scene.directory) == []


def test_the_loop_registers_the_driver(scene: Scene) -> None:
    asked = SelfCheck(scene.endpoint.socket)
    settings = RegistrationSettings(scene.directory, NAME, scene.endpoint.socket, scene.drafts)

    def is_known() -> bool:
        return NAME in scene.kubelet.visit()

    with Registration(settings, asked.check_node):
        assert Deadline.after(30).wait_until(is_known)
        scene.socket().unlink()
        scene.kubelet.visit()
        assert Deadline.after(30).wait_until(is_known)
    assert os.listdir(scene.directory) == []


# --- self-check ------------------------------------------------------------------------------------------------------


def test_a_missing_endpoint_fails_the_check_of_the_node(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="UNAVAILABLE"):
        SelfCheck(tmp_path / "none.sock").check_node()


def lacks_a_tool() -> bool:
    raise PreconditionFailed("mkfs.ext4 is missing")


def has_a_bug() -> bool:
    raise RuntimeError("x")


@pytest.mark.parametrize(
    ("answer", "why_silent", "why_not_ready"),
    [
        (lambda: True, "", ""),
        (lambda: False, "", "still starting"),
        (lacks_a_tool, "", "mkfs.ext4 is missing"),
        (has_a_bug, "INTERNAL", "INTERNAL"),
    ],
)
def test_an_endpoint_that_answers_is_healthy(
    tmp_path: Path, answer: Callable[[], bool], why_silent: str, why_not_ready: str
) -> None:
    self_check = SelfCheck(tmp_path / "csi.sock")
    with serving(tmp_path / "csi.sock", is_ready=answer):
        silent, not_ready = self_check.why_silent(), self_check.why_not_ready()
    assert (why_silent in silent, bool(silent)) == (True, bool(why_silent))
    assert (why_not_ready in not_ready, bool(not_ready)) == (True, bool(why_not_ready))
    assert "UNAVAILABLE" in self_check.why_silent()


def test_an_endpoint_that_hangs_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SELF_PROBE_TIMEOUT_S", 0.3)
    held = threading.Event()

    def hangs() -> bool:
        return held.wait(60)

    with serving(tmp_path / "csi.sock", is_ready=hangs):
        assert "DEADLINE_EXCEEDED" in SelfCheck(tmp_path / "csi.sock").why_silent()
        held.set()
