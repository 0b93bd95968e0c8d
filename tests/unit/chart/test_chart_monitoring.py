# SPDX-License-Identifier: Apache-2.0
"""What Prometheus and Grafana are given: every metric and label in it is one that the program or the scraping has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from csi_driver.nvme_model import ExportCounts, NvmeStates
from csi_driver.telemetry import metrics
from csi_driver.telemetry.metrics import Metric, Reading
from tests.documents import anchors
from tests.unit.chart.rendering import CHART, EMBEDDED, NVMESH, ROOT, SNAPSHOTS, Manifest, Refused, helm, render

with_helm = pytest.mark.skipif(helm() is None, reason="needs helm: make helm")
tool = pytest.mark.tool

ALERTS = CHART / "monitoring" / "alerts.yaml"
DASHBOARD = CHART / "monitoring" / "dashboard.json"
RUNBOOKS = ROOT / "docs" / "alerts.md"
SCRAPED = {"driver", "component", "node", "namespace", "pod", "container", "instance", "job"}
"""Labels that scraping adds: Prometheus Operator's own, and those of the chart's PodMonitor."""
_OF_CSI = {"driver_name", "method_name", "grpc_status_code", "le"}
_OF_CLAIM = {"namespace", "persistentvolumeclaim"}
_OF_DAEMON_SET = {"namespace", "daemonset"}
FOREIGN: dict[str, set[str]] = {
    "up": set(),
    # Sidecars (kubernetes-csi/csi-lib-utils, metrics/metrics.go) and kubelet (pkg/volume/csi/csi_metrics.go and
    # pkg/volume/util/metrics.go), as the cluster of the tests shows them.
    "csi_sidecar_operations_seconds_bucket": _OF_CSI,
    "csi_sidecar_operations_seconds_count": _OF_CSI,
    "csi_operations_seconds_bucket": {*_OF_CSI, "migrated"},
    "csi_operations_seconds_count": {*_OF_CSI, "migrated"},
    "storage_operation_duration_seconds_bucket": {"operation_name", "status", "volume_plugin", "migrated", "le"},
    "storage_operation_duration_seconds_count": {"operation_name", "status", "volume_plugin", "migrated"},
    "kubelet_volume_stats_available_bytes": _OF_CLAIM,
    "kubelet_volume_stats_capacity_bytes": _OF_CLAIM,
    "kubelet_volume_stats_inodes": _OF_CLAIM,
    "kubelet_volume_stats_inodes_free": _OF_CLAIM,
    # kube-state-metrics, docs/metrics of that project.
    "kube_daemonset_status_desired_number_scheduled": _OF_DAEMON_SET,
    "kube_daemonset_status_number_available": _OF_DAEMON_SET,
    "kube_daemonset_status_updated_number_scheduled": _OF_DAEMON_SET,
    "kube_persistentvolume_info": {"persistentvolume", "csi_driver"},
    "kube_persistentvolumeclaim_info": {*_OF_CLAIM, "volumename"},
    "kube_persistentvolumeclaim_access_mode": {*_OF_CLAIM, "access_mode"},
}
"""Labels of the metrics of other programs, by name."""
NAME = re.compile(r"\b(?:nvmesh_csi|process|csi|storage|kubelet|kube)_[a-z_]+\b(?!=)|\bup\b")
SELECTOR = re.compile(r"\b([a-z_]+)\{([^}]*)\}")


def every_metric() -> Iterator[Metric]:
    """Yield the metrics of all roles."""
    yield metrics.rpc_durations()
    yield from metrics.running_calls(dict)
    yield from metrics.ManagementMetrics().measurements()
    yield from metrics.background(())
    yield from metrics.node(dict, lambda: (0, 0), 4)
    yield from metrics.registration(lambda: True, dict)
    yield metrics.NvmeMetrics(lambda: NvmeStates({"ready": 1}, {"live": 1}, 0, 0, 0, 0))
    yield from metrics.storage(dict, lambda: 0, lambda: 0)
    yield from metrics.exports(lambda: ExportCounts(0, 0, 0, 0))
    yield from metrics.Cuts(()).measurements(lambda: 0)
    yield from metrics.process(version="", role="", driver_name="")


def own() -> dict[str, set[str]]:
    """Return the labels of every metric by its name."""
    found: dict[str, set[str]] = {}
    for each in every_metric():
        match each:
            case Reading():
                found[each.name] = set(each.labels)
            case Counter() | Gauge() | Histogram():
                (described,) = each.describe()
                suffix = "_total" if described.type == "counter" else ""
                found[described.name + suffix] = set(each._labelnames)
            case _:
                found |= {sample.name: set(sample.labels) for family in each.collect() for sample in family.samples}
    return found


def series() -> dict[str, set[str]]:
    """Return the labels of every series by its name, as it is written for Prometheus."""
    found: dict[str, set[str]] = {**FOREIGN, **own()}
    for name in [name for name in own() if name.endswith("_duration_seconds")]:
        labels = found.pop(name)
        found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def targets() -> list[dict[str, Any]]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target for panel in panels for target in panel.get("targets", ())]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every expression of alerts and dashboard, with its context."""
    for rule in rules():
        yield rule["expr"], " ".join(rule["annotations"].values())
    for target in targets():
        yield target["expr"], target["legendFormat"]


def labels_by_hand(text: str) -> set[str]:
    """Return the labels that an expression groups by and ignores, or a text shows."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring) ?\(([^)]*)\)", text)
    shown = re.findall(r"\{\{ ?(?:\$labels\.)?([a-z_]+) ?\}\}", text)
    return {label.strip() for each in grouped for label in each.split(",")} | set(shown)


def test_every_metric_exists() -> None:
    known = series()
    used = [name for expression, _ in expressions() for name in NAME.findall(expression)]
    assert len(set(used)) > 15
    assert [name for name in used if name not in known] == []


def test_every_selected_label_is_one_of_its_metric() -> None:
    known = series()
    selected = [
        (name, label)
        for expression, _ in expressions()
        for name, matchers in SELECTOR.findall(expression)
        for label in re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers)
    ]
    assert len(selected) > 40
    assert [(name, label) for name, label in selected if label not in known[name] | SCRAPED] == []


def test_every_label_that_is_grouped_by_or_shown_is_one_of_a_metric_there() -> None:
    known = series()
    strange = []
    for expression, around in expressions():
        labels = {label for name in NAME.findall(expression) for label in known[name]} | SCRAPED
        strange += [label for label in labels_by_hand(f"{expression} {around}") if label not in labels]
    assert strange == []


def test_every_metric_of_the_drivers_own_is_watched_or_shown() -> None:
    used = {name for expression, _ in expressions() for name in NAME.findall(expression)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} | used
    assert {name for name in own() if name.startswith("nvmesh_csi_")} - shown == set()


def test_every_expression_is_about_one_driver() -> None:
    chosen = [(rule["expr"], "nvmesh-csi.excelero.com") for rule in rules()]
    chosen += [(target["expr"], "$driver") for target in targets()]
    for expression, driver in chosen:
        names = NAME.findall(expression)
        of_driver = re.findall(rf'(?:driver|driver_name|volume_plugin)="[^"]*{re.escape(driver)}"', expression)
        of_release = expression.count('daemonset=~"nvmesh-csi-node(')
        joined = [name for name in names if name.startswith(("kubelet_volume_stats", "kube_persistentvolumeclaim"))]
        assert len(of_driver) + of_release + len(joined) == len(names), expression
        assert of_driver or of_release, expression


def test_every_alert_says_how_grave_it_is_what_it_means_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description", "action", "runbook_url"}


def test_every_alert_leads_to_its_own_section_of_the_document() -> None:
    named = [rule["annotations"]["runbook_url"] for rule in rules()]
    assert named == [f"docs/alerts.md#{rule['alert'].lower()}" for rule in rules()]
    headings = anchors(RUNBOOKS.read_text())
    assert [url for url in named if url.partition("#")[2] not in headings] == []
    sections = set(re.findall(r"(?m)^### (\w+)$", RUNBOOKS.read_text()))
    assert sections == {rule["alert"] for rule in rules()}


def test_no_two_panels_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# --- rendered alerts ---------------------------------------------------------------------------------

ON = tuple(f"monitoring.{part}.enabled=true" for part in ("podMonitor", "alerts", "dashboard"))


def rule_of(*sets: str, **values: Any) -> Manifest:
    (found,) = render(*NVMESH, *ON, *sets, values=values).of("PrometheusRule")
    return found


@tool
@with_helm
def test_nothing_is_there_unless_it_is_wanted() -> None:
    rendered = render(*NVMESH)
    assert [*rendered.of("PodMonitor"), *rendered.of("PrometheusRule"), *rendered.of("ConfigMap")] == []


@tool
@with_helm
def test_alerts_come_out_as_they_stand() -> None:
    (group,) = rule_of()["spec"]["groups"]
    assert group["rules"] == rules()


@tool
@with_helm
def test_alerts_bear_the_drivers_name_the_age_and_more_labels() -> None:
    alerts = {"operationAgeSeconds": 120, "alertLabels": {"team": "storage"}, "disabled": ["NvmeshCsiVersionsDiffer"]}
    made = rule_of("driverName=fast.example.com", monitoring={"alerts": {**alerts, "labels": {"release": "prom"}}})
    (group,) = made["spec"]["groups"]
    assert made["metadata"]["labels"]["release"] == "prom"
    assert "excelero" not in json.dumps(group)
    by_name = {rule["alert"]: rule for rule in group["rules"]}
    assert {rule["alert"] for rule in rules()} - by_name.keys() == {"NvmeshCsiVersionsDiffer"}
    assert by_name["NvmeshCsiOperationHangs"]["expr"].endswith("> 120")
    assert {rule["labels"]["team"] for rule in group["rules"]} == {"storage"}
    assert by_name["NvmeshCsiControllerMissing"]["labels"]["severity"] == "critical"


@tool
@with_helm
def test_an_alert_that_does_not_exist_cannot_be_left_out() -> None:
    with pytest.raises(Refused, match="disabled/0"):
        rule_of(monitoring={"alerts": {"disabled": ["NvmeshCsiNoSuchThing"]}})
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["monitoring"]["properties"]
    assert schema["alerts"]["properties"]["disabled"]["items"]["enum"] == [rule["alert"] for rule in rules()]


@tool
@with_helm
def test_the_dashboard_comes_out_as_it_stands() -> None:
    (found,) = render(*NVMESH, *ON).of("ConfigMap")
    assert found["data"] == {"nvmesh-csi.json": DASHBOARD.read_text()}
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


@tool
@with_helm
def test_alerts_name_the_objects_of_their_release_and_the_place_of_the_runbook() -> None:
    alerts = {"enabled": True, "runbook": "https://wiki.example.com/alerts"}
    (made,) = render(*NVMESH, values={"monitoring": {"alerts": alerts}}, release="fast", namespace="stores").of(
        "PrometheusRule"
    )
    by_name = {rule["alert"]: rule for rule in made["spec"]["groups"][0]["rules"]}
    expression = by_name["NvmeshCsiNodesIncomplete"]["expr"]
    assert re.findall(r'namespace="(.*?)", daemonset=~"(.*?)\(', expression) == [("stores", "fast-nvmesh-csi-node")] * 3
    urls = {rule["annotations"]["runbook_url"].partition("#")[0] for rule in by_name.values()}
    assert urls == {"https://wiki.example.com/alerts"}


@tool
@with_helm
def test_a_service_monitor_scrapes_what_a_pod_monitor_scrapes() -> None:
    pods = render(*EMBEDDED, SNAPSHOTS, "monitoring.podMonitor.enabled=true").of("PodMonitor")[0]
    made = render(*EMBEDDED, SNAPSHOTS, "monitoring.serviceMonitor.enabled=true")
    services, service = made.of("ServiceMonitor")[0], made.one("Service", "-metrics")
    # The label `service` of a target would rename that of the driver's own metrics.
    drop = {"action": "labeldrop", "regex": "service"}
    expected = [{**each, "relabelings": [*each["relabelings"], drop]} for each in pods["spec"]["podMetricsEndpoints"]]
    assert services["spec"]["endpoints"] == expected
    wanted = services["spec"]["selector"]["matchLabels"].items()
    assert [each for each in made.of("Service") if wanted <= each["metadata"]["labels"].items()] == [service]
    assert service["spec"]["selector"] == pods["spec"]["selector"]["matchLabels"]
    ports = service["spec"]["ports"]
    assert [(port["name"], port["targetPort"]) for port in ports] == [(each["port"],) * 2 for each in expected]
    assert len({port["port"] for port in ports}) == len(ports)
    # An unready controller's metrics say that the management is away.
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)


@tool
@with_helm
def test_two_monitors_of_the_same_series_are_refused() -> None:
    with pytest.raises(Refused, match="set only one"):
        render(*NVMESH, *ON, "monitoring.serviceMonitor.enabled=true")


@tool
@with_helm
@pytest.mark.parametrize("engine", [NVMESH, (*EMBEDDED, SNAPSHOTS)], ids=["nvmesh", "embedded, snapshots"])
def test_every_port_that_serves_metrics_is_scraped_with_the_labels_of_the_alerts(engine: tuple[str, ...]) -> None:
    rendered = render(*engine, *ON, "monitoring.podMonitor.labels.release=prom")
    (monitor,) = rendered.of("PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prom"
    serving = {
        port["name"]
        for _, container in rendered.containers()
        for port in container.get("ports", ())
        if port["name"] != "api"
    }
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    of_snapshots = {"snapshotter"} if SNAPSHOTS in engine else set()
    served = {"http", "provisioner", "attacher", "resizer"} | of_snapshots
    assert {endpoint["port"] for endpoint in endpoints} == serving == served
    for endpoint in endpoints:
        assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"driver", "component", "node"}
    selector = monitor["spec"]["selector"]["matchLabels"].items()
    for kind in ("Deployment", "DaemonSet", "StatefulSet"):
        for workload in rendered.of(kind):
            assert selector <= workload["spec"]["template"]["metadata"]["labels"].items()


@tool
@with_helm
def test_metrics_that_nobody_can_reach_are_refused() -> None:
    for kind in ("podMonitor", "serviceMonitor"):
        with pytest.raises(Refused, match=rf"{kind}\.enabled is true.*node\.http\.host"):
            render(*NVMESH, f"monitoring.{kind}.enabled=true", "node.hostNetwork=true")
    assert render(*NVMESH, *ON, "node.hostNetwork=true", "node.http.host=0.0.0.0").of("PodMonitor") != []
    with pytest.raises(Refused, match=r"pods of the controller serve.*controller\.http\.host"):
        render(*NVMESH, *ON, "controller.hostNetwork=true")


@tool
@with_helm
@pytest.mark.parametrize(("host", "probed"), [("", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("0.0.0.0", None)])
def test_sidecars_on_the_hosts_network_listen_where_the_driver_does(host: str, probed: str | None) -> None:
    rendered = render(*NVMESH, "controller.hostNetwork=true", f"controller.http.host={host}")
    for name in ("provisioner", "attacher", "resizer"):
        sidecar = rendered.container(f"controller/{name}")
        (listens,) = [word for word in sidecar["args"] if word.startswith("--http-endpoint=")]
        assert listens.startswith(f"--http-endpoint={host or probed}:")
        assert sidecar["livenessProbe"]["httpGet"].get("host") == probed


@tool
@with_helm
def test_a_release_of_nodes_alone_misses_no_controller() -> None:
    (made,) = render("nodeComponentOnly=true", *ON).of("PrometheusRule")
    found = {rule["alert"] for rule in made["spec"]["groups"][0]["rules"]}
    assert {rule["alert"] for rule in rules()} - found == {"NvmeshCsiControllerMissing"}


@tool
@with_helm
def test_a_label_that_selects_monitors_wins_over_that_of_the_chart() -> None:
    label = "app.kubernetes.io/part-of"
    labels = {"labels": {label: "kube-prometheus"}}
    rendered = render(*NVMESH, *ON, values={"monitoring": {"podMonitor": labels, "alerts": labels}})
    for kind in ("PodMonitor", "PrometheusRule"):
        (made,) = rendered.of(kind)
        assert made["metadata"]["labels"][label] == "kube-prometheus"


@tool
@with_helm
@pytest.mark.parametrize(("ratio", "text"), [(0.25, "0.25"), (1e-6, "0.000001"), (1.0, "1"), (0.1, "0.1")])
def test_the_part_of_the_traces_is_a_plain_number(ratio: float, text: str) -> None:
    rendered = render(*EMBEDDED, values={"tracing": {"endpoint": "https://c:4317", "sampleRatio": ratio}})
    for container in ("controller/driver", "node/driver", "storage/storage"):
        assert {"--tracing-endpoint=https://c:4317", f"--tracing-sample-ratio={text}"} <= set(rendered.args(container))


@tool
@with_helm
def test_a_collector_that_no_policy_lets_through_is_refused() -> None:
    policy = "networkPolicy.enabled=true", "networkPolicy.egress.enabled=true"
    egress = (*policy, "networkPolicy.egress.apiServer.cidrs={10.0.0.1/32}", "tracing.endpoint=http://c:4317")
    with pytest.raises(Refused, match=r"networkPolicy\.egress\.extraRules is empty: name the collector"):
        render(*EMBEDDED, *egress)
    rule = {"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}]}
    allowed = render(*EMBEDDED, *egress, values={"networkPolicy": {"egress": {"extraRules": [rule]}}})
    assert allowed.one("NetworkPolicy", "-storage")["spec"]["egress"] == [rule]
    assert rule in allowed.one("NetworkPolicy", "-controller")["spec"]["egress"]
