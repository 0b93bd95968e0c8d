# SPDX-License-Identifier: Apache-2.0
"""Refusals, output and cleanup of the demo."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.host.processes import Completed
from csi_driver.local import demo, demo_steps
from csi_driver.local.demo import SIGNALS, Interrupted, interrupt, prepare_directory
from csi_driver.local.demo_steps import Cleanup, Screen
from csi_driver.local.supervisor import why_impossible
from csi_driver.rpc.client import CallFailed
from tests.fakes.clock import FakeClock


def test_another_user_than_root_is_refused() -> None:
    assert "run it as root" in why_impossible((), effective_uid=1000)


@pytest.mark.parametrize(("tool", "package"), [("no-such-tool", "no-such-tool"), ("mkfs.ext4", "e2fsprogs")])
def test_a_missing_tool_is_named_with_its_package(tool: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.local.supervisor.find_tool", lambda name: None)
    assert why_impossible((tool,), effective_uid=0) == f"{tool} not found: install {package}"


def test_a_directory_that_is_not_empty_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(PreconditionFailed, match="is not empty"):
        prepare_directory(tmp_path)
    assert (tmp_path / "precious").read_text() == "data"


def test_an_empty_directory_is_not_new(tmp_path: Path) -> None:
    assert prepare_directory(tmp_path) == (tmp_path, False)
    assert prepare_directory(tmp_path / "a/b") == (tmp_path / "a/b", True)


def test_steps_are_undone_last_first() -> None:
    calls = list[str]()
    cleanup = Cleanup(FakeClock(), {name: partial(calls.append, name) for name in ("one", "two", "three")})
    cleanup.run()
    assert (cleanup.failures, calls) == ([], ["three", "two", "one"])


def failing(*codes: str) -> tuple[Cleanup, list[str]]:
    """Return a cleanup with one request that fails with these codes before it succeeds, and the codes left."""
    left = list(codes)

    def request() -> None:
        if left:
            raise CallFailed("DeleteVolume", left.pop(), "busy")

    return Cleanup(FakeClock(), {"it": request}), left


def test_undoing_waits_for_an_interrupted_step() -> None:
    cleanup, left = failing("ABORTED", "ABORTED")
    cleanup.run()
    assert (cleanup.failures, left) == ([], [])


def test_undoing_ends_when_its_time_is_up() -> None:
    cleanup, _ = failing(*["ABORTED"] * 1000)
    cleanup.run(timeout_s=30)
    assert cleanup.failures == ["it: DeleteVolume: ABORTED: busy"]
    assert 30 <= cleanup.clock.monotonic() < 31


def test_a_request_that_cannot_succeed_is_reported_and_not_retried() -> None:
    cleanup, _ = failing("FAILED_PRECONDITION")
    cleanup.run()
    assert cleanup.failures == ["it: DeleteVolume: FAILED_PRECONDITION: busy"]


def test_a_step_is_printed_with_its_duration() -> None:
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

    before = {each: signal.signal(each, interrupt) for each in SIGNALS}
    try:
        with pytest.raises(Interrupted):
            call()
        call()  # further signals are ignored
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("used", [{"filesystems": ["staging"]}, {"loopdevices": ["pool/volume.img (deleted)"]}])
@pytest.mark.parametrize("by_link", [False, True])
def test_files_stay_while_the_kernel_uses_the_directory(
    used: dict[str, list[str]], by_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "volume").mkdir(parents=True)
    link.symlink_to(real)

    def answer(argv: Sequence[str], **_: object) -> Completed:
        table = "filesystems" if argv[0] == "findmnt" else "loopdevices"
        paths = [f"{real}/{each}" for each in used.get(table, ())]
        rows = [{"target": path, "name": "loop7", "back-file": path} for path in paths]
        return Completed(0, json.dumps({table: rows}).encode(), "")

    monkeypatch.setattr(demo_steps, "run", answer)
    left = demo._sweep(link if by_link else real, is_new=False)
    assert len(left) == 2
    assert (real / "volume").is_dir()
