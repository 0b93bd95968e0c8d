# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi local` and `nvmesh-csi demo` as programs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.rig import (
    MIB,
    PROGRAM,
    REPOSITORY,
    Rig,
    digest,
    filesystem,
    fill,
    loops_over,
    mounts_below,
    processes_of,
    running,
    scrub,
    wait_for,
)

pytestmark = pytest.mark.root


def run(*argv: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [*PROGRAM, *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_each_role_has_a_pid_file_and_a_log(fresh_rig: Rig) -> None:
    for role in ("storage", "controller", "node"):
        assert Path(f"/proc/{fresh_rig.pid(role)}").exists()
        assert (fresh_rig.directory / f"{role}.log").exists()


def test_a_role_that_is_killed_is_reported_and_serves_again(fresh_rig: Rig) -> None:
    fresh_rig.kill("controller")
    assert fresh_rig.controller.plugin_name()
    assert "controller (process" in fresh_rig.log.read_text()
    assert "was killed by signal 9" in fresh_rig.log.read_text()


def test_a_role_that_keeps_exiting_ends_the_run_with_a_message(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("die") / "d", "--restart-limit", "0") as rig:
        os.kill(rig.pid("node"), signal.SIGKILL)
        assert rig.process is not None
        assert rig.process.wait(60) == 1
        assert "node exited 1 times" in rig.log.read_text()
        assert processes_of(rig.directory) == []


def test_a_stop_ends_every_process_and_removes_pid_files_and_sockets(fresh_rig: Rig) -> None:
    assert fresh_rig.stop() == 0
    assert processes_of(fresh_rig.directory) == []
    assert [*fresh_rig.directory.glob("*.pid"), *fresh_rig.directory.glob("*.sock")] == []


def test_volumes_and_their_data_survive_a_restart(fresh_rig: Rig) -> None:
    volume = fresh_rig.volume(filesystem())
    wanted = fill(volume.up() / "data", MIB)
    fresh_rig.restart()
    assert digest(volume.target / "data", MIB) == wanted
    volume.down()
    fresh_rig.restart()
    volume.up()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_volumes_survive_a_kill_of_all_processes(fresh_rig: Rig) -> None:
    volume = fresh_rig.volume(filesystem())
    wanted = fill(volume.up() / "data", MIB)
    assert fresh_rig.process is not None
    fresh_rig.process.kill()
    fresh_rig.process.wait()
    wait_for(lambda: processes_of(fresh_rig.directory) == [], "the roles to die with it")
    fresh_rig.start()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


@pytest.mark.parametrize("role", ["storage", "controller", "node"])
def test_a_kill_during_the_start_leaves_no_process(tmp_path: Path, role: str) -> None:
    directory = tmp_path / "d"
    starting = subprocess.Popen(
        [*PROGRAM, "local", "--directory", str(directory)], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    wait_for((directory / f"{role}.pid").exists, f"{role} to be started")
    starting.kill()
    starting.wait()
    wait_for(lambda: processes_of(directory) == [], "the roles to die with it")


def test_a_second_start_on_the_same_directory_is_refused_and_harms_nothing(fresh_rig: Rig) -> None:
    second = run("local", "--directory", str(fresh_rig.directory))
    assert second.returncode == 1
    assert "is in use by another" in second.stderr
    assert second.stderr.count("\n") == 1
    assert fresh_rig.controller.plugin_name()


def test_two_runs_do_not_disturb_each_other(fresh_rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("side") / "d") as other:
        mine, theirs = fresh_rig.volume(filesystem()), other.volume(filesystem())
        wanted = fill(mine.up() / "data", MIB)
        theirs.up()
        assert digest(mine.target / "data", MIB) == wanted
        assert len(list(fresh_rig.controller.volumes())) == len(list(other.controller.volumes())) == 1
        theirs.end()
        mine.end()


def test_a_directory_too_long_for_a_socket_is_refused_with_the_limit(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    refused = run("local", "--directory", str(directory))
    assert refused.returncode == 1
    assert "expected a path of at most" in refused.stderr
    assert not directory.exists()


def test_a_directory_with_spaces_and_other_letters_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("odd") / "a b%20 ü") as rig:
        volume = rig.volume(filesystem())
        volume.up()
        volume.end()


def test_another_user_than_root_gets_one_line() -> None:
    refused = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *PROGRAM, "local", "--directory", "/tmp/not-root"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "run it as root" in refused.stderr


# --- the demo ---------------------------------------------------------------------------------------------------


def nothing_left(directory: Path) -> bool:
    """Return whether the kernel and the file system hold nothing of a demo."""
    return not (mounts_below(directory) or loops_over(directory) or processes_of(directory) or directory.exists())


def test_the_demo_shows_every_step_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("demo") / "d"
    shown = run("demo", "--directory", str(directory))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for step in (
        "CreateVolume",
        "ControllerPublishVolume",
        "NodeStageVolume",
        "NodePublishVolume",
        "ControllerExpandVolume",
        "NodeExpandVolume",
        "NodeGetVolumeStats",
        "NodeUnpublishVolume",
        "NodeUnstageVolume",
        "ControllerUnpublishVolume",
        "DeleteVolume",
        "clean: no mount, loop device, process or file is left",
    ):
        assert step in shown.stdout
    assert nothing_left(directory)


@pytest.mark.parametrize("after", ["CreateVolume", "NodeStageVolume", "NodeExpandVolume"])
def test_a_demo_that_is_interrupted_cleans_up(tmp_path_factory: pytest.TempPathFactory, after: str) -> None:
    directory = tmp_path_factory.mktemp("int") / "d"
    argv = [*PROGRAM, "demo", "--directory", str(directory), "--fs-type", "ext4"]
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if f"s  {after}" in line:
                    os.killpg(process.pid, signal.SIGINT)
                    break
            lines += list(process.stdout)
            assert process.wait(60) == 130, "".join(lines)
            assert nothing_left(directory), "".join(lines)
        finally:
            process.kill()
            process.wait()
            scrub(directory)


def test_a_demo_interrupted_while_it_starts_cleans_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("int") / "d"
    process = subprocess.Popen(
        [*PROGRAM, "demo", "--directory", str(directory)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for((directory / "storage.pid").exists, "storage to be started")
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 130
    assert nothing_left(directory)
