# SPDX-License-Identifier: Apache-2.0
"""No support bundle has a secret: planted ones are removed by place and form, and any that is left is found."""

from __future__ import annotations

import base64
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import PreconditionFailed
from csi_driver.host_model import RunningRole
from csi_driver.local.bundle import REDACTED, Secrets, archive, redact, refuse, scrub
from csi_driver.local.doctor_bundle import make, scan, secrets_of
from csi_driver.nvme_model import new_dhchap_key

SECRETS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Cs", "Cc"]), min_size=8, max_size=40
)
WORDS = st.text(st.sampled_from("abcdefghijkmnopqrstuvwxyz0123456789-_"), min_size=12, max_size=30).filter(
    lambda text: text not in REDACTED
)
AROUND = st.binary(max_size=30)


def go_json(text: str) -> str:
    """Return JSON as Go writes it: safe within HTML."""
    text = json.dumps(text, ensure_ascii=False)[1:-1]
    for each in "&<>":
        text = text.replace(each, f"\\u00{ord(each):x}")
    return text


FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64 of user:password": lambda text: base64.b64encode(f"admin:{text}".encode()),
    "base64 of a longer text": lambda text: base64.b64encode(f"ab{text}cdef".encode()),
    "URL-safe base64": lambda text: base64.urlsafe_b64encode(text.encode()),
    "URL-encoded": lambda text: quote(text, safe="").encode(),
    "JSON": lambda text: json.dumps(text).encode(),
    "JSON within JSON": lambda text: json.dumps(json.dumps({"a": text})).encode(),
    "Python": lambda text: ascii(text).encode(),
    "JSON of Go": lambda text: go_json(text).encode(),
    "JSON of Go within JSON": lambda text: json.dumps({"a": go_json(text)}, ensure_ascii=False).encode(),
    "URL-encoded in lower case": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text)).encode(),
    "hexadecimal": lambda text: text.encode().hex().encode(),
}


@pytest.mark.parametrize("form", FORMS)
@given(secret=SECRETS, before=AROUND, after=AROUND)
def test_a_secret_is_found_in_every_form(form: str, secret: str, before: bytes, after: bytes) -> None:
    content = before + b"\n" + FORMS[form](secret) + b"\n" + after
    assert list(Secrets({"file": secret}).find(content))


@pytest.mark.parametrize("lines", [
    lambda text: "\n".join(textwrap.wrap(base64.b64encode(text.encode()).decode(), 20)),
    lambda text: json.dumps("\n    ".join(textwrap.wrap(base64.b64encode(text.encode()).decode(), 20))),
    lambda text: f"{text[:15]}\n        {text[15:]}",
], ids=["wrapped base64", "wrapped base64 in JSON", "a broken line"])  # fmt: skip
def test_a_long_secret_is_found_in_several_lines(lines: Callable[[str], str]) -> None:
    secret = "correct-horse-battery-staple-4711"
    assert list(Secrets({"file": secret}).find(f"before {lines(secret)} after".encode()))


PLACES: dict[str, Callable[[str], object]] = {
    "a variable": lambda text: {"containers": [{"env": [{"name": "X", "value": text}]}]},
    "the last applied configuration": lambda text: {
        "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": json.dumps({"a": text})}}
    },
    "an annotation of anybody": lambda text: {"metadata": {"annotations": {"example.com/note": text}}},
    "a parameter of a class": lambda text: {"parameters": {"luksPassphrase": text}},
    "a nested password": lambda text: {"spec": {"auth": {"password": text}}},
    "a mount option": lambda text: {"mountOptions": [f"password={text}"]},
    "managed fields": lambda text: {"metadata": {"managedFields": [{"v": text}]}},
    "a Secret": lambda text: {"kind": "Secret", "data": {"password": text}},
    "a ConfigMap": lambda text: {"kind": "ConfigMap", "data": {"clusters.yaml": text}},
    "an argument": lambda text: {"args": [f"--management-password={text}"]},
    "the word behind an option": lambda text: {"command": ["mysql", "--password", text]},
    "a key of a class": lambda text: {"parameters": {"encryptionKey": text}},
    "JSON within a message": lambda text: {"message": json.dumps(json.dumps({"password": text, "a": 1}))},
    "a quoted text with spaces": lambda text: {"message": f'password="a {text}", next'},
    "a password of several signs": lambda text: {"message": f"password=a,b;c&d}}'{text} next"},
    "a message": lambda text: {"message": f"login failed, password={text}"},
    "a URL": lambda text: {"message": f"cannot reach https://admin:{text}@mgmt:4000/"},
    "a URL with another @": lambda text: {"message": f"cannot reach https://admin:a@{text}@mgmt:4000/"},
    "a key of NVMe in-band authentication": lambda text: {"message": f"write nqn=a,with DHHC-1:00:{text}:,b"},
    "a header": lambda text: {"message": f"Authorization: Bearer {text}"},
}


@pytest.mark.parametrize("place", PLACES)
@given(secret=WORDS)
def test_a_secret_is_removed_from_every_place(place: str, secret: str) -> None:
    assert secret not in json.dumps(redact(PLACES[place](secret)))


@given(secret=WORDS)
def test_a_private_key_is_removed_from_text(secret: str) -> None:
    key = f"-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----"
    assert secret not in scrub(f"before\n{key}\nafter")
    assert secret not in scrub(f"before\n{key[:-20]}")


def test_a_key_of_nvme_is_removed_from_text() -> None:
    key = new_dhchap_key()
    assert scrub(f"nqn=x,dhchap_secret={key},tos=0") == "nqn=x,dhchap_secret=REDACTED"
    assert scrub(f"connect with {key} failed") == "connect with REDACTED failed"


def test_names_and_places_of_secrets_are_kept() -> None:
    kept = {
        "parameters": {"csi.storage.k8s.io/node-stage-secret-name": "key", "vpg": "fast"},
        "args": ["--management-password-file=/etc/nvmesh-csi/management/password"],
        "metadata": {"annotations": {"pv.kubernetes.io/provisioned-by": "nvmesh-csi.excelero.com"}},
        "mountOptions": ["noatime"],
    }
    assert redact(kept) == kept


@pytest.mark.parametrize("secret", ["admin", "x1"])
def test_a_short_secret_is_looked_for_as_a_word(secret: str) -> None:
    assert list(Secrets({"file": secret}).find(f"password is {secret}.".encode()))
    assert not list(Secrets({"file": secret}).find(f"the {secret}istrator".encode()))


def test_no_finding_shows_the_secret() -> None:
    secrets = Secrets({"/etc/password": "canary-4711"})
    assert "canary-4711" not in repr(secrets) + "".join(secrets.find(b"canary-4711"))
    with pytest.raises(PreconditionFailed) as refusal:
        refuse(secrets.find(b"canary-4711"))
    assert "/etc/password (plain)" in str(refusal.value)
    assert "canary-4711" not in str(refusal.value)


# --- on a machine -----------------------------------------------------------------------------------------------


def a_role(directory: Path) -> RunningRole:
    """A controller that has a secret of each kind."""
    (directory / "password").write_text("secret-of-the-file\n")
    (directory / "user").write_text("somebody\n")
    (directory / "zone-password").write_text("secret-of-a-zone\n")
    (directory / "token").write_text("secret-of-the-account")
    (directory / "key.pem").write_text(f"-----BEGIN PRIVATE KEY-----\n{'k' * 64}\n-----END PRIVATE KEY-----\n")
    clusters = f"zones: {{a: {{passwordFile: {directory}/zone-password}}, b: {{password: secret-inline}}}}"
    (directory / "clusters.yaml").write_text(clusters)
    arguments = (
        f"--management-password-file={directory}/password", "--management-user-file", f"{directory}/user",
        f"--management-client-key-file={directory}/key.pem", f"--clusters-file={directory}/clusters.yaml",
        f"--kubernetes-account={directory}",
    )  # fmt: skip
    return RunningRole(7, "controller", arguments, {"PROXY_PASSWORD": "secret-of-a-variable", "HOME": "/root"})


PLANTED = (
    "secret-of-the-file",
    "secret-of-a-zone",
    "secret-of-the-account",
    "secret-inline",
    "secret-of-a-variable",
    "k" * 64,
)


@pytest.mark.parametrize("secret", PLANTED)
def test_each_secret_of_a_role_is_known(tmp_path: Path, secret: str) -> None:
    assert scan(f"log line with {secret} in it".encode(), [a_role(tmp_path)])


def test_the_secrets_in_a_pool_are_known(tmp_path: Path) -> None:
    keys = new_dhchap_key(), new_dhchap_key()
    (tmp_path / "keys").mkdir()
    (tmp_path / "password").write_text("secret-of-the-pool\n")
    (tmp_path / "keys" / "node.json").write_text(json.dumps({"client": "worker-1", "keys": keys}))
    role = RunningRole(7, "storage", ("--pool", str(tmp_path)), {})
    for secret in ("secret-of-the-pool", *keys):
        assert scan(f"log line with {secret} in it".encode(), [role])
    assert not scan(b"a log line of worker-1", [role])


def test_a_user_is_no_secret(tmp_path: Path) -> None:
    assert "somebody" not in "".join(secrets_of([a_role(tmp_path)]).values())


def test_the_bundle_of_a_machine_is_written_for_its_owner(tmp_path: Path) -> None:
    target = tmp_path / "bundle.tar.gz"
    assert "searched for 6 secrets" in make(target, '{"findings": []}', [a_role(tmp_path)])
    assert target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(PreconditionFailed, match="File exists"):
        make(target, "{}", [a_role(tmp_path)])


def test_a_bundle_with_a_secret_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="was not written"):
        make(tmp_path / "b", '{"findings": ["secret-of-the-file"]}', [a_role(tmp_path)])
    assert not (tmp_path / "b").exists()


def test_names_of_files_are_searched_too() -> None:
    assert list(Secrets({"f": "secret-in-a-name"}).find(archive({"pods/secret-in-a-name.txt": ""})))
