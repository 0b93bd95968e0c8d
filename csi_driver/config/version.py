"""The version of the driver, as its package says it."""

from __future__ import annotations

_PACKAGE = "nvmesh-csi-driver"


def driver_version() -> str:
    """Return the version of the installed package; "0+source" where the code runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return "0+source"
