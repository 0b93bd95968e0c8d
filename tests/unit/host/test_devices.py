# SPDX-License-Identifier: Apache-2.0
"""Sizes by number: an unknown size does not mean that the device is gone."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from csi_driver.errors import SystemCallFailed
from csi_driver.host.devices import LinuxDevices
from csi_driver.host_model import DeviceNumber


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Set the limit of open files to 0 in a with-block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_unreadable_size_does_not_mean_gone() -> None:
    with pytest.raises(SystemCallFailed, match="EMFILE"), no_descriptors():
        LinuxDevices().size_bytes(DeviceNumber(240, 77))


def test_an_unused_number_has_no_size() -> None:
    assert LinuxDevices().size_bytes(DeviceNumber(240, 77)) is None
