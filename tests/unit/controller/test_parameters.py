"""Parameters of a StorageClass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.controller import parameters
from csi_driver.errors import InvalidRequest
from csi_driver.model import Layout, RaidLevel


@pytest.mark.parametrize(
    ("word", "level"),
    [
        ("concatenated", RaidLevel.CONCATENATED),
        ("lvm", RaidLevel.CONCATENATED),
        ("JBOD", RaidLevel.CONCATENATED),
        ("raid0", RaidLevel.STRIPED),
        ("mirrored", RaidLevel.MIRRORED),
        ("raid1", RaidLevel.MIRRORED),
        ("RAID10", RaidLevel.STRIPED_MIRRORED),
        ("Striped & Mirrored RAID-10", RaidLevel.STRIPED_MIRRORED),
        ("ec", RaidLevel.ERASURE_CODED),
        ("sec", RaidLevel.STRIPED_ERASURE_CODED),
        ("raid60", RaidLevel.STRIPED_ERASURE_CODED),
    ],
)
def test_a_raid_level_has_several_names(word: str, level: RaidLevel) -> None:
    layout = parameters.parse({"raidLevel": word}).layout
    assert layout is not None
    assert layout.raid_level is level


def test_no_parameters_mean_concatenated() -> None:
    assert parameters.parse({}).layout == Layout(RaidLevel.CONCATENATED)


def test_everything_a_level_takes_reaches_the_layout() -> None:
    read = parameters.parse(
        {
            "raidLevel": "ec",
            "dataBlocks": "4",
            "parityBlocks": "1",
            "stripeSize": "64",
            "stripeWidth": "1",
            "protectionLevel": "Minimal Separation",
            "enableCrcCheck": "False",
            "relativeRebuildPriority": "3",
            "diskClasses": "fast, new",
            "domain": "rack",
        }
    )
    assert read.layout == Layout(RaidLevel.ERASURE_CODED, 1, 64, 4, 1, None, "Minimal Separation", False)
    assert (read.relative_rebuild_priority, read.drive_classes, read.domain) == (3, ("fast", "new"), "rack")


@pytest.mark.parametrize(
    ("given_parameters", "named"),
    [
        ({"color": "red"}, "color"),
        ({"raidLevel": "raid7"}, "raid7"),
        ({"stripeWidth": "2"}, "stripeWidth"),
        ({"raidLevel": "raid1", "stripeSize": "32"}, "stripeSize"),
        ({"raidLevel": "raid0", "numberOfMirrors": "1"}, "numberOfMirrors"),
        ({"raidLevel": "raid0", "stripeWidth": "1"}, "stripeWidth"),
        ({"raidLevel": "raid0", "stripeWidth": "-2"}, "stripeWidth"),
        ({"raidLevel": "raid0", "stripeWidth": "²"}, "stripeWidth"),
        ({"raidLevel": "ec", "stripeWidth": "2"}, "stripeWidth"),
        ({"raidLevel": "ec", "dataBlocks": "11"}, "dataBlocks"),
        ({"raidLevel": "ec", "protectionLevel": "none"}, "protectionLevel"),
        ({"raidLevel": "raid1", "enableCrcCheck": "yes"}, "enableCrcCheck"),
        ({"relativeRebuildPriority": "11"}, "relativeRebuildPriority"),
        ({"vpg": "gold", "raidLevel": "raid1"}, "raidLevel"),
        ({"vpg": "gold", "diskClasses": "a"}, "diskClasses"),
        ({"vpg": ""}, "vpg"),
        ({"vpg": "../x"}, "vpg"),
        ({"diskClasses": "a", "limitByNodes": "b"}, "limitBy"),
        ({"diskClasses": "a,,b"}, "diskClasses"),
        ({"volumeClass": "TPV"}, "thin"),
        ({"cdvName": "pool"}, "thin"),
        ({"tpvExtentSizeKB": "64"}, "thin"),
        ({"encryption": "dmcrypt"}, "encryption"),
        ({"encryption/keySize": "512"}, "encryption"),
        ({"dmcrypt/cipher": "x"}, "encryption"),
        ({"fsType": "ntfs"}, "ntfs"),
        ({"fsType": "xfs", "csi.storage.k8s.io/fstype": "ext4"}, "two filesystems"),
        ({"mkfsOptions": "/dev/sda"}, "mkfsOptions"),
        ({"mkfsOptions": "-K\n-f"}, "mkfsOptions"),
        ({"mkfsOptions": "-L 'x"}, "mkfsOptions"),
        ({"mkfsOptions": "-" + "x" * 2000}, "mkfsOptions"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(given_parameters: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parameters.parse(given_parameters)


def test_keys_of_the_sidecars_are_ignored_but_for_the_claim() -> None:
    read = parameters.parse(
        {
            "csi.storage.k8s.io/provisioner-secret-name": "secret",
            "csi.storage.k8s.io/pvc/namespace": "team-a",
            "csi.storage.k8s.io/fstype": "xfs",
        }
    )
    assert (read.pvc_namespace, read.fs_type) == ("team-a", "xfs")
    assert dict(read.recorded) == {"csi-storage-k8s-io/pvc/namespace": "team-a"}


@given(st.dictionaries(st.sampled_from(sorted(parameters._KNOWN_KEYS)) | st.text(max_size=20), st.text(max_size=40)))
def test_any_parameters_are_read_or_refused(given_parameters: dict[str, str]) -> None:
    try:
        read = parameters.parse(given_parameters)
    except InvalidRequest:
        return
    assert (read.vpg is None) != (read.layout is None)
