"""Facts of devices that need no device: what is not known is never taken for gone."""

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
    """Let this process open no file for the length of a with-block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_size_that_cannot_be_read_is_not_that_of_a_device_that_is_gone() -> None:
    with pytest.raises(SystemCallFailed, match="EMFILE"), no_descriptors():
        LinuxDevices().size_bytes(DeviceNumber(240, 77))


def test_a_number_that_no_device_has_has_no_size() -> None:
    assert LinuxDevices().size_bytes(DeviceNumber(240, 77)) is None
