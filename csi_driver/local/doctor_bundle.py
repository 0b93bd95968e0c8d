# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi doctor --bundle` and `--scan`: the support bundle of this machine, and the search for its secrets.

`kubectl nvmesh doctor --bundle` makes a bundle of a cluster, and has it searched in the pods of the roles: there the
secrets are known, and there they stay.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from csi_driver import driver_version
from csi_driver.host_model import RunningRole
from csi_driver.local import bundle
from csi_driver.settings import ApiSettings

ROLES = ("controller", "node", "storage", "local")
_PUBLIC = re.compile(r"--(.*-)?(user|ca|certificate|cert|clusters|pid|topology)-file$|--.*configuration$")
_PUBLIC_NAME = re.compile(r"^(ca|user|username)(\.crt|\.pem)?$|\.crt$")
_SECRET_VARIABLE = re.compile(r"(?i)password|passphrase|secret|token|credential")
_INLINE = re.compile(r"""(?i)password["']?\s*[=:]\s*["']?([^\s"',}]+)""")
_PATH = re.compile(r"/[\w./-]+")
_FILE_LIMIT_BYTES = 64 << 10
_LOG_TAIL_BYTES = 4 << 20
_PAGE_S = 5.0


def secrets_of(roles: Sequence[RunningRole]) -> dict[str, str]:
    """Return the secrets of the roles by where they are from: files, variables, the token of the service account."""
    found: dict[str, str] = {}
    files: set[Path] = {ApiSettings().account / "token"}
    for role in roles:
        for name, value in _flags_of(role):
            if name == "--clusters-file":
                for path in [Path(value), *_files_in(Path(value))]:
                    text = _content(path)
                    files |= {Path(each) for each in _PATH.findall(text)}
                    found |= {f"{path}, password {index}": each for index, each in enumerate(_INLINE.findall(text))}
            elif name.endswith("-file") and not _PUBLIC.fullmatch(name):
                files.add(Path(value))
            elif name == "--kubernetes-account":
                files.add(Path(value) / "token")
            elif name in ("--pool", "--directory"):
                files |= {Path(value) / "password", Path(value) / "pool" / "password"}
                files |= {*_files_in(Path(value) / "keys")}
            elif name == "--state-directory":
                files.add(Path(value) / "nvme-keys.json")
        found |= {
            f"variable {key}": text for key, text in role.environ.items() if _SECRET_VARIABLE.search(key) and text
        }
    is_public = re.compile(r"(^|/)(ca|user|username|tls)(\.crt|\.pem)?$|\.crt$")
    found |= {str(path): text for path in sorted(files) if not is_public.search(str(path)) and (text := _content(path))}
    return {place: text for place, text in found.items() if not _is_a_path(text)}


def _is_a_path(text: str) -> bool:
    return text.startswith("/") and "\n" not in text.strip() and Path(text.strip()).exists()


def _flags_of(role: RunningRole) -> Iterator[tuple[str, str]]:
    words = iter(role.arguments)
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name, value if equals else next(words, "")
    for key, value in role.environ.items():
        if key.startswith("NVMESH_CSI_"):
            yield "--" + key.removeprefix("NVMESH_CSI_").lower().replace("_", "-"), value


def _files_in(path: Path) -> list[Path]:
    with suppress(OSError):
        return [each for each in sorted(path.iterdir()) if each.is_file()]
    return []


def _content(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return source.read(_FILE_LIMIT_BYTES).decode(errors="surrogateescape") if path.is_file() else ""
    except OSError:
        return ""


def scan(content: bytes, roles: Sequence[RunningRole]) -> list[str]:
    """Return where the secrets are from that the content has."""
    return sorted(set(bundle.Secrets(secrets_of(roles)).find(content)))


def make(path: Path, findings: str, roles: Sequence[RunningRole]) -> str:
    """Write the bundle of this machine, unless it has a secret. `findings`: the document of the doctor."""
    shown = [{"role": each.role, "pid": each.pid, "arguments": bundle.redact([*each.arguments])} for each in roles]
    files = {
        "doctor.json": json.dumps(bundle.redact(json.loads(findings)), indent=2),
        "versions.json": json.dumps({"driver": driver_version(), "kernel": list(os.uname())}, indent=2),
        "roles.json": json.dumps(shown, indent=2),
        **dict(_pages(roles)),
        **dict(_logs(roles)),
    }
    content = bundle.archive(files)
    bundle.refuse(scan(content, roles))
    bundle.write(path, content)
    return f"wrote {path}: {len(files)} files, searched for {len(secrets_of(roles))} secrets"


def _pages(roles: Sequence[RunningRole]) -> Iterator[tuple[str, str]]:
    for role in roles:
        address: Mapping[str, str] = dict(_flags_of(role))
        host, _, port = address.get("--http-listen", "").rpartition(":")
        if not port.isdigit() or port == "0":
            continue
        for page in ("readyz", "metrics"):
            yield f"{role.role}/{page}.txt", bundle.scrub(_page(host.strip("[]") or "localhost", int(port), page))


def _page(host: str, port: int, page: str) -> str:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=_PAGE_S)) as connection:
            connection.request("GET", f"/{page}")
            return connection.getresponse().read(bundle.LIMIT_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as problem:
        return f"not read: {problem}\n"


def _logs(roles: Sequence[RunningRole]) -> Iterator[tuple[str, str]]:
    """Yield the ends of the logs that `nvmesh-csi local` writes; other roles log to their container or journal."""
    for role in roles:
        directory = dict(_flags_of(role)).get("--directory", "")
        for log in _files_in(Path(directory)) if role.role == "local" and directory else ():
            if log.suffix == ".log":
                with log.open("rb") as source:
                    source.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
                    yield f"logs/{log.name}", bundle.scrub(source.read().decode(errors="replace"))
