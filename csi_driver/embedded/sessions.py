# SPDX-License-Identifier: Apache-2.0
"""The password of the REST API and the sessions that a login opens."""

from __future__ import annotations

import hmac
import math
import os
import secrets
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import HostFailure
from csi_driver.http_requests import HttpRequest
from csi_driver.status_page.login import OpenSessions, network_of

_MAX_SESSIONS = 4096
_OWN_FILE = "the password file"


class PasswordUnreadable(HostFailure):
    def __init__(self, what: str, path: Path, why: str) -> None:
        super().__init__(f"{what} {path} {why}; expected one line, readable by this user")


def write_secret(path: Path, text: str) -> None:
    """Write a file for its owner only, whole and durable. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True, slots=True)
class Password:
    """A password, in a file that is read at each login. `what`: the file, as errors name it."""

    path: Path
    what: str = _OWN_FILE

    @classmethod
    def generated(cls, path: Path) -> Password:
        """Return the password of this file; a missing file is created with a random one, for its owner only."""
        try:
            if not os.path.lexists(path):
                write_secret(path, secrets.token_urlsafe(24))
        except OSError as problem:
            raise PasswordUnreadable(_OWN_FILE, path, f"cannot be written: {problem}") from problem
        return cls(path)

    def matches(self, password: str) -> bool:
        return hmac.compare_digest(self.read().encode(), password.encode("utf-8", "surrogatepass"))

    def read(self) -> str:
        """Return the password. Raises PasswordUnreadable."""
        try:
            text = self.path.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as problem:
            raise PasswordUnreadable(self.what, self.path, f"cannot be read: {problem}") from problem
        if not text:
            raise PasswordUnreadable(self.what, self.path, "is empty")
        return text


@dataclass(eq=False)
class Sessions:
    """The logins to the API, and their sessions."""

    settings: StorageSettings
    password: Password
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        self._open = OpenSessions(self.settings.session_idle_s, self.clock, longest_s=math.inf, most=_MAX_SESSIONS)

    @property
    def user(self) -> str:
        return self.settings.user.lower()

    def full_name(self, username: str) -> str:
        name = username.lower()
        return name if "@" in name else f"{name}@{self.user.rpartition('@')[2]}"

    def accepts(self, username: str, password: str) -> bool:
        """Return whether the credentials are right. Raises PasswordUnreadable."""
        matches = self.password.matches(password)
        return self.full_name(username) == self.user and matches

    def limit_key(self, request: HttpRequest, username: str) -> Hashable:
        """Return the key by which the login attempts of one client for this user, or for any other, are counted."""
        is_checked_for_another = request.headers.get("user-agent", "").endswith("/status-page")  # by a controller
        return network_of(request.peer), self.full_name(username) == self.user, is_checked_for_another

    def open(self, username: str, password: str) -> str | None:
        """Return the id of a new session; None for wrong credentials."""
        return self._open.open() if self.accepts(username, password) else None

    def known(self, session: str | None) -> bool:
        """Return whether a session is open, and restart its idle time."""
        return self._open.find(session) is not None

    def close(self, session: str | None) -> None:
        self._open.close(session)
