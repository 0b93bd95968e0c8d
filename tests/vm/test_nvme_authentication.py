# SPDX-License-Identifier: Apache-2.0
"""Volumes over NVMe/TCP between a node and a manager that prove their keys to each other (DH-HMAC-CHAP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.nvme_model import host_nqn, host_uuid, new_dhchap_key, split_path
from csi_driver.rpc.client import CallFailed
from tests.contract.raw_nvme_host import RawHost
from tests.integration.rig import MIB, digest, fill, raw_block, wait_for
from tests.reflink_pool import XFS, mounted
from tests.vm import nvme_rig
from tests.vm.nvme_rig import NODE, NvmeRig, controllers

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

_HOST = Path("/sys/kernel/config/nvmet/hosts") / host_nqn(NODE)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmeRig]:
    nvme_rig.load_modules()
    with mounted(tmp_path_factory.mktemp("a"), XFS, size_mib=1024) as place:
        token, url = place / "token", "http://127.0.0.1:4001"
        token.write_text("a token that only nodes of this cluster have\n")
        rig = NvmeRig(
            place / "d",
            port=4001,
            storage_flags=("--auth", "required", "--join-token-file", str(token)),
            node_flags=("--nvme-register-url", url, "--nvme-join-token-file", str(token)),
        )
        try:
            rig.start()
            wait_for((place / "d/pool/keys" / f"{host_uuid(NODE)}.json").exists, "the node to register its key")
            yield rig
        finally:
            print(rig.logs())
            rig.close()


def keys() -> list[str]:
    """Return the secrets that the target has for the node and for itself."""
    return [nvme_rig.read(_HOST / name) for name in ("dhchap_key", "dhchap_ctrl_key")]


def test_a_node_registers_by_itself_and_connects_with_its_key(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.attach()
    assert all(key.startswith("DHHC-1:") for key in keys())
    volume.stage()
    written = fill(volume.publish(), 4 * MIB)
    rig.kill("storage")
    rig.kill("node")
    volume.stage()
    assert digest(volume.publish(), 4 * MIB) == written
    nqn = volume.publish_context["nvme.nqn"]
    (name,) = controllers(nqn)
    assert nvme_rig.read(Path("/sys/class/nvme") / name / "dhchap_secret").startswith("DHHC-1:")
    volume.end()


def test_a_host_without_the_key_is_refused(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.attach()
    nqn = volume.publish_context["nvme.nqn"]
    address, port = split_path(volume.publish_context["nvme.paths"])
    with pytest.raises(OSError, match="status"):
        RawHost(address, int(port), nqn, host_nqn(NODE))
    options = f"transport=tcp,traddr={address},trsvcid={port},nqn={nqn},hostnqn={host_nqn(NODE)}"
    identity = host_nqn(NODE).rpartition(":")[2]
    for secret in ("", f",dhchap_secret={new_dhchap_key()}"):
        descriptor = os.open("/dev/nvme-fabrics", os.O_RDWR)
        try:
            with pytest.raises(OSError, match=r"Errno"):
                os.write(descriptor, f"{options},hostid={identity}{secret}".encode())
        finally:
            os.close(descriptor)
    volume.detach()
    volume.delete()


def test_a_node_without_a_registered_key_gets_no_volume(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    with pytest.raises(CallFailed) as refusal:
        rig.controller.attach(volume.id, "node-without-key", volume.capability, volume_context=volume.context)
    assert refusal.value.code == "FAILED_PRECONDITION"
    volume.delete()


def test_no_key_is_in_a_log_a_context_or_an_argument(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.up()
    secrets = [key.split(":")[2] for key in keys()]
    shown = [rig.log_of(role).read_text() for role in rig.argv]
    shown += [str(volume.publish_context), str(volume.context)]
    shown += [Path(f"/proc/{rig.pid(role)}/cmdline").read_text() for role in rig.argv]
    for secret in secrets:
        assert secret
        assert not any(secret in text for text in shown)
    volume.end()
