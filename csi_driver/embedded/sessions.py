"""Who may call: one user, whose password is in a file, and the sessions that a login opens (in memory only)."""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import HostFailure, InvalidRequest

_MOST_SESSIONS = 4096


class PasswordUnreadable(HostFailure):
    """The password file cannot be used."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"the password file {path} {why}; expected one line, the password, readable by this user")


class PasswordFixed(InvalidRequest):
    """The password file was given to the manager, which does not change it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"the password is the content of {path}, which the manager does not change; edit the file")


class Password:
    """The password, read from its file again whenever the file has changed."""

    def __init__(self, path: Path, *, ours: bool) -> None:
        """`ours`: make the file with a generated password if there is none, readable by its owner alone."""
        self.path = path
        self._ours = ours
        self._stamp: tuple[int, int, int] | None = None
        self._text = ""
        if ours and not os.path.lexists(path):
            self._write(secrets.token_urlsafe(24))
        self._read()

    def matches(self, password: str) -> bool:
        return hmac.compare_digest(self._read().encode(), password.encode("utf-8", "surrogatepass"))

    def change(self, password: str) -> None:
        """Replace the password. Raises PasswordFixed if the file was given to us."""
        if not self._ours:
            raise PasswordFixed(self.path)
        self._write(password)

    def _read(self) -> str:
        try:
            found = self.path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                self._text = self.path.read_text().rstrip("\n")
                self._stamp = stamp
        except (OSError, UnicodeDecodeError) as problem:
            raise PasswordUnreadable(self.path, f"cannot be read: {problem}") from problem
        if not self._text:
            raise PasswordUnreadable(self.path, "is empty")
        return self._text

    def _write(self, password: str) -> None:
        try:
            self._replace(password)
        except OSError as problem:
            raise PasswordUnreadable(self.path, f"cannot be written: {problem}") from problem

    def _replace(self, password: str) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(password + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


class Sessions:
    """Open sessions. Each ends after a time without requests."""

    def __init__(self, settings: StorageSettings, password: Password, clock: Clock = SYSTEM_CLOCK) -> None:
        self.user = settings.user.lower()
        self.idle_s = settings.session_idle_s
        self.must_change_password = settings.test_switches.must_change_password
        self._password = password
        self._clock = clock
        self._guard = threading.Lock()
        self._used_s: dict[str, float] = {}

    def full_name(self, username: str) -> str:
        """Return the e-mail address that a user name stands for."""
        name = username.lower()
        return name if "@" in name else f"{name}@{self.user.rpartition('@')[2]}"

    def open(self, username: str, password: str) -> str | None:
        """Return the id of a new session, or None for wrong credentials."""
        right = self._password.matches(password)
        if self.full_name(username) != self.user or not right:
            return None
        with self._guard:
            self._forget_old()
            session = secrets.token_urlsafe(24)
            self._used_s[session] = self._clock.monotonic()
        return session

    def known(self, session: str | None) -> bool:
        """Tell whether a session is open, and keep it open."""
        if session is None:
            return False
        with self._guard:
            used_s = self._used_s.get(session)
            now_s = self._clock.monotonic()
            if used_s is None or now_s - used_s > self.idle_s:
                self._used_s.pop(session, None)
                return False
            self._used_s[session] = now_s
            return True

    def close(self, session: str | None) -> None:
        with self._guard:
            self._used_s.pop(session or "", None)

    def change_password(self, password: str) -> None:
        self._password.change(password)
        self.must_change_password = False

    def _forget_old(self) -> None:
        oldest_s = self._clock.monotonic() - self.idle_s
        for session, used_s in list(self._used_s.items()):
            if used_s < oldest_s:
                del self._used_s[session]
        while len(self._used_s) >= _MOST_SESSIONS:
            del self._used_s[min(self._used_s, key=lambda session: self._used_s[session])]
