# SPDX-License-Identifier: Apache-2.0
"""Support bundles without secrets: redact documents and text, look for known secrets, write the archive.

Redaction removes possible secrets by their place or form. Then the finished bundle is searched for every secret that
is known where the driver runs; one that is found, in any usual encoding, ends the attempt before a file exists.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

from csi_driver.errors import PreconditionFailed

REDACTED = "REDACTED"
_SENSITIVE = (
    r"pass(?:word|phrase|code|wd)|secret|token|credential|keyring"
    r"|(?:api|private|access|encryption|shared|signing|account|master|luks|ssh|auth)[._-]?key"
)
_SECRET_NAME = re.compile(rf"(?i){_SENSITIVE}|authorization")
_NAMES_A_SECRET = re.compile(
    r"(?i)(secret|token|key)[-_]?(name|namespace|ref|keyref)$|(secret|password|token)s?[-_]?file$"
)
"""Keys with such an end hold the name or place of a secret."""
_KEPT_ANNOTATIONS = re.compile(
    r"(pv|volume|volume\.beta|csi\.alpha|storageclass|deployment|snapshot\.storage|storage\.alpha)\.kubernetes\.io/"
    r"|deprecated\.daemonset\.template\.generation$"
)
_DROPPED = {"managedFields", "stringData", "binaryData"}
_ASSIGNED = re.compile(
    rf"""(?i)([\w.-]*(?:{_SENSITIVE})[\w.-]*[\\"']*\s*[=:]\s*)"""
    # Quoted, even within a quoted text; else up to the next space.
    r"""(?:(\\+["']).*?(?:\2|$)|"(?:[^"\\]|\\.)*"?|'[^']*'?|[^\s"]+)"""
)
_NVME_KEY = re.compile(r"DHHC-1:[0-9]{2}:[\w+/=-]+:?")
_PATTERNS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), rf"\1 {REDACTED}"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), REDACTED),
    (_NVME_KEY, REDACTED),
)
_ENDS_WITH_FILE = re.compile(r"(?i)(file|name|namespace|ref|path|directory)[\\\"']*\s*[=:]\s*$")
_OPTION = re.compile(r"([A-Za-z0-9_.:-]+)=.*", re.DOTALL)


def scrub(text: str) -> str:
    """Return text without what looks like a credential."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return _ASSIGNED.sub(lambda found: found[0] if _ENDS_WITH_FILE.search(found[1]) else found[1] + REDACTED, text)


def redact(document: object, key: str = "") -> object:
    """Return a document of Kubernetes or of the driver without values that may be secrets."""
    if isinstance(document, str):
        return REDACTED if _is_secret(key) else scrub(document)
    if isinstance(document, list):
        if key in ("mountOptions", "mount_flags"):
            return [_OPTION.sub(rf"\1={REDACTED}", str(each)) for each in document]
        if key == "env":
            return [{name: REDACTED if name == "value" else value for name, value in each.items()} for each in document]
        # The value of an option may be the next word.
        return [
            redact(each, before.lstrip("-") if str(before).startswith("-") and "=" not in before else key)
            for before, each in zip(["", *document], document, strict=False)
        ]
    if not isinstance(document, Mapping):
        return document
    if key == "annotations":
        kept = {name: text for name, text in document.items() if _KEPT_ANNOTATIONS.match(name)}
        return {name: scrub(str(kept[name])) if name in kept else REDACTED for name in document}
    if document.get("kind") == "Secret" or key in ("data", "nodePublishSecret"):
        return dict.fromkeys(document, REDACTED)
    return {name: redact(value, str(name)) for name, value in document.items() if name not in _DROPPED}


def _is_secret(key: str) -> bool:
    return bool(_SECRET_NAME.search(key)) and not _NAMES_A_SECRET.search(key)


# --- proof ------------------------------------------------------------------------------------------------------

_WORD, _LONG = 8, 12
"""A secret below `_WORD` is looked for as a whole word: as a part of others it is everywhere. From `_LONG` on it is
found across lines and spaces too."""


class Secrets:
    """Known secrets, in every form in which text may have them."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        """`secrets`: values by where they are from, such as a file's path."""
        self._forms = [
            (place, how, form)
            for place, text in secrets.items()
            for value in _values(text)
            for how, form in _forms_of(value)
        ]

    def __repr__(self) -> str:
        return f"Secrets({len(self._forms)} forms)"

    def find(self, content: bytes) -> Iterator[str]:
        """Yield where each secret in the content is from, and in which form it is there; never the secret."""
        joined = _joined(content)
        for place, how, form in self._forms:
            if form not in content:
                if len(short := _joined(form)) >= _LONG and short in joined:
                    yield f"{place} ({how}, in several lines)"
                continue
            is_word = re.search(rb"(?<![A-Za-z0-9])" + re.escape(form) + rb"(?![A-Za-z0-9])", content) is not None
            if len(form) >= _WORD or how == "base64" or is_word:
                yield f"{place} ({how})"


def _joined(content: bytes) -> bytes:
    return content.replace(b"\\n", b"").translate(None, b" \t\r\n")


def _values(text: str) -> Iterator[str]:
    """Yield the secret in a file: a password, the lines of a key, or the keys of NVMe in it."""
    if keys := _NVME_KEY.findall(text):
        yield from keys
        return
    lines = [line for line in text.splitlines() if len(line) >= 40 and not line.startswith("-----")]
    yield from lines if "-----BEGIN" in text and lines else filter(None, [text.strip()])


_ESCAPED_BYTE = re.compile("%[0-9A-F]{2}")
_HTML_SAFE = {ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}
"""As Go's JSON has them."""


def _forms_of(value: str) -> Iterator[tuple[str, bytes]]:
    raw = value.encode("utf-8", "surrogateescape")
    forms = {"plain": {raw}, "base64": set[bytes](), "URL-encoded": set[bytes](), "escaped": set[bytes]()}
    for offset in range(3):  # within a longer text it may begin at each of three places
        for alphabet in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = alphabet(b"\0" * offset + raw)
            # Characters at the ends share bits with neighbours.
            start, end = (offset * 8 + 5) // 6, (offset + len(raw)) * 8 // 6
            forms["base64"].add(encoded[start:end])
    for safe in ("/", ""):
        quoted = quote(raw, safe=safe)
        for each in (quoted, quote_plus(raw, safe=safe)):
            forms["URL-encoded"] |= {each.encode(), _ESCAPED_BYTE.sub(lambda found: found[0].lower(), each).encode()}
    for is_ascii in (True, False):
        text = json.dumps(value, ensure_ascii=is_ascii)[1:-1]
        for each in (text, text.translate(_HTML_SAFE)):
            twice = json.dumps(each, ensure_ascii=is_ascii)[1:-1]
            forms["escaped"] |= {each.encode("utf-8", "surrogateescape"), twice.encode("utf-8", "surrogateescape")}
    forms["escaped"].add(ascii(value)[1:-1].encode())
    forms["hexadecimal"] = {raw.hex().encode(), raw.hex().upper().encode()}
    for how, texts in forms.items():
        yield from ((how, text) for text in texts if len(text) >= min(4, len(raw)))


# --- archive ----------------------------------------------------------------------------------------------------

LIMIT_BYTES = 64 << 20


def archive(files: Mapping[str, str]) -> bytes:
    """Return the files as an uncompressed tar archive. Raises `PreconditionFailed` if they are too large."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, text in sorted(files.items()):
            content = text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"nvmesh-csi-bundle/{name}")
            entry.size, entry.mode = len(content), 0o600
            tar.addfile(entry, io.BytesIO(content))
    if target.tell() > LIMIT_BYTES:
        raise PreconditionFailed(f"the bundle has {target.tell()} bytes, expected at most {LIMIT_BYTES}")
    return target.getvalue()


def refuse(found: Iterable[str]) -> None:
    """Raise `PreconditionFailed` if secrets were found."""
    places = sorted(set(found))
    if places:
        raise PreconditionFailed(
            f"the bundle was not written: it has the secret of {', '.join(places)}. Report this as a defect; if the "
            "secret is a common word, change it"
        )


def write(path: Path, content: bytes) -> None:
    """Write a checked archive, compressed, for its owner alone. Raises `PreconditionFailed` if the file exists."""
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as target:
            target.write(gzip.compress(content))
    except OSError as problem:
        raise PreconditionFailed(f"the bundle cannot be written to {path}: {problem.strerror}") from problem
