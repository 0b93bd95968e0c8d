# SPDX-License-Identifier: Apache-2.0
"""The client over TLS: with the embedded manager, and with a server that requires client certificates."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import requests

from csi_driver.deadline import Deadline
from csi_driver.errors import Denied, ServerUnreachable, StorageUnavailable, Unauthenticated
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.transport import Request, Transport
from tests.contract.pki import Authority, Pair
from tests.contract.two_managements import Storage
from tests.unit.management.double import PASSWORD, USER, ManagementDouble, Says, sample, serving

INFO = "/systemInfo"
CSI_USER = "/OU=csi@nvidia.com/CN=CSI"
Connect = Callable[..., ManagementClient]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "one", "one")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "other", "other")


@pytest.fixture(scope="module")
def server_pair(authority: Authority) -> Pair:
    return authority.issue("server")


@pytest.fixture(scope="module")
def client_pair(authority: Authority) -> Pair:
    return authority.issue("client", subject=CSI_USER, use="clientAuth")


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(20)


class TlsDouble(ManagementDouble):
    """The double behind TLS; `client_authority`: it requires a client certificate of this CA."""

    def __init__(self, pair: Pair, client_authority: Path | None = None) -> None:
        super().__init__()
        self.terms = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.terms.load_cert_chain(pair.certificate, pair.key)
        if client_authority is not None:
            self.terms.verify_mode = ssl.CERT_REQUIRED
            self.terms.load_verify_locations(client_authority)
            self.opens_sessions = True
        self.users: list[object] = []

    def get_request(self) -> tuple[ssl.SSLSocket, object]:
        # The handshake is left to the connection's thread: one that hangs must not stop the others.
        plain, address = super().get_request()
        return self.terms.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def finish_request(self, request: ssl.SSLSocket, client_address: object) -> None:  # type: ignore[override]
        request.do_handshake()
        if (certificate := request.getpeercert()) is not None:
            subject = dict(cast("tuple[tuple[str, str]]", parts)[0] for parts in certificate["subject"])
            self.users.append(subject.get("organizationalUnitName"))
        super().finish_request(request, client_address)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(server_pair: Pair) -> Iterator[TlsDouble]:
    with serving(TlsDouble(server_pair)) as double:
        yield double


@pytest.fixture
def mutual(server_pair: Pair, authority: Authority) -> Iterator[TlsDouble]:
    with serving(TlsDouble(server_pair, authority.certificate)) as double:
        yield double


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Return a function that makes a client, with a password unless a client certificate is given."""
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    clients: list[ManagementClient] = []

    def make(url: str, **options: object) -> ManagementClient:
        settings = ManagementSettings(servers=(url,), **options)  # type: ignore[arg-type]
        if "client_certificate" not in options:
            settings = replace(settings, username=USER, password_file=password)
        clients.append(ManagementClient(settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


# --- the server's certificate ---------------------------------------------------------------------------


def test_a_server_of_the_named_ca_is_trusted(
    server: TlsDouble, connect: Connect, authority: Authority, deadline: Deadline
) -> None:
    client = connect(server.url, ca_file=authority.certificate)
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


def test_the_embedded_manager_is_used_over_tls(
    tmp_path: Path, server_pair: Pair, authority: Authority, deadline: Deadline
) -> None:
    storage = Storage.start(tmp_path, certificate=server_pair.certificate, key=server_pair.key)
    settings = ManagementSettings(
        servers=(storage.server.url,),
        username=storage.settings.user,
        password_file=storage.server.password.path,
        ca_file=authority.certificate,
    )
    client = ManagementClient(settings)
    try:
        assert storage.server.url.startswith("https:")
        assert list(client.volumes(after="", limit=0, deadline=deadline)) == []
    finally:
        client.close()
        storage.server.stop()


def test_clients_of_the_embedded_manager_that_end_no_handshake_keep_no_other_off(
    tmp_path: Path, server_pair: Pair
) -> None:
    server = Storage.start(tmp_path, certificate=server_pair.certificate, key=server_pair.key).server
    try:
        with socket.create_connection(server.address), socket.create_connection(server.address) as plain:
            plain.sendall(b"GET /login HTTP/1.1\r\n\r\n")
            assert server.why_silent() == ""
    finally:
        server.stop()


def test_a_server_of_another_ca_is_refused(
    server: TlsDouble, connect: Connect, other_authority: Authority, deadline: Deadline
) -> None:
    with pytest.raises(ServerUnreachable, match="cannot be verified"):
        connect(server.url, ca_file=other_authority.certificate).system_info(deadline=deadline)
    assert not server.logins


def test_without_a_ca_file_the_system_cas_decide(server: TlsDouble, connect: Connect, deadline: Deadline) -> None:
    with pytest.raises(ServerUnreachable, match="cannot be verified"):
        connect(server.url).system_info(deadline=deadline)
    assert not server.logins


def test_the_system_cas_are_trusted_without_a_ca_file(
    server: TlsDouble, connect: Connect, authority: Authority, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))  # where OpenSSL finds the system's
    assert connect(server.url).system_info(deadline=deadline).api_version == "18.0.0"


@pytest.mark.parametrize("is_named", [False, True], ids=["the system's", "a named one"])
@pytest.mark.parametrize("way", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "certifi"])
def test_the_http_library_adds_no_cas(
    server: TlsDouble, connect: Connect, authority: Authority, other_authority: Authority, deadline: Deadline,
    monkeypatch: pytest.MonkeyPatch, way: str, is_named: bool,
) -> None:  # fmt: skip
    """The server's CA is only in the library's own places."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    if way == "certifi":
        monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(authority.certificate))
    else:
        monkeypatch.setenv(way, str(authority.certificate))
    requests.get(server.url, timeout=20, allow_redirects=False).close()  # left alone, it believes the server
    named = {"ca_file": other_authority.certificate} if is_named else {}
    with pytest.raises(ServerUnreachable, match="cannot be verified"):
        connect(server.url, **named).system_info(deadline=deadline)
    assert not server.logins


def test_a_certificate_for_another_host_is_refused(connect: Connect, authority: Authority, deadline: Deadline) -> None:
    pair = authority.issue("elsewhere", host="DNS:elsewhere.example.com")
    with serving(TlsDouble(pair)) as elsewhere, pytest.raises(ServerUnreachable, match="cannot be verified"):
        connect(elsewhere.url, ca_file=authority.certificate).system_info(deadline=deadline)


def test_an_unverified_server_is_used_where_allowed_and_warned_about(
    server: TlsDouble, connect: Connect, deadline: Deadline, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(server.url, tls_verify=False)
    client.system_info(deadline=deadline)
    assert "is not verified" in caplog.text


def test_a_renewed_ca_is_trusted_without_a_restart(
    server: TlsDouble, connect: Connect, authority: Authority, other_authority: Authority, deadline: Deadline,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The CA file is replaced first, then the server's certificate."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(authority.certificate.read_bytes())
    client = connect(server.url, ca_file=ca_file)
    client.system_info(deadline=deadline)
    renewed = other_authority.issue("renewed")
    server.terms.load_cert_chain(renewed.certificate, renewed.key)
    ca_file.write_bytes(other_authority.certificate.read_bytes())
    client.system_info(deadline=deadline)
    assert len(server.logins) == 1


def test_an_invalid_ca_file_is_named_and_read_again_without_a_restart(
    server: TlsDouble, connect: Connect, authority: Authority, deadline: Deadline, tmp_path: Path
) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("nothing")
    client = connect(server.url, ca_file=ca_file)
    with pytest.raises(ServerUnreachable, match=str(ca_file)):
        client.system_info(deadline=deadline)
    ca_file.write_bytes(authority.certificate.read_bytes())
    client.system_info(deadline=deadline)


def test_a_server_without_tls_does_not_get_the_password(
    connect: Connect, authority: Authority, deadline: Deadline
) -> None:
    plain = ManagementDouble()
    thread = threading.Thread(target=plain.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        with pytest.raises(ServerUnreachable):
            connect(plain.url.replace("http:", "https:"), ca_file=authority.certificate).system_info(deadline=deadline)
        assert not plain.logins
    finally:
        plain.stop()
        thread.join(5)


# --- our own certificate --------------------------------------------------------------------------------


def test_a_client_certificate_replaces_the_password(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline
) -> None:
    client = connect(
        mutual.url,
        ca_file=authority.certificate,
        client_certificate=client_pair.certificate,
        client_key=client_pair.key,
    )
    mutual.on("GET", "/volumes/v1", Says(sample("volume")))
    for _ in range(3):
        assert client.volume("v1", deadline=deadline) is not None
    assert mutual.users == ["csi@nvidia.com"]
    assert not mutual.logins
    cookies = [request.headers.get("Cookie") for request in mutual.received]
    assert cookies == [None, *["connect.sid=opened"] * 3]


def test_the_next_request_opens_an_expired_session_again(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline
) -> None:
    client = connect(
        mutual.url,
        ca_file=authority.certificate,
        client_certificate=client_pair.certificate,
        client_key=client_pair.key,
    )
    client.system_info(deadline=deadline)
    mutual.expire_sessions()
    client.system_info(deadline=deadline)


def test_a_client_certificate_without_a_user_is_explained(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline
) -> None:
    """The server's own words were recorded: 401 and a plain "Failed to authenticate."."""
    refused = Says("Failed to authenticate.", 401)
    mutual.on("GET", "/systemInfo", refused)
    mutual.on("GET", "/volumes/v1", refused)
    client = connect(
        mutual.url,
        ca_file=authority.certificate,
        client_certificate=client_pair.certificate,
        client_key=client_pair.key,
    )
    for ask in (client.system_info, partial(client.volume, "v1")):
        with pytest.raises(
            Unauthenticated, match=r"has no user for the client certificate .*create a management user .* OU"
        ):
            ask(deadline=deadline)


def test_a_client_certificate_without_a_permission_is_denied(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline
) -> None:
    mutual.on("GET", "/volumes/v1", Says({"message": "", "id": 401}, 401))
    client = connect(
        mutual.url,
        ca_file=authority.certificate,
        client_certificate=client_pair.certificate,
        client_key=client_pair.key,
    )
    with pytest.raises(Denied, match="denies this user GET /volumes/v1"):
        client.volume("v1", deadline=deadline)


def test_certificate_and_key_may_be_one_file(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(client_pair.certificate.read_bytes() + client_pair.key.read_bytes())
    connect(mutual.url, ca_file=authority.certificate, client_certificate=both).system_info(deadline=deadline)


def test_a_rejected_client_certificate_is_named(
    mutual: TlsDouble, connect: Connect, authority: Authority, other_authority: Authority, deadline: Deadline
) -> None:
    stranger = other_authority.issue("stranger", subject=CSI_USER, use="clientAuth")
    client = connect(
        mutual.url, ca_file=authority.certificate, client_certificate=stranger.certificate, client_key=stranger.key
    )
    with pytest.raises(
        (Unauthenticated, StorageUnavailable), match=r"not accept the client certificate .*stranger\.pem"
    ):
        # Which of the two depends on whether the server's alert arrives before the end of the connection.
        client.system_info(deadline=deadline)
    assert not mutual.received


def test_a_renewed_client_certificate_is_used_without_a_restart(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline, tmp_path: Path
) -> None:
    files = client_pair.copied_to(tmp_path)
    client = connect(
        mutual.url, ca_file=authority.certificate, client_certificate=files.certificate, client_key=files.key
    )
    client.system_info(deadline=deadline)
    files.replace_by(authority.issue("renewed-client", subject="/OU=other@nvidia.com/CN=CSI", use="clientAuth"))
    client.system_info(deadline=deadline)
    assert mutual.users == ["csi@nvidia.com", "other@nvidia.com"]


def test_a_key_that_does_not_fit_is_named_and_nothing_is_sent(
    mutual: TlsDouble, connect: Connect, authority: Authority, client_pair: Pair, deadline: Deadline
) -> None:
    other = authority.issue("another", use="clientAuth")
    client = connect(
        mutual.url, ca_file=authority.certificate, client_certificate=client_pair.certificate, client_key=other.key
    )
    with pytest.raises(ServerUnreachable, match="KEY_VALUES_MISMATCH"):
        client.system_info(deadline=deadline)
    assert not mutual.users


# --- time and plain http --------------------------------------------------------------------------------


def test_a_hanging_handshake_ends_at_the_deadline_before_the_change_is_sent(
    authority: Authority, server_pair: Pair
) -> None:
    """The request was not sent, so another server may be used."""
    silent = TlsDouble(server_pair)  # not serving: the kernel accepts
    transport = Transport(silent.url, ManagementSettings(servers=(silent.url,), ca_file=authority.certificate))
    try:
        deadline = Deadline.after(0.4)
        with pytest.raises(ServerUnreachable) as caught:
            transport.exchange(Request("POST", "/volumes/update", b"[]"), None, deadline)
        assert caught.value.timed_out
        assert deadline.elapsed_s() < 20  # far below the time that a request may take
    finally:
        transport.close()
        silent.server_close()


def test_plain_http_is_warned_about_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    settings = ManagementSettings(servers=("http://m1:4000",), username=USER, password_file=tmp_path / "password")
    ManagementClient(settings).close()
    assert "http://m1:4000 is plain http" in caplog.text
