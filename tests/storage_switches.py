# SPDX-License-Identifier: Apache-2.0
"""Switches that block work of an embedded storage manager or set a client DOWN, and points at which it can be crashed.

They wrap methods and ports of a running manager; the product has no hooks for them. As a program it is
`nvmesh-csi storage` with the route POST /tests/hold: `python -m tests.storage_switches [FLAG...]`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from csi_driver.embedded import server as embedded
from csi_driver.embedded.model import ATTACHMENTS, VOLUMES
from csi_driver.embedded.routes import answer
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import (
    Freezes,
    LoopDevices,
    LuksHeaders,
    NvmeTarget,
    Reflinks,
    SparseFiles,
    StorageSettings,
)
from csi_driver.http_requests import HttpRequest, HttpResponse


class Switches:
    """Blocks work by kind: "initialize", "extend", "encrypt", "delete", "client:<name>" (DOWN), "slow:<name>"."""

    def __init__(self, server: StorageServer) -> None:
        self.server = server
        self._held: set[str] = set()
        volumes, attacher, encryptions = server.volumes, server.attacher, server.encryptions
        self._is_served = attacher.is_down
        self._settle = attacher.settle
        self._block(volumes, "finish_creation", "initialize", False)
        self._block(volumes, "finish_extension", "extend", False)
        self._block(volumes, "remove", "delete", False)
        self._encrypt_later: list[tuple[str, Callable[[], bool]]] = []
        self._later = encryptions.worker.later
        encryptions.worker.later = self._unless_encryption_is_held  # type: ignore[method-assign]
        attacher.is_down = self.is_down  # type: ignore[method-assign]
        attacher.settle = self._settle_unless_slow  # type: ignore[method-assign]

    def _block(self, target: object, name: str, kind: str, blocked: object) -> None:
        real = getattr(target, name)
        setattr(target, name, lambda *arguments: blocked if kind in self._held else real(*arguments))

    def is_down(self, client: str) -> bool:
        return f"client:{client}" in self._held or self._is_served(client)

    def _settle_unless_slow(self, client: str, identity: str) -> bool:
        return f"slow:{client}" in self._held or self._settle(client, identity)

    def _unless_encryption_is_held(self, key: str, job: Callable[[], bool], delay_s: float | None = None) -> None:
        if "encrypt" in self._held:
            self._encrypt_later.append((key, job))
        else:
            self._later(key, job, delay_s)

    def hold(self, kind: str) -> None:
        """Block a kind of work."""
        self._held.add(kind)
        if kind == "initialize":
            # Volumes are created in the state of slow work; their files stay sparse.
            self.server.volumes.settings = replace(self.server.settings, preallocate=True)

    def release(self, kind: str) -> None:
        """Stop blocking it, and do the work that was blocked."""
        self._held.discard(kind)
        volumes = self.server.volumes
        if kind == "initialize":
            volumes.settings = self.server.settings
        for volume in self.server.store.all(VOLUMES):
            if kind == "initialize":
                volumes.finish_creation(volume.name)
            elif kind == "extend":
                volumes.finish_extension(volume.name)
            elif kind == "delete" and volume.action == "markedForDeletion":
                volumes.remove_soon(volume.name, volume.uuid)
        if kind == "encrypt":
            for key, job in self._encrypt_later:
                self._later(key, job, 0.0)
            self._encrypt_later.clear()
        if kind.startswith(("client:", "slow:")):
            retry_client(self.server, kind.partition(":")[2])


def retry_client(server: StorageServer, client: str) -> None:
    """Settle everything of a client now, as retries do later."""
    pairs = {(client, wanted.uuid) for wanted in server.store.all(ATTACHMENTS, client)}
    server.attacher.settle_all(pairs | {pair for pair in server.local.pairs() if pair[0] == client})
    for _, identity in pairs:
        server.attacher.grow(identity)


# --- points -----------------------------------------------------------------------------------------------------


class _Port:
    """A port with a point after some of its methods."""

    def __init__(self, target: object, effects: dict[str, Callable[..., object]]) -> None:
        self._target = target
        self._effects = effects

    def __getattr__(self, name: str) -> object:
        return self._effects[name] if name in self._effects else getattr(self._target, name)


def add_points(server: StorageServer, at_point: Callable[[str], None]) -> None:
    """Call `at_point` after each change of the manager: database, files, devices, status files, headers."""

    def after(name: str, target: object) -> Callable[..., object]:
        method = getattr(target, name.partition(".")[2])

        @functools.wraps(method)
        def with_point(*arguments: Any, **named: Any) -> object:
            result = method(*arguments, **named)
            at_point(name)
            return result

        return with_point

    def port(kind: str, target: object, *methods: str) -> Any:
        return _Port(target, {method: after(f"{kind}.{method}", target) for method in methods})

    server.store.write = after("store.write", server.store)  # type: ignore[method-assign, assignment]
    server.store.write_later = after("store.write_later", server.store)  # type: ignore[method-assign, assignment]
    server.pool.make = after("pool.make", server.pool)  # type: ignore[method-assign, assignment]
    server.pool.remove = after("pool.remove", server.pool)  # type: ignore[method-assign, assignment]
    server.pool.begin_reflink = after("pool.begin_reflink", server.pool)  # type: ignore[method-assign, assignment]
    server.pool.complete_reflink = after("pool.complete_reflink", server.pool)  # type: ignore[method-assign, assignment]
    server.pool.remove_snapshot = after("pool.remove_snapshot", server.pool)  # type: ignore[method-assign, assignment]
    server.pool.remove_private = after("pool.remove_private", server.pool)  # type: ignore[method-assign, assignment]
    local = server.local
    local.loops = port("loops", local.loops, "attach", "detach", "fence", "grow")
    for client, files in local.files.items():
        local.files[client] = port("files", files, "show", "hide")
    if server.encryptions.headers is not None:
        server.encryptions.headers = port("headers", server.encryptions.headers, "format")


# --- the program ------------------------------------------------------------------------------------------------


def add_route(server: StorageServer) -> None:
    """Serve POST /tests/hold of {"kind", "held"}, without a login."""
    switches = Switches(server)

    def hold(request: HttpRequest) -> HttpResponse:
        asked = json.loads(request.body)
        (switches.hold if asked["held"] else switches.release)(asked["kind"])
        return answer({"success": True})

    server.api.public["POST", "/tests/hold"] = hold


def _serve_with_switches(
    instead: LuksHeaders | None,
    settings: StorageSettings,
    loops: LoopDevices,
    headers: LuksHeaders | None = None,
    beside: Callable[[StorageServer], AbstractContextManager[object]] = lambda _: nullcontext(),
    reflinks: Reflinks | None = None,
    freezes: Freezes | None = None,
    sparse_files: SparseFiles | None = None,
    target: NvmeTarget | None = None,
) -> int:
    def both(server: StorageServer) -> AbstractContextManager[object]:
        add_route(server)
        return beside(server)

    used = headers if headers is None or instead is None else instead
    return _serve(settings, loops, used, both, reflinks, freezes, sparse_files, target)


_serve = embedded.serve


def install(instead: LuksHeaders | None = None) -> None:
    """Let `nvmesh-csi storage` of this process serve the route, with other LUKS headers than its own if they are given.

    In a pod of the second node's cluster nothing else of the tests can be imported.
    """
    embedded.serve = functools.partial(_serve_with_switches, instead)


if __name__ == "__main__":
    from csi_driver.__main__ import main
    from csi_driver.host.luks import LuksFiles
    from tests.unit.embedded.fake_luks import CHEAP_KEYS

    install(LuksFiles(CHEAP_KEYS))
    sys.exit(main(["storage", *sys.argv[1:]]))
