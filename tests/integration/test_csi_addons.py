# SPDX-License-Identifier: Apache-2.0
"""CSI-Addons on the real processes: a controller and a node with --csi-addons-endpoint, called as the sidecar calls."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
from tests.addons_client import Sidecar, sidecar
from tests.integration.rig import MIB, PROGRAM, REPOSITORY, Rig, filesystem, wait_for

pytestmark = pytest.mark.root


@contextlib.contextmanager
def beside(rig: Rig, role: str, kubelet: Path) -> Iterator[Sidecar]:
    """Run another process of a role with the flags of the rig's, and connect to its endpoint of CSI-Addons."""
    sockets = [rig.directory / f"{role}-{name}.sock" for name in ("other", "addons")]
    own = (f"--endpoint=unix://{sockets[0]}", f"--csi-addons-endpoint=unix://{sockets[1]}")
    words = rig.role_argv(role)
    for name in ("--endpoint", "--http-listen", "--kubelet-registration-directory", "--kubelet-endpoint"):
        words = without(words, name)
    process = subprocess.Popen([*PROGRAM, *words, *own], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    rig.others.append(process)
    wait_for(lambda: sockets[1].exists() or process.poll() is not None, "the endpoint of CSI-Addons")
    with sidecar(sockets[1], kubelet=kubelet) as client:
        yield client
    process.terminate()
    assert process.wait(120) == 0
    assert not any(path.exists() for path in sockets)


def without(words: list[str], flag: str) -> list[str]:
    kept: list[str] = []
    is_value = False
    for word in words:
        if not is_value and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        is_value = word == flag
    return kept


def taken(file: Path) -> int:
    os.sync()
    return file.stat().st_blocks * 512


def test_space_of_a_volume_is_given_back_while_it_is_in_use_and_when_it_is_not(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    driver = rig.node.plugin_name()
    unique = hashlib.sha256(volume.id.encode()).hexdigest()
    staging = volume.paths / "plugins/kubernetes.io/csi" / driver / unique / "globalmount"
    staging.mkdir(parents=True)
    volume.attach()
    file = volume.file
    rig.node.stage(volume.id, staging, volume.capability, publish_context=volume.publish_context)
    (staging / "removed").write_bytes(os.urandom(40 * MIB))
    (staging / "kept").write_bytes(b"kept")
    (staging / "zeros").write_bytes(bytes(30 * MIB))
    before = taken(file)
    (staging / "removed").unlink()
    subprocess.run(["sync", "-f", staging], check=True)

    with beside(rig, "node", volume.paths) as node:
        assert node.start() == (driver, {"NODE_SERVICE", "ONLINE", "ENCRYPTIONKEYROTATION"})
        node.trim(driver, volume.id)
        assert taken(file) <= before - 38 * MIB

    with beside(rig, "controller", volume.paths) as controller:
        name, capabilities = controller.start()
        assert name == driver
        if "OFFLINE" not in capabilities:
            pytest.skip("the filesystem of the test's directory gives back no part of a file")
        assert controller.sparsify(volume.id, volume.context) == (0, 0)  # in use
        rig.node.unstage(volume.id, staging)
        volume.detach()
        used, left = controller.sparsify(volume.id, volume.context)
        assert left <= used - 28 * MIB

    volume.attach()
    rig.node.stage(volume.id, staging, volume.capability, publish_context=volume.publish_context)
    assert (staging / "kept").read_bytes() == b"kept"
    assert (staging / "zeros").read_bytes() == bytes(30 * MIB)
    rig.node.unstage(volume.id, staging)
    volume.detach()


def test_without_the_flag_nothing_of_it_is_served(rig: Rig) -> None:
    for socket in ("controller.sock", "node.sock"):
        with sidecar(rig.directory / socket) as client, pytest.raises(CallFailed) as failed:
            client.start()
        assert failed.value.code == "UNIMPLEMENTED"
