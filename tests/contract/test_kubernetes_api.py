"""The label of a node, against a small API server that speaks real HTTPS: its patches, its tokens, and its faults."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from csi_driver.kubernetes.api import ApiFailed, ApiServer
from csi_driver.kubernetes.settings import ApiSettings
from tests.contract.pki import Authority, Pair

NODE = "/api/v1/nodes/node-1"
LABEL = "nvmesh-csi/client-status"


@dataclass
class Cluster:
    """What the server knows: the labels of its nodes, who may ask, and what goes wrong next."""

    nodes: dict[str, dict[str, str]] = field(default_factory=lambda: {NODE: {"kubernetes.io/os": "linux"}})
    token: str = "first"
    faults: list[str] = field(default_factory=list)
    requests: int = 0
    released: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """PATCH of a node with a JSON merge patch (RFC 7386), as far as labels go."""

    cluster: Cluster

    def do_PATCH(self) -> None:
        self.cluster.requests += 1
        change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.cluster.faults.pop(0) if self.cluster.faults else ""
        if fault == "hang":
            self.cluster.released.wait(30)
        elif fault == "close":
            pass
        elif fault == "garbage":
            self.wfile.write(b"not HTTP at all\r\n\r\n")
        elif fault:
            self._answer(int(fault), {"kind": "Status", "message": f"fault {fault}"})
        else:
            self._patch(change)

    def _patch(self, change: dict[str, dict[str, dict[str, str | None]]]) -> None:
        if self.headers["Authorization"] != f"Bearer {self.cluster.token}":
            self._answer(401, {"message": "Unauthorized"})
        elif self.headers["Content-Type"] != "application/merge-patch+json":
            self._answer(415, {"message": "the body of the request was in an unknown format"})
        elif self.path not in self.cluster.nodes:
            self._answer(404, {"message": "nodes not found"})
        else:
            labels = self.cluster.nodes[self.path]
            for key, value in change["metadata"]["labels"].items():
                if value is None:
                    labels.pop(key, None)
                else:
                    labels[key] = value
            self._answer(200, {"metadata": {"labels": labels}})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        pass


class Quiet(ThreadingHTTPServer):
    """Says nothing about clients that refuse it or go away."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@dataclass
class Api:
    """A served cluster, with a service account's files to reach it."""

    cluster: Cluster
    account: Path
    port: int
    authority: Authority

    def client(self, timeout_s: float = 10.0) -> ApiServer:
        return ApiServer(ApiSettings("127.0.0.1", self.port, self.account, timeout_s))

    def label(self, value: str | None = "ready", node: str = "node-1") -> None:
        self.client().label_node(node, {LABEL: value})


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair, Authority]:
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory / "cluster", "cluster")
    return authority, authority.issue("apiserver"), Authority(directory / "other", "other")


@contextlib.contextmanager
def served(cluster: Cluster, authority: Authority, pair: Pair, account: Path) -> Iterator[Api]:
    """Serve the cluster, with a service account's files in `account`."""
    handler = type("Bound", (Handler,), {"cluster": cluster})
    server = Quiet(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    (account / "token").write_text(f"{cluster.token}\n")
    (account / "ca.crt").write_bytes(authority.certificate.read_bytes())
    try:
        yield Api(cluster, account, server.server_address[1], authority)
    finally:
        cluster.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def api(tmp_path: Path, pki: tuple[Authority, Pair, Authority]) -> Iterator[Api]:
    authority, pair, _ = pki
    with served(Cluster(), authority, pair, tmp_path) as api:
        yield api


def test_a_label_is_set_and_taken_away_and_the_others_stay(api: Api) -> None:
    for value, expected in (("ready", {LABEL: "ready"}), ("ready", {LABEL: "ready"}), (None, {}), (None, {})):
        api.label(value)
        assert api.cluster.nodes[NODE] == {"kubernetes.io/os": "linux"} | expected


def test_a_token_that_was_replaced_is_taken_without_a_restart(api: Api) -> None:
    client = api.client()
    client.label_node("node-1", {LABEL: "ready"})
    api.cluster.token = "second"
    with pytest.raises(ApiFailed, match="Unauthorized") as refused:
        client.label_node("node-1", {LABEL: None})
    assert refused.value.status == 401
    (api.account / "token").write_text("second")
    client.label_node("node-1", {LABEL: None})
    assert LABEL not in api.cluster.nodes[NODE]


def test_a_server_that_cannot_be_verified_is_told_nothing(api: Api, pki: tuple[Authority, Pair, Authority]) -> None:
    _, _, other = pki
    (api.account / "ca.crt").write_bytes(other.certificate.read_bytes())
    with pytest.raises(ApiFailed, match="CERTIFICATE_VERIFY_FAILED"):
        api.label()
    assert api.cluster.requests == 0
    (api.account / "ca.crt").write_bytes(api.authority.certificate.read_bytes())
    api.label()


@pytest.mark.parametrize("fault", ["302", "401", "403", "404", "409", "422", "429", "500", "503", "close", "garbage"])
def test_a_fault_is_told_and_the_next_try_succeeds(api: Api, fault: str) -> None:
    api.cluster.faults.append(fault)
    with pytest.raises(ApiFailed) as failed:
        api.label()
    assert failed.value.status == (int(fault) if fault.isdigit() else None)
    assert "first" not in str(failed.value), "the token"
    api.label()
    assert api.cluster.nodes[NODE][LABEL] == "ready"


def test_a_server_that_hangs_is_given_up(api: Api) -> None:
    api.cluster.faults.append("hang")
    with pytest.raises(ApiFailed, match="timed out"):
        api.client(timeout_s=0.2).label_node("node-1", {LABEL: "ready"})


def test_what_is_missing_is_named(api: Api) -> None:
    with pytest.raises(ApiFailed, match="not found") as absent:
        api.label(node="no such/node")
    assert absent.value.status == 404
    (api.account / "token").unlink()
    with pytest.raises(ApiFailed, match="token"):
        api.label()


def test_a_server_that_is_not_there_is_told(tmp_path: Path, api: Api) -> None:
    client = ApiServer(ApiSettings("127.0.0.1", 1, api.account))
    with pytest.raises(ApiFailed, match="refused"):
        client.label_node("node-1", {LABEL: "ready"})
