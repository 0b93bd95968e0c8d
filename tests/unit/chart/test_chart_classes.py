# SPDX-License-Identifier: Apache-2.0
"""StorageClasses and VolumeAttributesClasses: those of the older drivers, and additional ones."""

from __future__ import annotations

from typing import Any

import pytest

from csi_driver.parameters import storage_class
from tests.unit.chart.rendering import EMBEDDED, NVMESH, SNAPSHOTS, Manifest, Refused, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

# github.com/Excelero/nvmesh-csi-driver, deploy/kubernetes/helm/nvmesh-csi-driver/templates/storage-classes: as shipped.
OLDER = {
    "nvmesh-concatenated": "DEFAULT_CONCATENATED_VPG",
    "nvmesh-raid0": "DEFAULT_RAID_0_VPG",
    "nvmesh-raid1": "DEFAULT_RAID_1_VPG",
    "nvmesh-raid10": "DEFAULT_RAID_10_VPG",
    "nvmesh-ec-dual-target-redundancy": "DEFAULT_EC_DUAL_TARGET_REDUNDANCY_VPG",
    "nvmesh-ec-single-target-redundancy": "DEFAULT_EC_SINGLE_TARGET_REDUNDANCY_VPG",
}
DEFAULT = "storageclass.kubernetes.io/is-default-class"


def classes(*sets: str, **values: Any) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in render(*sets, values=values).of("StorageClass")}


def own(**described: Any) -> Manifest:
    """Return a class of one's own that the values describe."""
    return classes(*NVMESH, storageClasses=[{"name": "own"} | described])["own"]


def refusal(*sets: str, **values: Any) -> str:
    with pytest.raises(Refused) as refused:
        render(*sets, values=values)
    return str(refused.value)


# --- classes of the older drivers ------------------------------------------------------------------------------


def test_the_older_drivers_classes_are_there_under_their_names_and_groups() -> None:
    assert {name: each["parameters"] for name, each in classes(*NVMESH).items()} == {
        name: {"vpg": group} for name, group in OLDER.items()
    }


@pytest.mark.parametrize("name", OLDER)
def test_what_cannot_be_changed_of_an_older_class_is_as_it_was_shipped(name: str) -> None:
    there = classes(*NVMESH)[name]
    kept = (there["provisioner"], there["reclaimPolicy"], there["volumeBindingMode"])
    assert kept == ("nvmesh-csi.excelero.com", "Delete", "Immediate")
    assert there["allowVolumeExpansion"] is True
    assert DEFAULT not in there["metadata"].get("annotations", {})


def test_default_classes_can_be_left_out() -> None:
    assert classes(*NVMESH, "defaultStorageClasses.enabled=false") == {}


def test_default_classes_of_another_driver_bear_its_name() -> None:
    found = classes(*NVMESH, "driverName=fast.example.com")
    assert set(found) == {name.replace("nvmesh-", "fast.example.com-", 1) for name in OLDER}
    assert {each["provisioner"] for each in found.values()} == {"fast.example.com"}


def test_the_prefix_of_default_classes_can_be_chosen() -> None:
    assert "gold-raid10" in classes(*NVMESH, "defaultStorageClasses.namePrefix=gold-")


# --- one machine ------------------------------------------------------------------------------------------------


def test_one_machine_has_a_default_class_and_no_layouts_that_it_cannot_keep() -> None:
    found = classes(*EMBEDDED)
    assert set(found) == {"nvmesh-local", "nvmesh-concatenated"}
    assert found["nvmesh-local"]["metadata"]["annotations"][DEFAULT] == "true"
    assert found["nvmesh-local"]["volumeBindingMode"] == "WaitForFirstConsumer"


def test_the_class_of_one_machine_need_not_be_the_default() -> None:
    local = classes(*EMBEDDED, "defaultStorageClasses.oneBoxDefault=false")["nvmesh-local"]
    assert "annotations" not in local["metadata"]


# --- classes of one's own ---------------------------------------------------------------------------------------


def test_a_class_that_says_nothing_waits_for_its_pod_and_can_grow() -> None:
    found = own()
    assert (found["volumeBindingMode"], found["reclaimPolicy"]) == ("WaitForFirstConsumer", "Delete")
    assert found["allowVolumeExpansion"] is True
    assert "parameters" not in found


def test_a_class_is_as_it_is_described() -> None:
    topologies = [{"matchLabelExpressions": [{"key": "nvmesh-csi.excelero.com/zone", "values": ["east"]}]}]
    found = own(
        isDefault=True,
        labels={"tier": "gold"},
        annotations={"note": "kept"},
        fsType="xfs",
        reclaimPolicy="Retain",
        volumeBindingMode="Immediate",
        allowVolumeExpansion=False,
        mountOptions=["noatime", "nodiratime"],
        allowedTopologies=topologies,
    )
    assert found["metadata"]["annotations"] == {DEFAULT: "true", "note": "kept"}
    assert found["metadata"]["labels"]["tier"] == "gold"
    assert found["parameters"] == {"csi.storage.k8s.io/fstype": "xfs"}
    assert (found["reclaimPolicy"], found["volumeBindingMode"]) == ("Retain", "Immediate")
    assert found["allowVolumeExpansion"] is False
    assert found["mountOptions"] == ["noatime", "nodiratime"]
    assert found["allowedTopologies"] == topologies


def test_numbers_and_switches_among_parameters_become_strings() -> None:
    found = own(parameters={"stripeWidth": 4, "mkfs/bytesPerInode": 2097152, "enableCrcCheck": True})
    assert found["parameters"] == {"stripeWidth": "4", "mkfs/bytesPerInode": "2097152", "enableCrcCheck": "true"}


def test_the_secret_of_encryption_serves_creation_staging_and_growth() -> None:
    found = own(parameters={"encryption": "luks"}, encryptionSecret={"name": "key", "namespace": "vault"})
    names = {key for key, value in found["parameters"].items() if value == "key"}
    spaces = {key for key, value in found["parameters"].items() if value == "vault"}
    assert names == {f"csi.storage.k8s.io/{use}-secret-name" for use in ("provisioner", "node-stage", "node-expand")}
    assert spaces == {name.replace("-name", "-namespace") for name in names}


@pytest.mark.parametrize(
    ("use", "key"),
    [
        ("provisioner", "provisioner"),
        ("controllerPublish", "controller-publish"),
        ("nodeStage", "node-stage"),
        ("nodePublish", "node-publish"),
        ("controllerExpand", "controller-expand"),
        ("nodeExpand", "node-expand"),
        ("controllerModify", "controller-modify"),
    ],
)
def test_secrets_stand_under_the_keys_of_the_sidecars(use: str, key: str) -> None:
    found = own(secrets={use: {"name": "${pvc.name}", "namespace": "${pvc.namespace}"}})
    assert found["parameters"] == {
        f"csi.storage.k8s.io/{key}-secret-name": "${pvc.name}",
        f"csi.storage.k8s.io/{key}-secret-namespace": "${pvc.namespace}",
    }


def test_a_secret_that_is_named_for_one_use_beats_the_one_of_encryption() -> None:
    one, other = {"name": "a", "namespace": "s"}, {"name": "b", "namespace": "s"}
    found = own(encryptionSecret=one, secrets={"nodeStage": other})["parameters"]
    assert found["csi.storage.k8s.io/node-stage-secret-name"] == "b"
    assert found["csi.storage.k8s.io/provisioner-secret-name"] == "a"


def test_a_parameter_that_is_said_twice_is_refused() -> None:
    described = {"name": "own", "fsType": "xfs", "parameters": {"csi.storage.k8s.io/fstype": "ext4"}}
    assert "sets csi.storage.k8s.io/fstype twice" in refusal(*NVMESH, storageClasses=[described])


def test_a_parameter_that_the_driver_does_not_know_is_refused() -> None:
    described = {"name": "own", "parameters": {"stripWidth": "2"}}
    expected = "storageClasses: class own has the parameter stripWidth, which the driver does not know"
    assert f"{expected}; did you mean stripeWidth?" in refusal(*NVMESH, storageClasses=[described])
    for typo, name in (("vgp", "vpg"), ("VPG", "vpg"), ("mkfs/discards", "mkfs/discard"), ("raidlevel", "raidLevel")):
        assert f"did you mean {name}?" in refusal(*NVMESH, storageClasses=[{"name": "own", "parameters": {typo: "x"}}])


def test_parameters_of_the_sidecars_and_of_older_drivers_are_taken() -> None:
    known = {"csi.storage.k8s.io/fstype": "xfs", "encryption.cipher": "aes-xts"}
    (made,) = render(
        *NVMESH,
        "defaultStorageClasses.enabled=false",
        values={"storageClasses": [{"name": "own", "parameters": known}]},
    ).of("StorageClass")
    assert made["parameters"] == known


# --- attributes and snapshots -----------------------------------------------------------------------------------


def test_what_can_be_changed_of_volumes_becomes_a_class() -> None:
    described = {"name": "first", "parameters": {"relativeRebuildPriority": 10, "description": "a: b"}}
    (found,) = render(*NVMESH, values={"volumeAttributesClasses": [described]}).of("VolumeAttributesClass")
    assert found["driverName"] == "nvmesh-csi.excelero.com"
    assert found["parameters"] == {"relativeRebuildPriority": "10", "description": "a: b"}
    storage_class.parse_changes(found["parameters"])


@pytest.mark.parametrize(("kubernetes", "version"), [("1.33.5", "v1beta1"), ("1.34.0", "v1"), ("1.37.2", "v1")])
def test_a_class_of_attributes_speaks_the_version_that_the_cluster_serves(kubernetes: str, version: str) -> None:
    described = {"name": "first", "parameters": {"description": "x"}}
    made = render(*NVMESH, values={"volumeAttributesClasses": [described]}, kubernetes=kubernetes)
    assert [each["apiVersion"] for each in made.of("VolumeAttributesClass")] == [f"storage.k8s.io/{version}"]


def test_what_cannot_be_changed_of_volumes_is_refused() -> None:
    described = {"name": "first", "parameters": {"stripeWidth": "4"}}
    expected = "volumeAttributesClasses: class first has the parameter stripeWidth, which the driver does not know"
    assert expected in refusal(*NVMESH, volumeAttributesClasses=[described])


@pytest.mark.parametrize("group", ["snapshot", "groupsnapshot"])
def test_a_class_of_snapshots_is_of_this_driver(group: str) -> None:
    kind = {"snapshot": "VolumeSnapshotClass", "groupsnapshot": "VolumeGroupSnapshotClass"}[group]
    described = [
        {"name": "first", "isDefault": True, "labels": {"velero.io/csi-volumesnapshot-class": "true"}},
        {"name": "kept", "deletionPolicy": "Retain", "annotations": {"note": "kept"}},
    ]
    key = f"v{kind[1:]}es"
    first, kept = render(*EMBEDDED, SNAPSHOTS, "driverName=csi.example.com", values={key: described}).of(kind)
    assert first["apiVersion"] == kept["apiVersion"] == f"{group}.storage.k8s.io/v1"
    assert first["driver"] == kept["driver"] == "csi.example.com"
    assert (first["deletionPolicy"], kept["deletionPolicy"]) == ("Delete", "Retain")
    assert first["metadata"]["annotations"] == {f"{group}.storage.kubernetes.io/is-default-class": "true"}
    assert kept["metadata"]["annotations"] == {"note": "kept"}
    assert first["metadata"]["labels"]["velero.io/csi-volumesnapshot-class"] == "true"


def test_a_class_of_snapshots_has_no_parameters() -> None:
    described = {"name": "first", "parameters": {"freeze": "true"}}
    assert "'parameters' not allowed" in refusal(*EMBEDDED, SNAPSHOTS, volumeSnapshotClasses=[described])
