# SPDX-License-Identifier: Apache-2.0
"""The registration with kubelet in directories that are mounted here, as a container has them, and at a real kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.node_settings import RegistrationSettings
from csi_driver.rpc import registration as module
from csi_driver.rpc.registration import Registration
from tests.fakes.kubelet import Kubelet

NAME = "nvmesh-csi.example.com"


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of kubelet's, and see to one in a container where it is mounted."""
    home = tmp_path_factory.mktemp("k")  # the path of a socket is short
    (home / "host" / "reg").mkdir(parents=True)
    (home / "here").mkdir()
    return home


def no_problem() -> None:
    """Answer as a node service that works."""


def registration(directory: Path, drafts: Path) -> Registration:
    return Registration(RegistrationSettings(directory, NAME, Path("/csi.sock"), drafts), no_problem)


@pytest.mark.root
def test_a_replaced_directory_below_the_mount_is_found(home: Path) -> None:
    with bound(home / "host", home / "here"):
        made = registration(home / "here" / "reg", home / "here")
        made.tend()
        assert (home / "host" / "reg" / f"{NAME}-reg.sock").is_socket()
        (home / "host" / "reg").rename(home / "host" / "old")
        (home / "host" / "reg").mkdir()
        made.tend()
        assert (home / "host" / "reg" / f"{NAME}-reg.sock").is_socket()
        made.close()
        assert os.listdir(home / "host" / "reg") == []


@pytest.mark.root
def test_a_replaced_mounted_directory_needs_a_new_container(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUT_OF_PLACE_S", 0.0)
    with bound(home / "host" / "reg", home / "here"):
        made = registration(home / "here", home)
        made.tend()
        (home / "host" / "reg" / f"{NAME}-reg.sock").unlink()
        (home / "host" / "reg").rmdir()
        (home / "host" / "reg").mkdir()
        made.tend()
        made.tend()
        assert "restart the container" in made.why_not_registered()
        assert "restart the container" in made.why_restart()
        made.close()


def has_registered(kubelet: Kubelet, times: int) -> bool:
    kubelet.visit()
    return len(kubelet.told) == times


@pytest.mark.root
def test_a_killed_node_is_registered_at_its_next_start(home: Path) -> None:
    kubelet = Kubelet(home / "host" / "reg")
    argv = [
        sys.executable, "-m", "csi_driver", "node", "--endpoint", str(home / "csi.sock"), "--state-directory",
        str(home / "state"), "--path-root", str(home), "--device-directory", str(home / "dev"), "--status-directory",
        str(home / "proc"), "--node-name", "node-1", "--driver-name", NAME,
        "--kubelet-registration-directory", str(kubelet.directory),
    ]  # fmt: skip
    for life, (number, status) in enumerate([(signal.SIGKILL, -9), (signal.SIGKILL, -9), (signal.SIGTERM, 0)], 1):
        with (home / "log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
            try:
                assert Deadline.after(60).wait_until(partial(has_registered, kubelet, life)), (home / "log").read_text()
            finally:
                process.send_signal(number)
                assert process.wait(60) == status
    assert kubelet.told == ["registered"] * 3
    assert kubelet.visit() == {}
