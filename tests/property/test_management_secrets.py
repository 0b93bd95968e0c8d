# SPDX-License-Identifier: Apache-2.0
"""No response or fault of a management server reveals a password, session id or passphrase."""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import Volume
from tests.unit.management.double import USER, Breaks, ManagementDouble, Says, SaysRaw, Step, sample, serving

PASSWORD = "canary-password-7f3a"
SESSION = "canary-session-91bc"
PASSPHRASE = "canary-passphrase-55de"
CANARIES = (PASSWORD, SESSION, PASSPHRASE)
EVERYTHING = f"your request: {PASSWORD} Cookie: connect.sid=s%3A{SESSION} s:{SESSION} body {PASSPHRASE}"
VOLUME = Volume("v1", "74025fd0-e73d-11f1-a2b3-7550e9e5980f", 2441216, 4096, 10.0, "online", "none")
Call: TypeAlias = Callable[[ManagementClient, Deadline], object]


def echoes(secrets: str) -> st.SearchStrategy[Step]:
    """Return responses that quote the request, in every place that an error may show."""
    statuses = st.sampled_from([200, 400, 401, 403, 404, 413, 422, 500, 502, 503])
    error = {"id": 422, "message": secrets, "innerMessage": {"id": 1664, "message": secrets}}
    bodies = st.sampled_from(
        [
            {"_id": secrets, "uuid": None, "success": False, "error": error, "payload": None},
            [{"_id": secrets, "uuid": secrets, "success": False, "error": error, "payload": None}],
            {"success": False, "error": secrets},
            [secrets],
            secrets,
        ]
    )
    return st.one_of(
        st.builds(Says, bodies, statuses),
        st.builds(SaysRaw, st.just(f"<html>{secrets}</html>".encode()), statuses),
        st.builds(SaysRaw, st.just(secrets.encode()), promised=st.just(10_000)),
        st.builds(SaysRaw, st.just(b""), st.just(302), location=st.sampled_from([f"/elsewhere?{secrets}", "/login"])),
        st.just(Breaks()),
    )


def encrypt(client: ManagementClient, deadline: Deadline) -> None:
    """Send a passphrase."""
    client.init_encryption(VOLUME, PASSPHRASE, slot=1, key_size_bits=512, deadline=deadline)


CALLS: dict[str, tuple[str, str, Call]] = {
    "read": ("GET", "/volumes/v1", lambda client, deadline: client.volume("v1", deadline=deadline)),
    "list": (
        "GET",
        "/volumes/all/0/0",
        lambda client, deadline: list(client.volumes(after="", limit=0, deadline=deadline)),
    ),
    "change": (
        "POST",
        "/volumes/update",
        lambda client, deadline: client.set_metadata(VOLUME, {}, deadline=deadline),
    ),
    "delete": ("POST", "/volumes/delete", lambda client, deadline: client.delete_volume(VOLUME, deadline=deadline)),
    "version": ("GET", "/systemInfo", lambda client, deadline: client.system_info(deadline=deadline)),
    "passphrase": (
        "POST",
        "/volumes/initEncryption",
        encrypt,
    ),
}


class Records(logging.Handler):
    """Keeps all records of all levels."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {record.args!r} {record.exc_info!r}")


@contextmanager
def all_records() -> Iterator[Records]:
    root = logging.getLogger()
    records, level = Records(), root.level
    root.addHandler(records)
    root.setLevel(logging.NOTSET)
    try:
        yield records
    finally:
        root.removeHandler(records)
        root.setLevel(level)


class CanaryDouble(ManagementDouble):
    """Opens sessions with a canary as id."""

    def log_in(self, body: object) -> tuple[Step, str]:
        step, cookie = super().log_in(body)
        if cookie:
            cookie = f"connect.sid=s%3A{SESSION}.{len(self.logins)}"
            self.sessions.add(cookie)
        return step, cookie


def told(error: BaseException) -> str:
    """Return the printed forms of an error and its causes."""
    words = traceback.format_exception(error)
    link: BaseException | None = error
    while link is not None:
        words += [repr(link), str(link.args), str(getattr(link, "__dict__", {}))]
        link = link.__cause__ or link.__context__
    return "\n".join(words)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(CALLS)), st.booleans())
def test_no_secret_shows_in_any_log_or_error(data: st.DataObject, name: str, at_login: bool) -> None:
    method, path, call = CALLS[name]
    # At the login and with a secret body everything may come back; elsewhere the server knows the session alone.
    secrets = EVERYTHING if at_login or name == "passphrase" else f"Cookie: connect.sid=s%3A{SESSION}.1"
    with serving(CanaryDouble()) as server, tempfile.TemporaryDirectory() as directory, all_records() as records:
        server.password = PASSWORD
        server.on("GET", "/systemInfo", Says(sample("system-info")))
        answer = data.draw(echoes(secrets))
        if at_login:
            server.login_answer = answer
        else:
            server.on(method, path, answer)
        password_file = Path(directory) / "password"
        password_file.write_text(PASSWORD)
        made = ManagementSettings(servers=(server.url,), username=USER, password_file=password_file)
        said = [repr(made)]
        with closing(ManagementClient(made)) as client:
            try:
                said.append(repr(call(client, Deadline.after(60))))
            except DriverError as error:
                said.append(told(error))
    said += records.lines
    assert [canary for canary in CANARIES for text in said if canary in text] == [], said
