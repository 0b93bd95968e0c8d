# SPDX-License-Identifier: Apache-2.0
"""Each alert on series of its own, evaluated by promtool: it fires, with these labels, and it does not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.rendering import CHART

RULES = CHART / "monitoring" / "alerts.yaml"
NAME = "nvmesh-csi.excelero.com"
DRIVER = f'driver="{NAME}"'
CONTROLLER = f'{DRIVER}, component="controller", pod="c"'
NODE = f'{DRIVER}, component="node", node="n1", pod="p"'
STORAGE = f'{DRIVER}, component="storage", pod="s"'
POOL = "nvmesh_csi_storage_pool_bytes"
VOLUMES = f"nvmesh_csi_nvme_volumes{{{NODE}, state="
PATHS = f"nvmesh_csi_nvme_paths{{{NODE}, state="
CALLS = "nvmesh_csi_rpc_duration_seconds_count"
SERVER_UP = "nvmesh_csi_management_server_up"
CLAIM = 'namespace="ns", persistentvolumeclaim="data"'
SET = 'namespace="nvmesh-csi", daemonset="nvmesh-csi-node-gpu"'
ALWAYS = {f'nvmesh_csi_build_info{{{CONTROLLER}, role="controller", version="1"}}': "1x300"}
KUBELET = f'csi_operations_seconds_count{{driver_name="{NAME}", method_name="/csi.v1.Node/NodeGetInfo", node="n1"}}'

Series = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """Series in which an alert fires, with these labels, and in which no alert fires; both after `minutes`."""

    fires: Series
    silent: Series
    labels: Mapping[str, str]
    minutes: int = 60


def pool(allocatable: str, available: str = "800x300", pod: str = "s") -> Series:
    states = {"capacity": "1000x300", "allocatable": allocatable, "available": available}
    return {f'{POOL}{{{DRIVER}, pod="{pod}", state="{state}"}}': values for state, values in states.items()}


def servers(**values: str) -> Series:
    """Return the state of servers of zones, named ZONE_SERVER, of two controllers that agree."""
    return {
        f'{SERVER_UP}{{{DRIVER}, component="controller", pod="{pod}", zone="{name[:-2]}", server="{name}"}}': value
        for name, value in values.items()
        for pod in "ab"
    }


def volume(available: str, driver: str = NAME, claim: str = CLAIM, mode: str = "ReadWriteOnce") -> Series:
    return {
        f"kubelet_volume_stats_available_bytes{{{claim}}}": available,
        f"kubelet_volume_stats_capacity_bytes{{{claim}}}": "100x300",
        f"kubelet_volume_stats_inodes_free{{{claim}}}": "50x300",
        f"kubelet_volume_stats_inodes{{{claim}}}": "100x300",
        f'kube_persistentvolumeclaim_info{{{claim}, volumename="{mode}"}}': "1x300",
        f'kube_persistentvolumeclaim_access_mode{{{claim}, access_mode="{mode}"}}': "1x300",
        f'kube_persistentvolume_info{{persistentvolume="{mode}", csi_driver="{driver}"}}': "1x300",
    }


def calls(method: str, code: str, values: str) -> Series:
    return {f'{CALLS}{{{CONTROLLER}, service="csi.v1.Controller", method="{method}", code="{code}"}}': values}


def daemon_set(desired: str, available: str, updated: str) -> Series:
    values = {"desired_number_scheduled": desired, "number_available": available, "updated_number_scheduled": updated}
    return {f"kube_daemonset_status_{name}{{{SET}}}": value for name, value in values.items()}


STALLED = f'nvmesh_csi_background_stalled_seconds{{{NODE}, work="reconcile"}}'
AGE = f'nvmesh_csi_operation_age_seconds{{{NODE}, service="csi.v1.Node", method="NodeStageVolume"}}'
CUTS = f"nvmesh_csi_storage_snapshot_cuts_total{{{STORAGE}, result="
REFUSED = f'nvmesh_csi_management_requests_total{{{CONTROLLER}, zone="east", server="m", outcome="refused"}}'

CASES: Mapping[str, Case] = {
    "ControllerMissing": Case({next(iter(ALWAYS)): "1 _x300"}, {}, {}),
    "ControllerPartDown": Case(
        {f'up{{{CONTROLLER}, container="provisioner"}}': "0x300"},
        {f'up{{{CONTROLLER}, container="provisioner"}}': "1x300"},
        {"container": "provisioner"},
    ),
    "NodeDown": Case({f"up{{{NODE}}}": "0x300"}, {f"up{{{NODE}}}": "1x300"}, {"node": "n1"}),
    # Without a pod there is no series `up`; a node whose kubelet never met the driver is not missed, nor is one without
    # a name, where kubelet's metrics have no label `node`.
    "NodeMissing": Case(
        {KUBELET: "4x300", f'up{{{DRIVER}, component="node", node="n2"}}': "1x300"},
        {
            KUBELET: "4x300",
            KUBELET.replace(', node="n1"', ""): "4x300",
            f"up{{{NODE}}}": "1x300",
            'up{job="kubelet", node="n9"}': "1x300",
        },
        {"node": "n1"},
    ),
    # While a rollout goes on, pods are missing all the time.
    "NodesIncomplete": Case(
        daemon_set("5x300", "4x300", "5x300"),
        daemon_set("500x300", "450x300", "0+1x300"),
        {"daemonset": "nvmesh-csi-node-gpu"},
    ),
    "NodeNotRegistered": Case(
        {f"nvmesh_csi_kubelet_registered{{{NODE}}}": "0x300"},
        {f"nvmesh_csi_kubelet_registered{{{NODE}}}": "0x8 1x300"},
        {"node": "n1"},
    ),
    "ManagementServerDown": Case(
        servers(east_1="0x300", east_2="1x300"),
        servers(east_1="0x8 1x300", east_2="1x300"),
        {"zone": "east", "server": "east_1"},
    ),
    # The only server of one zone, while another zone works; nodes have not asked it and count it as working.
    "ManagementDown": Case(
        {**servers(east_1="0x300", west_1="1x300"), f'{SERVER_UP}{{{NODE}, zone="east", server="east_1"}}': "1x300"},
        servers(east_1="1x300", west_1="1x300"),
        {"zone": "east"},
    ),
    "ManagementRefuses": Case({REFUSED: "0+1x300"}, {REFUSED: "0x30 1x300"}, {"zone": "east", "server": "m"}),
    "OperationHangs": Case({AGE: "0+60x300"}, {AGE: "0+9x300"}, {"pod": "p", "method": "NodeStageVolume"}),
    "CallsFail": Case(
        {**calls("CreateVolume", "UNAVAILABLE", "0+2x300"), **calls("CreateVolume", "OK", "0+1x300")},
        {**calls("CreateVolume", "UNAVAILABLE", "0+1x300"), **calls("CreateVolume", "OK", "0+2x300")},
        {"method": "CreateVolume"},
    ),
    # One mistake of a user that is corrected does not count.
    "RequestsInvalid": Case(
        {**calls("GetCapacity", "INVALID_ARGUMENT", "0+1x300"), **calls("GetCapacity", "OK", "0+9x300")},
        calls("CreateVolume", "INVALID_ARGUMENT", "0x30 1x300"),
        {"method": "GetCapacity"},
        minutes=40,
    ),
    "InternalErrors": Case(
        calls("CreateVolume", "INTERNAL", "0x50 1x300"),
        calls("CreateVolume", "OK", "0+1x300"),
        {"method": "CreateVolume"},
    ),
    "Restarts": Case(
        {f"process_start_time_seconds{{{NODE}}}": "0x20 1x9 2x9 3x9 4x300"},
        {f"process_start_time_seconds{{{NODE}}}": "0x20 1x9 2x9 3x300"},
        {"pod": "p"},
    ),
    "BackgroundStalled": Case({STALLED: "0+60x300"}, {STALLED: "0 60 120 0 60 120 0x300"}, {"work": "reconcile"}),
    "OperationsWait": Case(
        {f'nvmesh_csi_node_heavy_operations{{{NODE}, state="waiting"}}': "3x300"},
        {
            f'nvmesh_csi_node_heavy_operations{{{NODE}, state="waiting"}}': "3x40 0 3x300",
            # A pod that started a quarter of an hour ago.
            f'nvmesh_csi_node_heavy_operations{{{DRIVER}, node="n2", state="waiting"}}': "_x45 3x300",
        },
        {"node": "n1"},
    ),
    # A storage machine that boots is away for less than two minutes.
    "NvmeVolumesWait": Case(
        {f'{VOLUMES}"no_path"}}': "3x300", f'{VOLUMES}"ready"}}': "5x300"},
        {f'{VOLUMES}"no_path"}}': "0x58 3 3 0x300", f'{VOLUMES}"ready"}}': "8x300"},
        {"node": "n1"},
    ),
    "NvmePathsDown": Case(
        {f'{PATHS}"live"}}': "3x300", f'{PATHS}"connecting"}}': "0x10 1x300", f'{PATHS}"missing"}}': "0x300"},
        {f'{PATHS}"live"}}': "4x300", f'{PATHS}"connecting"}}': "0x52 1x300"},
        {"node": "n1"},
    ),
    "NvmePathsFlap": Case(
        {f"nvmesh_csi_nvme_reconnects_total{{{NODE}}}": "0+1x300"},
        # All paths of a node, once.
        {f"nvmesh_csi_nvme_reconnects_total{{{NODE}}}": "0x30 16x300"},
        {"node": "n1"},
    ),
    "NvmeVolumesFenced": Case(
        {f'{VOLUMES}"fenced"}}': "1x300"}, {f'{VOLUMES}"fenced"}}': "0x50 1x300"}, {"node": "n1"}
    ),
    "NvmeOrphans": Case(
        {f"nvmesh_csi_nvme_orphans{{{NODE}}}": "1x300"},
        {f"nvmesh_csi_nvme_orphans{{{NODE}}}": "0x35 1x300"},
        {"node": "n1"},
    ),
    "ExportsWait": Case(
        {f'nvmesh_csi_storage_exports{{{STORAGE}, state="waiting"}}': "0x10 2x300"},
        {f'nvmesh_csi_storage_exports{{{STORAGE}, state="waiting"}}': "9x8 0x42 9x300"},
        {"pod": "s"},
    ),
    "ExportPortsNearlyUsed": Case(
        {f"nvmesh_csi_storage_export_ports_free{{{STORAGE}}}": "49x300"},
        {f"nvmesh_csi_storage_export_ports_free{{{STORAGE}}}": "50x300"},
        {"pod": "s"},
    ),
    "PoolNearlyFull": Case(pool("500x300", available="40x300"), pool("500x300", available="60x300"), {"pod": "s"}),
    # The disk is almost empty: all of it is promised.
    "PoolNearlyPromised": Case(pool("50x300"), pool("150x300"), {"pod": "s"}),
    # 1 of 1000 a minute: at 500 it is half, and seven hours are left. What rises and falls goes on, and so does a pool
    # that got one large volume.
    "PoolFillsSoon": Case(
        pool("600-1x400"),
        {**pool("300 450 " * 180), **pool("490x60 300x400", pod="s2")},
        {"pod": "s"},
        minutes=240,
    ),
    "SnapshotsRefused": Case(
        {f'{CUTS}"space"}}': "0x30 1x300"},
        {f'{CUTS}"done"}}': "0+1x300", f'{CUTS}"busy"}}': "0+1x300"},
        {"result": "space"},
    ),
    "VolumeNearlyFull": Case(
        volume("4x300"),
        # Another driver's, and a data set that nobody writes to.
        {
            **volume("4x300", "ebs.csi.aws.com"),
            **volume("0x300", claim=CLAIM.replace("data", "set"), mode="ReadOnlyMany"),
        },
        {"persistentvolumeclaim": "data"},
    ),
    "VersionsDiffer": Case(
        {f'nvmesh_csi_build_info{{{NODE}, role="node", version="2"}}': "1x300"},
        {f'nvmesh_csi_build_info{{{NODE}, role="node", version="2"}}': "1x100 _x300"},
        {},
        minutes=180,
    ),
}


def evaluation(alert: str, series: Series, expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a test of promtool: all alerts that fire."""
    case = CASES[alert]
    query = f'count by ({", ".join(["alertname", *case.labels])}) (ALERTS{{alertstate="firing"}})'
    return {
        "name": f"{alert} {'fires' if expected else 'is silent'}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in {**ALWAYS, **series}.items()],
        "promql_expr_test": [{"expr": query, "eval_time": f"{case.minutes}m", "exp_samples": expected}],
    }


def evaluations() -> Iterator[dict[str, Any]]:
    for alert, case in CASES.items():
        labels = {"alertname": f"NvmeshCsi{alert}", **case.labels}
        text = ", ".join(f'{name}="{value}"' for name, value in labels.items())
        yield evaluation(alert, case.fires, [{"labels": f"{{{text}}}", "value": 1}])
        yield evaluation(alert, case.silent, [])


@pytest.mark.tool
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: make promtool")
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(evaluations())}
    (file := tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_its_cases() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [f"NvmeshCsi{alert}" for alert in CASES]
