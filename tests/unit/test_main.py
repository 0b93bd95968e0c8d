# SPDX-License-Identifier: Apache-2.0
"""The program: exit status, a role that serves with health pages and metrics, and the modules that a role loads."""

from __future__ import annotations

import ast
import http.client
import importlib.metadata
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import csi_driver
from csi_driver import __main__ as program
from csi_driver import driver_version
from csi_driver.deadline import Deadline
from csi_driver.host import processes
from csi_driver.node_settings import NVME_DIRECTORY, NodePaths
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc
from tests.documents import code, table, text_of
from tests.fakes.kubelet import Kubelet

SOURCE = Path(csi_driver.__file__).parent


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NVMESH_CSI_", "CSI_"))]:
        monkeypatch.delenv(name)


# --- exit status ------------------------------------------------------------------------------------------------


def test_an_invalid_command_line_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["node", "--zone", "-", "--nonsense"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("--zone", "--nonsense", "--endpoint"))


def test_version_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["version"]) == 0
    assert capsys.readouterr().out == f"{importlib.metadata.version('nvmesh-csi-driver')}\n"


def test_source_code_has_a_version_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["", "archive.zip", str(tmp_path)])
    assert driver_version() == "0+source"


def test_a_role_that_cannot_start_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "node.sock"
    taken.write_text("precious")
    assert program.main(node_argv(tmp_path)) == 1
    assert "expected a socket" in capsys.readouterr().err
    assert taken.read_text() == "precious"


def test_pre_stop_needs_no_api_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(processes, "find_running", lambda roles: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert program.main(["pre-stop", "--driver-name", "unused.example.com"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "no API server is configured" in capsys.readouterr().err


# --- serving ----------------------------------------------------------------------------------------------------


def node_argv(directory: Path) -> list[str]:
    return [
        "node", "--endpoint", str(directory / "node.sock"), "--state-directory", str(directory / "state"),
        "--path-root", str(directory), "--device-directory", str(directory / "dev"),
        "--status-directory", str(directory / "proc"), "--node-name", "node-1",
    ]  # fmt: skip


def controller_argv(directory: Path) -> list[str]:
    (directory / "password").write_text("x")
    return [
        "controller", "--endpoint", str(directory / "controller.sock"), "--management-server", "http://127.0.0.1:1",
        "--management-password-file", str(directory / "password"), "--drain-seconds", "5",
    ]  # fmt: skip


class Client(threading.Thread):
    """Waits for an endpoint, calls it, and ends the program with SIGTERM."""

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self._socket = socket
        self.name_of_plugin = ""
        self.ready: bool | None = None
        self.error: grpc.RpcError | None = None

    def run(self) -> None:
        try:
            with grpc.insecure_channel(f"unix:{self._socket}") as channel:
                identity = csi_pb2_grpc.IdentityStub(channel)
                info = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=120, wait_for_ready=True)
                self.name_of_plugin = info.name
                self.ready = identity.Probe(csi_pb2.ProbeRequest(), timeout=120).ready.value
        except grpc.RpcError as error:
            self.error = error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_node_serves_until_sigterm(tmp_path: Path) -> None:
    client = Client(tmp_path / "node.sock")
    client.start()
    assert program.main(node_argv(tmp_path)) == 0
    client.join()
    assert client.name_of_plugin == "nvmesh-csi.excelero.com"
    assert not (tmp_path / "node.sock").exists()


def test_a_controller_without_management_serves_and_is_not_ready(tmp_path: Path) -> None:
    client = Client(tmp_path / "controller.sock")
    client.start()
    assert program.main(controller_argv(tmp_path)) == 0
    client.join()
    assert client.error is None
    assert client.ready is False


class _LoggedPort(logging.Handler):
    """Takes the port of the health pages from the log: it is a free one, so no other process uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.port: Future[int] = Future()

    def emit(self, record: logging.LogRecord) -> None:
        self.port.set_result(int(record.getMessage().rpartition(":")[2]))


def watched(argv: list[str], look: Callable[[int], None]) -> None:
    """Run the program, call `look` in another thread once the program is healthy, and end it with SIGTERM."""
    logged = _LoggedPort()
    logger = logging.getLogger("csi_driver.telemetry.pages")

    def is_healthy(port: int) -> bool:
        try:
            return page(port, "/healthz")[0] == 200
        except OSError:
            return False

    def watch() -> None:
        try:
            port = logged.port.result(120)
            assert Deadline.after(120).wait_until(lambda: is_healthy(port))
            look(port)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    logger.addHandler(logged)
    try:
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            assert program.main([*argv, "--http-listen", "127.0.0.1:0"]) == 0
            watching.result()
    finally:
        logger.removeHandler(logged)


def page(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def documented_samples(port: int, *roles: str) -> dict[str, float]:
    """Check that roles have exactly the metrics of docs/metrics.md, and return the samples by name and labels."""
    status, text = page(port, "/metrics")
    assert status == 200
    rows = {code(row["metric"])[0]: row for row in table(text_of("metrics.md"), "metric", "kind", "labels", "roles")}
    explained = {name: row["kind"] for name, row in rows.items() if {*roles} & {*row["roles"].split(", ")}}
    assert dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text)) == explained
    for name, labels in re.findall(r"(?m)^([^#{ ]+)\{(.*)\} ", text):
        family = rows.get(name) or rows[re.sub("_(bucket|sum|count)$", "", name)]
        assert set(re.findall(r'(\w+)="', labels)) - {"le"} == set(code(family["labels"]))
    return {name: float(value) for name, value in re.findall(r"(?m)^([^#].*) (\S+)$", text)}


def test_a_node_registers_itself_and_serves_health_pages(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("n")
    kubelet = Kubelet(directory / "r")
    flags = ["--kubelet-registration-directory", str(kubelet.directory)]

    def look(port: int) -> None:
        assert page(port, "/healthz") == (200, "csi: ok\nregistration: ok\n")
        status, text = page(port, "/readyz")
        assert status == 503
        assert "storage: this node has no storage client" in text
        assert "reconcile: ok" in text
        assert Deadline.after(120).wait_until(lambda: bool(kubelet.visit()))
        assert kubelet.nodes == {"nvmesh-csi.excelero.com": "node-1"}
        assert "registration: ok" in page(port, "/readyz")[1]
        samples = documented_samples(port, "node")
        assert samples["nvmesh_csi_kubelet_registered"] == 1
        assert samples['nvmesh_csi_kubelet_verdicts_total{verdict="accepted"}'] == 1
        assert samples['nvmesh_csi_node_volumes{state="published"}'] == 0
        assert (
            samples['nvmesh_csi_rpc_duration_seconds_count{code="OK",method="NodeGetInfo",service="csi.v1.Node"}'] >= 2
        )

    watched([*node_argv(directory), *flags], look)
    kubelet.visit()
    assert kubelet.nodes == {}


def test_a_node_that_connects_volumes_itself_needs_no_storage_client(tmp_path: Path) -> None:
    def look(port: int) -> None:
        text = page(port, "/readyz")[1]
        # This machine may have no NVMe host.
        assert re.search("(?m)^storage: ok$|/dev/nvme-fabrics|multipath", text)
        assert "nvme-paths: ok" in text
        samples = documented_samples(port, "node", "node that uses NVMe/TCP")
        assert samples["nvmesh_csi_nvme_orphans"] == 0

    flags = ["--kubelet-registration-directory", str(tmp_path / "r"), "--nvme-directory", str(tmp_path / "nvme")]
    (tmp_path / "r").mkdir()
    watched([*node_argv(tmp_path), *flags], look)


def test_a_controller_without_management_is_healthy(tmp_path: Path) -> None:
    def look(port: int) -> None:
        assert page(port, "/healthz") == (200, "csi: ok\n")
        status, text = page(port, "/readyz")
        assert status == 503
        assert re.search(r"(?m)^management: .*127\.0\.0\.1:1", text)
        samples = documented_samples(port, "controller")
        server = 'server="http://127.0.0.1:1",zone="single-zone-cluster"'
        assert samples[f"nvmesh_csi_management_server_up{{{server}}}"] == 0
        assert samples[f"nvmesh_csi_management_server_failures_total{{{server}}}"] == 1
        assert samples[f'nvmesh_csi_management_requests_total{{outcome="unreachable",{server}}}'] >= 1

    watched(controller_argv(tmp_path), look)


def test_a_storage_manager_serves_health_pages(tmp_path: Path) -> None:
    def look(port: int) -> None:
        assert page(port, "/healthz") == (200, "api: ok\n")
        # No background thread: failing work on one volume must not remove the manager from its Service.
        assert page(port, "/readyz") == (200, "api: ok\npool: ok\n")
        samples = documented_samples(port, "storage")
        pool = [samples[f'nvmesh_csi_storage_pool_bytes{{state="{state}"}}'] for state in ("capacity", "allocatable")]
        assert pool == [64 << 20, 64 << 20]
        assert any('driver_name="fast.example.com"' in name for name in samples)

    argv = [
        "storage", "--driver-name", "fast.example.com", "--size", "64MiB",
        "--pool", str(tmp_path / "pool"), "--listen", "127.0.0.1:0",
        "--device-directory", str(tmp_path / "dev"), "--status-directory", str(tmp_path / "proc"), "--reserve", "0",
    ]  # fmt: skip
    watched(argv, look)


def test_a_role_does_not_start_on_a_used_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        given = ["--http-listen", address, "--kubelet-registration-directory", str(tmp_path)]
        assert program.main([*node_argv(tmp_path), *given]) == 1
    assert f"cannot listen on {address}" in capsys.readouterr().err
    left = {"reconcile", "registration"}
    assert Deadline.after(120).wait_until(lambda: not left & {thread.name for thread in threading.enumerate()})


# --- loaded modules ---------------------------------------------------------------------------------------------


def loaded_by(modules: set[str]) -> set[str]:
    """Return all modules that an import of these loads; imports inside functions do not count."""
    todo, seen = list(modules), set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if module.partition(".")[0] == "csi_driver":
            todo += imports_of(module)
    return seen


def imports_of(module: str) -> set[str]:
    base = SOURCE.parent.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        return set()  # a name in a module, not a module
    found = {module.rpartition(".")[0]} - {""}
    for node in at_once(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(source), level=0):
                found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the code that an import runs: no functions, no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from at_once(node)


def imported_in(*functions: str) -> set[str]:
    """Return the modules that these functions of `csi_driver.serving` or `csi_driver.__main__` import."""
    trees = [ast.parse((SOURCE / name).read_text()) for name in ("serving.py", "__main__.py")]
    bodies = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {
        name
        for function in functions
        for node in ast.walk(bodies[function])
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }


def top_levels(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


START = loaded_by({"csi_driver.__main__"})


def test_help_and_version_load_no_framework() -> None:
    heavy = {
        "grpc",
        "google",
        "requests",
        "urllib3",
        "pydantic",
        "sqlite3",
        "pyudev",
        "ssl",
        "asyncio",
    }
    assert not top_levels(START) & heavy


def test_the_node_loads_no_rest_client_and_no_web_framework() -> None:
    node = imported_in("run_node", "_node_use_cases", "_node_zone", "_register_and_report")
    loaded = loaded_by(START | {"csi_driver.config.csi_commands", "csi_driver.serving"} | node)
    assert "grpc" in top_levels(loaded)
    assert not top_levels(loaded) & {"requests", "urllib3", "pydantic", "sqlite3"}
    assert not loaded & {
        "csi_driver.embedded.server", "csi_driver.management.client", "csi_driver.management.transport",
        "csi_driver.controller.publish",
    }  # fmt: skip
    assert "csi_driver.node.stage" in loaded


def test_a_node_that_connects_no_volumes_loads_no_connector_for_nvme() -> None:
    node = imported_in("run_node", "_node_use_cases", "_node_zone", "_register_and_report")
    loaded = loaded_by(START | {"csi_driver.config.csi_commands", "csi_driver.serving"} | node)
    connector = {module for module in loaded if module.startswith("csi_driver.host.") and "nvme_" in module}
    assert not connector | {"csi_driver.host.connectors.nvme"} & loaded
    paths = NodePaths(nvme_directory=None)
    assert (paths.nvme_registry("node-1") is not None) is NVME_DIRECTORY.is_dir()


def test_the_controller_loads_no_web_framework_and_no_libc() -> None:
    controller = imported_in("run_controller", "_controller_use_cases")
    loaded = loaded_by(START | {"csi_driver.config.csi_commands", "csi_driver.serving"} | controller)
    assert "grpc" in top_levels(loaded)
    assert not top_levels(loaded) & {"pydantic", "sqlite3", "ctypes", "pyudev"}


def test_the_storage_manager_loads_no_grpc() -> None:
    loaded = loaded_by(START | {"csi_driver.config.local_commands"} | imported_in("_storage"))
    assert "pydantic" in top_levels(loaded)
    assert not top_levels(loaded) & {"grpc", "google", "asyncio"}


def test_only_the_composition_root_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv|putenv)\b", path.read_text())
    }
    assert readers <= {"__main__.py"}
