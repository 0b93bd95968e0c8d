"""The user and password that a login sends, read from mounted files whenever one is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.errors import Unauthenticated
from csi_driver.management.settings import ManagementSettings

_MOST_READS = 3


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user with its password, which shows nowhere."""

    username: str
    password: str = field(repr=False)


def read_credentials(settings: ManagementSettings) -> Credentials:
    """Read the credentials as they are now. Raises `Unauthenticated` naming a file that holds none.

    User and password are two files that are exchanged together: what is read twice the same is one of the pairs.
    """
    found = _read(settings)
    for _ in range(_MOST_READS):
        before, found = found, _read(settings)
        if found == before:
            break
    return found


def _read(settings: ManagementSettings) -> Credentials:
    username = settings.username
    if settings.username_file is not None:
        username = _content(settings.username_file, "user")
    if settings.password:
        return Credentials(username, settings.password)
    if settings.password_file is None:
        raise Unauthenticated(f"no password file is configured for user {username!r}")
    return Credentials(username, _content(settings.password_file, "password"))


def _content(path: Path, what: str) -> str:
    try:
        content = path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise Unauthenticated(f"the {what} file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        # No cause: it would carry the file's bytes.
        raise Unauthenticated(f"the {what} file {path} is not UTF-8") from None
    if not content:
        raise Unauthenticated(f"the {what} file {path} is empty")
    return content
