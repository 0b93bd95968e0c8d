# SPDX-License-Identifier: Apache-2.0
"""kubelet's layout: the record of a mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.node.reconcile import publication_record, staging_record

ROOT = Path("/var/lib/kubelet")
HASH = "0f" * 32
DRIVER = "nvmesh-csi.excelero.com"
CSI = ROOT / "plugins/kubernetes.io/csi"


@pytest.mark.parametrize(
    ("path", "record"),
    [
        (CSI / DRIVER / HASH / "globalmount", CSI / DRIVER / HASH / "vol_data.json"),
        (CSI / "other.driver" / HASH / "globalmount", None),
        (CSI / DRIVER / HASH / "elsewhere", None),
        (CSI / "pv/pvc-1/globalmount", None),
        (ROOT / "plugins/other/csi" / DRIVER / HASH / "globalmount", None),
        (Path("/srv/staging/globalmount"), None),
    ],
)
def test_a_staging_path_of_this_driver_has_its_record_beside_it(path: Path, record: Path | None) -> None:
    assert staging_record(path, DRIVER) == record


@pytest.mark.parametrize(
    ("path", "record"),
    [
        (
            ROOT / "pods/1-2/volumes/kubernetes.io~csi/pvc-1/mount",
            ROOT / "pods/1-2/volumes/kubernetes.io~csi/pvc-1/vol_data.json",
        ),
        (CSI / "volumeDevices/publish/pvc-1/1-2", CSI / "volumeDevices/pvc-1/data/vol_data.json"),
        (ROOT / "pods/1-2/volumes/kubernetes.io~csi/pvc-1/other", None),
        (ROOT / "pods/1-2/volumes/kubernetes.io~nfs/pvc-1/mount", None),
        (ROOT / "pods/1-2/volume-subpaths/pvc-1/c/0", None),
        (CSI / "volumeDevices/staging/pvc-1", None),
        (Path("/srv/target"), None),
    ],
)
def test_a_publication_has_its_record_where_kubelet_keeps_it(path: Path, record: Path | None) -> None:
    assert publication_record(path) == record
