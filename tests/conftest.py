# SPDX-License-Identifier: Apache-2.0
"""Rules for every test: root, allowed processes, and a check that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
HOW_TO_RUN_WITH_DEVICE_MAPPER = "opens encrypted devices, and this kernel has no device-mapper; run: make test-vm"
HOW_TO_RUN_AS_ROOT = "makes loop devices and mounts; run as root: sudo make test"


# --- who may run ----------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Put the tools that the Makefile installs on PATH, for runs without make."""
    tools = HERE.parent / ".cache" / "bin"
    os.environ["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    # A run that is ended removes its mounts and loop devices, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root when this is not root, and what needs device-mapper where the kernel has none."""
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason=HOW_TO_RUN_AS_ROOT))
        if item.get_closest_marker("device_mapper") and not has_device_mapper():
            item.add_marker(pytest.mark.skip(reason=HOW_TO_RUN_WITH_DEVICE_MAPPER))


def has_device_mapper() -> bool:
    """Return whether this kernel can map devices: the node file alone may be there without it."""
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


# --- a unit test starts no process ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _unit_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a unit or property test that starts a process: it belongs to tests/contract or tests/integration."""
    quick = any(HERE / name in request.path.parents for name in ("unit", "property"))
    if not quick or request.node.get_closest_marker("tool"):
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a unit test started a process; it belongs to tests/contract or tests/integration", pytrace=True)

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    # A Popen that was never made is still deleted.
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda _: None)
    for name in ("system", "fork", "forkpty", "posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, refuse)


# --- a busy machine -------------------------------------------------------------------------------------------

# How long an example takes is no property of the program: the machine may have other work.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


# --- nothing is left behind -----------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run if a mount, a loop device or a process made under pytest's directory is still there at its end.

    Set up before every other fixture of the session, so it looks after all of them have cleaned up.
    """
    yield
    base = tmp_path_factory.getbasetemp()
    # The kernel gives a loop device back a moment after its last user is gone.
    settled_s = time.monotonic() + 60
    while (left := left_behind(base)) and time.monotonic() < settled_s:
        time.sleep(0.05)
    assert not left, "left behind by the tests:\n" + "\n".join(left)


def left_behind(base: Path) -> list[str]:
    """Return one line for each mount, loop device and process of ours that refers to `base`."""
    return [*left_mounts(base), *left_loop_devices(base), *left_processes(base)]


def left_mounts(base: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
        if Path(target).is_relative_to(base):
            yield f"mount {target}"


def left_loop_devices(base: Path) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text().strip()
        except OSError:
            continue  # released while we looked
        if Path(file.removesuffix(" (deleted)")).is_relative_to(base):
            yield f"loop device /dev/{backing.parts[3]} over {file}"


def left_processes(base: Path) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            arguments = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            directory = (process / "cwd").readlink()
        except OSError:
            continue  # ended while we looked, or is not ours
        if f"{base}/" in f"{arguments}/" or directory.is_relative_to(base):
            yield f"process {process.name}: {arguments}"
