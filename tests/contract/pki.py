# SPDX-License-Identifier: Apache-2.0
"""Certificate authorities and certificates for tests, made with the openssl program."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM files both."""

    certificate: Path
    key: Path

    def replace_by(self, other: Pair) -> None:
        """Exchange both for another pair, as a renewal does."""
        shutil.copy(other.certificate, self.certificate)
        shutil.copy(other.key, self.key)

    def copied_to(self, directory: Path) -> Pair:
        copy = Pair(directory / self.certificate.name, directory / self.key.name)
        copy.replace_by(self)
        return copy


class Authority:
    """A certificate authority of a test."""

    def __init__(self, directory: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("makes certificates with openssl; install openssl")
        directory.mkdir()
        self._directory = directory
        self._own = Pair(directory / "ca.pem", directory / "ca-key.pem")
        usage = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        self._make(self._own, f"/CN={name}", usage)
        self.certificate = self._own.certificate

    def issue(self, name: str, *, subject: str = "", host: str = "IP:127.0.0.1", use: str = "serverAuth") -> Pair:
        """Issue a certificate for a server (`host`), or with use "clientAuth" for a client."""
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}-key.pem")
        extensions = ("basicConstraints=CA:FALSE", f"subjectAltName={host}", f"extendedKeyUsage={use}")
        signed_by = ("-CA", str(self._own.certificate), "-CAkey", str(self._own.key))
        self._make(pair, subject or f"/CN={name}", extensions, *signed_by)
        return pair

    def issue_between(self, name: str, first: str, last: str) -> Pair:
        """Issue a certificate for a server on 127.0.0.1 that is valid between two moments, YYYYMMDDHHMMSSZ."""
        pair = self.issue(name)
        home = self._directory / f"{name}.ca"
        home.mkdir()
        (home / "index").touch()
        (home / "serial").write_text("01\n")
        (home / "conf").write_text(
            "[ca]\ndefault_ca=own\n[own]\npolicy=any\ndefault_md=sha256\n[any]\ncommonName=supplied\n"
            f"[own]\ndatabase={home}/index\nserial={home}/serial\nnew_certs_dir={home}\n"
            "[server]\nsubjectAltName=IP:127.0.0.1\n"
        )
        request = home / "request"
        _openssl("req", "-new", "-key", str(pair.key), "-subj", f"/CN={name}", "-out", str(request))
        signed_by = ("-cert", str(self._own.certificate), "-keyfile", str(self._own.key))
        dates = ("-startdate", first, "-enddate", last, "-extensions", "server", "-notext", "-batch")
        config = ("-config", str(home / "conf"), "-in", str(request), "-out", str(pair.certificate))
        _openssl("ca", *config, *signed_by, *dates)
        return pair

    def _make(self, pair: Pair, subject: str, extensions: tuple[str, ...], *options: str) -> None:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        files = ("-keyout", str(pair.key), "-out", str(pair.certificate), "-days", "2", "-subj", subject)
        added = [word for extension in extensions for word in ("-addext", extension)]
        _openssl("req", "-x509", *curve, *files, *added, *options)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
