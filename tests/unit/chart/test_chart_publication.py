# SPDX-License-Identifier: Apache-2.0
"""What `.ci/release` makes of chart and image, and publishes: in a copy, with a small image and recording programs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tools.chart_images import images as images_of_the_chart
from tests.tools.image_sbom import images
from tests.unit.chart.rendering import CHART, ROOT, helm

VERSION = next(
    line.partition('"')[2].rstrip('"')
    for line in (ROOT / "pyproject.toml").read_text().splitlines()
    if line.startswith("version = ")
)
STATUS = """\
Package: libssl3
Status: install ok installed
Maintainer: Debian OpenSSL Team <openssl@example.org>
Architecture: {architecture}
Source: openssl (3.0.17-1)
Version: 3.0.17-1+b1
Description: one line
 and more: of it

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1
"""
SITE = "opt/nvmesh-csi/lib/python3.11/site-packages"


# --- an image ---------------------------------------------------------------------------------------------------


def layer(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            _add(tar, name, text.encode())
    return gzip.compress(packed.getvalue(), mtime=0)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def layers(architecture: str) -> list[bytes]:
    return [
        layer(
            {
                "var/lib/dpkg/status": STATUS.format(architecture=architecture),
                "usr/lib/os-release": 'ID=debian\nVERSION_ID="12"\n',
                f"{SITE}/pip-23.0.dist-info/METADATA": "Name: pip\nVersion: 23.0\n",
            }
        ),
        layer(
            {
                f"{SITE}/.wh.pip-23.0.dist-info": "",
                f"{SITE}/PyYAML-6.0.dist-info/METADATA": "Name: PyYAML\nVersion: 6.0\nLicense: MIT\n\nName: no\n",
                "usr/bin/mount": "",
            }
        ),
    ]


def archive(path: Path, architectures: Iterable[str] = ("amd64", "arm64")) -> Path:
    """Write an OCI archive with one image list."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes | dict[str, Any]) -> dict[str, Any]:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    manifests = []
    for architecture in architectures:
        config = {
            "architecture": architecture,
            "created": "2026-11-29T06:00:00.123456789Z",
            "config": {"Labels": {"org.opencontainers.image.version": VERSION}},
        }
        manifests.append(blob({"config": blob(config), "layers": [blob(one) for one in layers(architecture)]}))
    blobs["index.json"] = json.dumps({"manifests": [blob({"manifests": manifests})]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in blobs.items():
            _add(tar, name, data)
    return path


def test_the_packages_of_an_image_are_those_that_its_last_layer_leaves(tmp_path: Path) -> None:
    first, second = images(archive(tmp_path / "image.tar"))
    assert (first.architecture, second.architecture) == ("amd64", "arm64")
    assert [(package.kind, package.name, package.version) for package in first.packages()] == [
        ("deb", "libssl3", "3.0.17-1+b1"),
        ("pypi", "pyyaml", "6.0"),
    ]


def test_a_debian_package_names_its_architecture_release_and_source(tmp_path: Path) -> None:
    _, arm = images(archive(tmp_path / "image.tar"))
    assert arm.packages()[0].qualifiers == {"arch": "arm64", "distro": "debian-12", "upstream": "openssl@3.0.17-1"}


# --- build ------------------------------------------------------------------------------------------------------


def copy(directory: Path) -> Path:
    """Return a copy of the project as a repository of its own, with this one's tools."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    git(directory, "init", "--quiet", "--initial-branch=main")
    (directory / ".git" / "info" / "exclude").write_text("/.venv\n/.cache\n/programs\n")
    git(directory, "add", "--all")
    git(directory, "-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "--message=all")
    return directory


def git(directory: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=directory, check=True)


def release(directory: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(directory / "programs"), os.environ["PATH"]])
    return subprocess.run(
        [directory / ".ci" / "release", *words],
        env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.mark.tool
def test_a_commit_without_the_tag_is_not_built(tmp_path: Path) -> None:
    done = release(copy(tmp_path), "build")
    assert done.returncode != 0
    assert f"HEAD is not the commit of tag v{VERSION}" in done.stderr


@pytest.mark.tool
@pytest.mark.skipif(helm() is None, reason="needs helm: make helm")
def test_a_build_makes_chart_wheel_sboms_and_list_of_images_for_its_registry(tmp_path: Path) -> None:
    subprocess.run(["make", ".cache/release"], cwd=ROOT, check=True, capture_output=True)
    tree = copy(tmp_path / "tree")
    (tree / ".venv").symlink_to(ROOT / ".venv")
    (tree / ".cache" / "bin").mkdir(parents=True)
    (tree / ".cache" / "bin" / "helm").symlink_to(str(helm()))
    (tree / ".cache" / "release").symlink_to(ROOT / ".cache" / "release")
    program(tree / "programs" / "make")
    git(tree, "tag", f"v{VERSION}")
    done = release(tree, "build", "quay.io/example/", IMAGE_ARCHIVE=str(archive(tmp_path / "image.tar")))
    assert done.returncode == 0, done.stdout + done.stderr

    dist = tree / "dist"
    sbom = json.loads((dist / f"nvmesh-csi-{VERSION}-arm64.cdx.json").read_text())
    assert {component["purl"] for component in sbom["components"]} == {
        "pkg:deb/debian/libssl3@3.0.17-1%2Bb1?arch=arm64&distro=debian-12&upstream=openssl%403.0.17-1",
        "pkg:pypi/pyyaml@6.0",
    }
    assert sbom["metadata"]["timestamp"].startswith("2026-11-29T06:00:00")
    listed = (dist / "images.txt").read_text().split()
    assert listed == [f"quay.io/example/nvmesh-csi:{VERSION}", *images_of_the_chart()[1:]]
    shown = subprocess.run(
        [str(helm()), "show", "values", dist / f"nvmesh-csi-driver-{VERSION}.tgz"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\n  repository: quay.io/example/nvmesh-csi\n" in shown.stdout
    assert list(dist.glob("*.whl"))
    assert [line.split()[0] for line in (dist / "digests.txt").read_text().splitlines()] == ["amd64", "arm64"]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)


# --- publish ----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A tree with a built release, and programs that record how they are called."""
    for name in (".ci/release", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    dist = tmp_path / "dist"
    dist.mkdir()
    (dist / "images.txt").write_text(f"reg.example/team/nvmesh-csi:{VERSION}\n")
    (dist / "digests.txt").write_text("amd64 sha256:aa\narm64 sha256:bb\n")
    sums = subprocess.run(["sha256sum", "images.txt", "digests.txt"], cwd=dist, capture_output=True, check=True)
    (dist / "SHA256SUMS").write_bytes(sums.stdout)
    record = f'echo "$(basename "$0") $*" >>{tmp_path}/calls'
    # `registry` has the manifest that is published, if any; the archive's is "ours".
    inspect = 'if [ "$1" = inspect ]; then case $* in *oci-archive:*) echo ours ;; *) cat registry ;; esac; exit; fi'
    program(tmp_path / "programs" / "skopeo", inspect, record, "echo -n sha256:11 >dist/image.digest")
    program(tmp_path / ".cache" / "bin" / "helm", record, 'echo "Digest: sha256:22"')
    return tmp_path


def with_cosign(tree: Path) -> None:
    program(tree / "programs" / "cosign", f'echo "cosign $*" >>{tree}/calls')


def calls(tree: Path) -> list[str]:
    record = tree / "calls"
    return record.read_text().splitlines() if record.exists() else []


def without_cosign(tree: Path) -> dict[str, str]:
    """Return an environment whose PATH has the tree's programs and the basic ones alone."""
    for name in ("bash", "basename", "cat", "dirname", "head", "rm", "sed", "sha256sum", "tee", "git"):
        (tree / "programs" / name).symlink_to(str(shutil.which(name)))
    return {"PATH": str(tree / "programs")}


@pytest.mark.tool
def test_image_and_chart_are_pushed_signed_and_attested_by_digest(built: Path) -> None:
    with_cosign(built)
    done = release(built, "publish", "reg.example/team", COSIGN_KEY="key")
    assert done.returncode == 0, done.stderr
    image, chart = "reg.example/team/nvmesh-csi", "reg.example/team/charts/nvmesh-csi-driver"
    attest = "cosign attest --type cyclonedx --predicate"
    stored = f"oci-archive:dist/nvmesh-csi-{VERSION}.oci.tar"
    assert calls(built) == [
        f"skopeo copy --all --preserve-digests --digestfile dist/image.digest {stored} docker://{image}:{VERSION}",
        f"helm push dist/nvmesh-csi-driver-{VERSION}.tgz oci://reg.example/team/charts",
        f"cosign sign --recursive --yes --key key {image}@sha256:11",
        f"cosign sign --yes --key key {chart}@sha256:22",
        f"{attest} dist/nvmesh-csi-{VERSION}-amd64.cdx.json --yes --key key {image}@sha256:aa",
        f"{attest} dist/nvmesh-csi-{VERSION}-arm64.cdx.json --yes --key key {image}@sha256:bb",
    ]
    assert (built / "dist" / "published.txt").read_text() == (
        f"{image}:{VERSION}@sha256:11\n{chart}:{VERSION}@sha256:22\n"
    )


@pytest.mark.tool
@pytest.mark.parametrize(
    ("there", "environment", "is_pushed"),
    [("other", {}, False), ("other", {"OVERWRITE": "1"}, True), ("ours", {}, True)],
    ids=["another content", "on request", "a retry"],
)
def test_a_version_that_is_published_with_another_content_is_kept(
    built: Path, there: str, environment: dict[str, str], is_pushed: bool
) -> None:
    with_cosign(built)
    (built / "registry").write_text(there + "\n")
    done = release(built, "publish", "reg.example/team", **environment)
    assert (done.returncode == 0, calls(built) != []) == (is_pushed, is_pushed), done.stderr
    assert is_pushed or f"nvmesh-csi:{VERSION} is published with another content" in done.stderr


@pytest.mark.tool
def test_a_chart_whose_digest_is_unknown_is_not_signed(built: Path) -> None:
    with_cosign(built)
    program(built / ".cache" / "bin" / "helm", "echo Pushed")
    done = release(built, "publish", "reg.example/team")
    assert done.returncode != 0
    assert "no digest of the chart" in done.stderr
    assert [call for call in calls(built) if "cosign" in call] == []


@pytest.mark.tool
def test_nothing_is_pushed_where_cosign_is_missing(built: Path) -> None:
    done = release(built, "publish", "reg.example/team", **without_cosign(built))
    assert done.returncode != 0
    assert "cosign is not installed" in done.stderr
    assert calls(built) == []


@pytest.mark.tool
def test_a_release_without_signatures_says_so(built: Path) -> None:
    done = release(built, "publish", "reg.example/team", UNSIGNED="1", **without_cosign(built))
    assert done.returncode == 0, done.stderr
    assert "published WITHOUT SIGNATURES" in done.stderr
    assert [call.split()[0] for call in calls(built)] == ["skopeo", "helm"]


@pytest.mark.tool
@pytest.mark.parametrize(
    ("registry", "change", "problem"),
    [
        ("other.example", "", "dist/ was built for reg.example/team/nvmesh-csi"),
        ("reg.example/team", "echo more >>dist/digests.txt", "files of dist/ have changed"),
        ("reg.example/team", "rm -r dist", "dist/ is empty"),
    ],
)
def test_only_what_was_built_for_the_registry_is_published(
    built: Path, registry: str, change: str, problem: str
) -> None:
    with_cosign(built)
    subprocess.run(["bash", "-c", change], cwd=built, check=True)
    done = release(built, "publish", registry)
    assert done.returncode != 0
    assert problem in done.stderr
    assert calls(built) == []


@pytest.mark.tool
@pytest.mark.skipif(helm() is None, reason="needs helm: make helm")
def test_every_image_of_a_rendered_chart_is_in_the_list() -> None:
    sets = [f"sidecars.{name}.enabled=true" for name in ("registrar", "livenessprobe")] + ["csiAddons.enabled=true"]
    rendered = subprocess.run(
        [
            str(helm()), "template", "x", str(CHART),
            "--set", ",".join(["storage.enabled=true", "storage.nodeName=box", "snapshots.enabled=true", *sets]),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    used = {line.split("image: ")[1].strip('"') for line in rendered.stdout.splitlines() if " image: " in line}
    assert used == set(images_of_the_chart())
