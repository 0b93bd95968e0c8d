"""How kubelet lays out its directory: which of its files stands for a mount of ours. Pure text.

kubelet writes the file before it calls NodeStageVolume or NodePublishVolume, and removes it after the call that takes
the volume back was answered with OK. Where the file is gone it never makes that call (pkg/volume/csi: csi_attacher.go
`UnmountDevice`, csi_mounter.go, csi_block.go).
"""

from __future__ import annotations

from pathlib import Path

DATA_FILE = "vol_data.json"
_CSI = ("plugins", "kubernetes.io", "csi")


def staging_data(path: Path, driver_name: str) -> Path | None:
    """Return kubelet's file of what this driver staged at a path; None where the path is not of that layout.

    `.../plugins/kubernetes.io/csi/<driver>/<hash of the volume's handle>/globalmount`
    """
    parts = path.parts
    is_staging = len(parts) > 6 and parts[-6:-3] == _CSI and parts[-3] == driver_name and parts[-1] == "globalmount"
    return path.parent / DATA_FILE if is_staging else None


def publication_data(path: Path) -> Path | None:
    """Return kubelet's file of what is published at a path; None where the path is not of that layout.

    `.../pods/<uid>/volumes/kubernetes.io~csi/<pv>/mount`, and for a raw block volume
    `.../plugins/kubernetes.io/csi/volumeDevices/publish/<pv>/<pod uid>`.
    """
    parts = path.parts
    if len(parts) > 6 and parts[-6] == "pods" and parts[-4:-2] == ("volumes", "kubernetes.io~csi"):
        return path.parent / DATA_FILE if parts[-1] == "mount" else None
    if len(parts) > 7 and parts[-7:-4] == _CSI and parts[-4:-2] == ("volumeDevices", "publish"):
        return path.parents[2] / parts[-2] / "data" / DATA_FILE
    return None
