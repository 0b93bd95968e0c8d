# SPDX-License-Identifier: Apache-2.0
"""The storage management as its administrator sees it: straight at the REST API, from inside its pod.

Nothing here uses the driver, so it is an independent observation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]

_CALL = """
import http.cookiejar, json, sys, urllib.request
asked = json.load(sys.stdin)
session = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
def call(method, path, body):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    with session.open(urllib.request.Request(asked["url"] + path, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)
call("POST", "/login", {"username": asked["user"], "password": asked["password"]})
json.dump(call(asked["method"], asked["path"], asked["body"]), sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Login:
    """Where the management is and who may ask it."""

    url: str
    user: str
    password: str


class Storage:
    """Calls the management's API. `python` runs a script with its input where the API can be reached."""

    def __init__(self, python: Callable[[str, str], str], login: Login) -> None:
        self._python = python
        self._login = login

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Log in, make one request, and return the answer."""
        asked = {
            "url": self._login.url, "user": self._login.user, "password": self._login.password,
            "method": method, "path": path, "body": body,
        }  # fmt: skip
        return json.loads(self._python(_CALL, json.dumps(asked)))

    def volumes(self) -> dict[str, Document]:
        """Return every volume by its name."""
        return {str(volume["name"]): volume for volume in self.call("GET", "/volumes/all/0/10000")}

    def snapshots(self) -> dict[str, Document]:
        """Return every snapshot by its name."""
        return {str(snapshot["name"]): snapshot for snapshot in self.call("GET", "/snapshots/all/0/10000")}

    def clients(self) -> dict[str, Document]:
        """Return every storage client by its id."""
        return {str(client["_id"]): client for client in self.call("GET", "/clients/all/0/1000")}

    def create(self, name: str, gigabytes: float) -> Document:
        """Make a volume, as an administrator does by hand, and return it."""
        self._done("/volumes/save", {"name": name, "capacity": gigabytes, "RAIDLevel": "Concatenated", "metadata": {}})
        return self.volumes()[name]

    def delete(self, name: str) -> None:
        """Delete a volume."""
        self._done("/volumes/delete", {"_id": name, "uuid": self.volumes()[name]["uuid"]})

    def _done(self, path: str, item: Mapping[str, object]) -> None:
        (answer,) = self.call("POST", path, [item])
        assert answer["success"], answer


# --- loop devices -----------------------------------------------------------------------------------------------


def loop_devices(uuid: str) -> list[Path]:
    """Return the loop devices of this machine that are bound for the volume: its file is named by its uuid.

    No device is opened for it: one that is open cannot be detached meanwhile, whosever it is.
    """
    found = []
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # let go of while we looked
            if uuid in backing.read_text():
                found.append(Path("/dev", backing.parts[3]))
    return found
