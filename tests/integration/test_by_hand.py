# SPDX-License-Identifier: Apache-2.0
"""What an administrator allows by hand, and volumes that the storage encrypts: the real processes, end to end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from csi_driver.host.luks import LuksFiles
from csi_driver.rpc.client import CallFailed
from tests.integration.rig import GIB, MIB, PROGRAM, REPOSITORY, Rig, Volume, digest, filesystem, fill, mounts_below

pytestmark = pytest.mark.root

PASSPHRASE = "correct horse battery staple"


def by_hand(rig: Rig, action: str, volume_id: str) -> subprocess.CompletedProcess[str]:
    """Run `nvmesh-csi volume` with the flags that the rig's controller has."""
    words = rig.role_argv("controller")
    flags = []
    for index, word in enumerate(words):
        if word.startswith("--management-"):
            flags += [word] if "=" in word else [word, words[index + 1]]
    argv = [*PROGRAM, "volume", action, volume_id, *flags]
    return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def file_of(rig: Rig, volume_id: str) -> Path:
    uuid = volume_id.split(":")[2]
    (found,) = rig.directory.rglob(f"{uuid}.img")
    return found


def put_old_data(volume: Volume) -> None:
    """Leave a filesystem of somebody else's in the volume, as space that is given out again may show."""
    subprocess.run(["mkfs.ext4", "-q", "-F", str(file_of(volume.rig, volume.id))], check=True)


def test_old_data_is_formatted_over_once_it_is_allowed_and_never_again(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    put_old_data(volume)
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    assert "detach it first" in by_hand(rig, "allow-format", volume.id).stderr
    volume.detach()
    allowed = by_hand(rig, "allow-format", volume.id)
    assert (allowed.returncode, allowed.stdout[:28]) == (0, "allowed the next attachment "), allowed.stderr
    assert "allowed over old data" in by_hand(rig, "show", volume.id).stdout

    wanted = fill(volume.up() / "data", MIB)
    volume.unpublish()
    volume.unstage()
    volume.attach()  # the same attachment, and so the same permission
    assert volume.publish_context["formatAllowed"] == "true"
    volume.stage()
    volume.publish()
    assert digest(volume.target / "data", MIB) == wanted
    volume.down()

    volume.attach()
    assert "formatAllowed" not in volume.publish_context
    volume.stage()
    volume.publish()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


@pytest.mark.skipif(not LuksFiles.are_possible(), reason="needs cryptsetup: `make test` as root installs it")
def test_a_volume_that_the_storage_encrypts_lives_its_life_up_to_the_node(rig: Rig) -> None:
    secrets = {"passphrase": PASSPHRASE}
    arguments = {"required_bytes": GIB, "limit_bytes": GIB, "capabilities": [filesystem("ext4")]}
    with pytest.raises(CallFailed, match="passphrase"):
        rig.controller.create_volume("test-native", parameters={"encryption": "native"}, **arguments)  # type: ignore[arg-type]
    created = rig.controller.create_volume(
        "test-native",
        parameters={"encryption": "native"},
        secrets=secrets,
        **arguments,  # type: ignore[arg-type]
    )
    file = file_of(rig, created.volume_id)
    assert (created.capacity_bytes, file.stat().st_size) == (GIB, GIB + 16 * MIB)
    tried = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file=-", file], input=PASSPHRASE.encode(), check=False
    )
    assert tried.returncode == 0

    context = rig.controller.attach(created.volume_id, rig.node_id(), filesystem("ext4"), read_only=False)
    assert context["encryption"] == "native"
    assert rig.controller.expand_volume(created.volume_id, 2 * GIB, capability=filesystem("ext4")) == (2 * GIB, True)
    assert file.stat().st_size == 2 * GIB + 16 * MIB
    rig.controller.detach(created.volume_id, rig.node_id())
    rig.controller.delete_volume(created.volume_id)
    assert not file.exists()
    assert mounts_below(rig.directory) == []

    said = b"".join(path.read_bytes() for path in [rig.log, *rig.directory.glob("*.log")])
    kept = b"".join(path.read_bytes() for path in rig.directory.rglob("manager.sqlite*"))
    assert b"CreateVolume" in said
    assert PASSPHRASE.encode() not in said + kept
