"""What the demo refuses, shows and takes back; the machine's programs are small working models."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from csi_driver.local.demo import Demo, Interrupted, interruptible, missing
from csi_driver.local.life import Undo
from csi_driver.local.settings import DemoSettings
from csi_driver.local.show import Kernel, Screen
from csi_driver.local.stack import Process
from csi_driver.rpc.client import CallFailed


@dataclass
class FakeOutput:
    status: int
    stdout: bytes


@dataclass
class FakeCommands:
    """A machine on which `absent` programs are missing; `outputs` by program."""

    absent: frozenset[str] = frozenset()
    outputs: dict[str, FakeOutput] = field(default_factory=dict)

    def run(self, argv: Sequence[str], *, timeout_s: float, accept: Collection[int] = (0,)) -> FakeOutput:
        output = self.outputs.get(argv[0], FakeOutput(1, b""))
        assert output.status in accept
        return output

    def find_tool(self, program: str) -> str | None:
        return None if program in self.absent else f"/usr/bin/{program}"

    def package_of(self, program: str) -> str:
        return {"mkfs.ext4": "e2fsprogs", "blkid": "util-linux"}.get(program, "")


class NoProcesses:
    """A machine on which nothing may be started."""

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> Process:
        raise AssertionError(f"started {argv}")


@dataclass
class FakeClock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def demo(settings: DemoSettings, *, uid: int = 0, commands: FakeCommands | None = None) -> tuple[int, list[str]]:
    lines: list[str] = []
    one = Demo(
        settings,
        NoProcesses(),
        commands or FakeCommands(),
        write=lines.append,
        problems=tuple,
        effective_uid=lambda: uid,
    )
    return one.run(), lines


def test_someone_who_is_not_root_is_told_to_become_root_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(DemoSettings(), uid=1000) == (1, [])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_tool_is_named_with_its_package(capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = demo(DemoSettings(), commands=FakeCommands(absent=frozenset({"mkfs.ext4"})))
    assert (status, capsys.readouterr().err) == (1, "nvmesh-csi demo: mkfs.ext4 not found: install e2fsprogs\n")


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("data")
    status, _ = demo(DemoSettings(directory=tmp_path))
    assert (status, (tmp_path / "precious").read_text()) == (1, "data")
    assert "is not empty" in capsys.readouterr().err


def test_nothing_is_missing_for_root_with_all_tools() -> None:
    assert missing(FakeCommands(), ("lsblk",), 0, tuple) is None


def test_what_the_machine_itself_lacks_is_said_before_anything_is_started() -> None:
    said = missing(FakeCommands(), ("lsblk",), 0, lambda: ["no capability", "no /sys"])
    assert said == "no capability; no /sys"


def test_mounts_are_found_by_whole_path_elements() -> None:
    text = b'{"filesystems": [{"target": "/a/d"}, {"target": "/a/d/x"}, {"target": "/a/dog"}, {"target": "/"}]}'
    kernel = Kernel(FakeCommands(outputs={"findmnt": FakeOutput(0, text)}))
    assert kernel.mounts_below(Path("/a/d")) == ["/a/d", "/a/d/x"]


def test_loop_devices_over_deleted_files_are_found() -> None:
    rows = [{"name": "/dev/loop0", "back-file": "/a/d/v (deleted)"}, {"name": "/dev/loop1", "back-file": None}]
    text = json.dumps({"loopdevices": rows}).encode()
    kernel = Kernel(FakeCommands(outputs={"losetup": FakeOutput(0, text)}))
    assert kernel.loop_devices_over(Path("/a/d")) == ["/dev/loop0"]


def test_a_machine_without_loop_devices_has_none() -> None:
    assert Kernel(FakeCommands(outputs={"losetup": FakeOutput(0, b"")})).loop_devices_over(Path("/a")) == []


def test_steps_are_taken_back_last_first() -> None:
    undo, calls = Undo(FakeClock()), list[str]()
    for name in ("one", "two", "three"):
        undo.note(name, partial(calls.append, name))
    undo.forget("two")
    assert (undo.run(), calls) == ([], ["three", "one"])


def test_taking_back_waits_for_the_interrupted_step() -> None:
    answers = ["ABORTED", "ABORTED"]

    def call() -> None:
        if answers:
            raise CallFailed("NodeUnstageVolume", answers.pop(), "busy")

    undo = Undo(FakeClock())
    undo.note("it", call)
    assert (undo.run(), answers) == ([], [])


def test_taking_back_gives_up_when_its_time_is_over() -> None:
    def call() -> None:
        raise CallFailed("NodeUnstageVolume", "ABORTED", "busy")

    clock = FakeClock()
    undo = Undo(clock)
    undo.note("it", call)
    assert undo.run(timeout_s=30) == ["it: NodeUnstageVolume: ABORTED: busy"]
    assert 30 <= clock.now < 31


def test_what_cannot_be_taken_back_is_said() -> None:
    def call() -> None:
        raise CallFailed("DeleteVolume", "FAILED_PRECONDITION", "in use")

    undo = Undo(FakeClock())
    undo.note("volume", call)
    assert undo.run() == ["volume: DeleteVolume: FAILED_PRECONDITION: in use"]


def test_a_step_shows_its_time() -> None:
    lines: list[str] = []
    times = iter([1.0, 1.25])
    with Screen(lines.append, lambda: next(times)).step("NodeStageVolume") as words:
        words.append("done")
    assert lines == ["   0.250 s  NodeStageVolume           done"]


def test_an_interruption_passes_through_code_that_catches_every_exception() -> None:
    def call() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception:  # noqa: BLE001  # as gRPC does
            pytest.fail("the interruption was swallowed")

    with interruptible(), pytest.raises(Interrupted):
        call()
