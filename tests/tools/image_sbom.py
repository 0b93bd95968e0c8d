# SPDX-License-Identifier: Apache-2.0
"""Write the SBOM of each image in an OCI archive, as CycloneDX: its Debian packages and its Python packages.

`python -m tests.tools.image_sbom ARCHIVE PREFIX`, with the packages of requirements/release.txt, writes
PREFIX-ARCHITECTURE.cdx.json. Read from the image itself: dpkg's status file, and the metadata that each Python package
was installed with. The same archive gives the same documents.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

_READ = re.compile(
    r"var/lib/dpkg/status|(?:etc|usr/lib)/os-release|opt/nvmesh-csi/lib/python[\d.]+/site-packages/[^/]+\.dist-info/METADATA"
)


@dataclass(frozen=True, slots=True)
class Package:
    """One installed package, as its package manager describes it."""

    kind: str
    namespace: str | None
    name: str
    version: str
    qualifiers: Mapping[str, str]
    supplier: str
    license: str


@dataclass(frozen=True, slots=True)
class Image:
    """One image of an archive: for one architecture."""

    architecture: str
    digest: str
    created: str
    version: str
    files: Mapping[str, str]

    def packages(self) -> list[Package]:
        """Return the packages of the image, sorted."""
        found = [*self._debian(), *self._python()]
        return sorted(found, key=lambda package: (package.kind, package.name, package.version))

    def _debian(self) -> Iterator[Package]:
        release = dict(re.findall(r'(?m)^(\w+)="?(.*?)"?$', self._file("os-release")))
        for paragraph in self._file("dpkg/status").strip().split("\n\n"):
            fields = dict(re.findall(r"(?m)^([\w-]+): (.*)$", paragraph))
            if fields["Status"].split()[-1] != "installed":
                continue
            # The source package is what security trackers know; named where it differs.
            source = re.fullmatch(r"(\S+)(?: \((.*)\))?", fields.get("Source", ""))
            upstream = {"upstream": "@".join(part for part in source.groups() if part)} if source else {}
            qualifiers = {
                "arch": fields["Architecture"],
                "distro": f"{release['ID']}-{release['VERSION_ID']}",
                **upstream,
            }
            yield Package(
                "deb", release["ID"], fields["Package"], fields["Version"], qualifiers, fields.get("Maintainer", ""), ""
            )

    def _python(self) -> Iterator[Package]:
        for name, text in self.files.items():
            if name.endswith("/METADATA"):
                fields = HeaderParser().parsestr(text)
                canonical = re.sub(r"[-_.]+", "-", fields["Name"]).lower()
                supplier = fields["Author"] or fields["Author-Email"] or ""
                # A whole licence text in the field is not its name.
                terms = (fields["License-Expression"] or fields["License"] or "").strip()
                yield Package("pypi", None, canonical, fields["Version"], {}, supplier, "" if "\n" in terms else terms)

    def _file(self, end: str) -> str:
        """Return a file of the image; a link to it is not one."""
        return next(text for name, text in self.files.items() if name.endswith(end))


def images(archive: Path) -> Iterator[Image]:
    """Yield the images of an OCI archive, also those below an image list."""
    with tarfile.open(archive) as tar:
        waiting = json.loads(_blob(tar, "index.json"))["manifests"]
        while waiting:
            entry = waiting.pop(0)
            manifest = json.loads(_blob(tar, _path(entry)))
            if "manifests" in manifest:
                waiting += manifest["manifests"]
            elif entry.get("annotations", {}).get("vnd.docker.reference.type") is None:
                yield _image(tar, entry["digest"], manifest)


def _image(tar: tarfile.TarFile, digest: str, manifest: Mapping[str, Any]) -> Image:
    config = json.loads(_blob(tar, _path(manifest["config"])))
    files: dict[str, str] = {}
    for layer in manifest["layers"]:
        stored = tar.extractfile(_path(layer))
        assert stored is not None
        with tarfile.open(fileobj=stored, mode="r|*") as content:
            for member in content:
                name = member.name.removeprefix("./")
                _remove(files, name)
                if member.isfile() and _READ.fullmatch(name) and (data := content.extractfile(member)):
                    files[name] = data.read().decode()
    labels = config["config"].get("Labels", {})
    return Image(config["architecture"], digest, config["created"], labels["org.opencontainers.image.version"], files)


def _remove(files: dict[str, str], name: str) -> None:
    """Remove what an entry of a layer says is gone: OCI writes `.wh.NAME`, and `.wh..wh..opq` for a whole directory."""
    directory, _, last = name.rpartition("/")
    if last.startswith(".wh."):
        gone = directory if last == ".wh..wh..opq" else f"{directory}/{last.removeprefix('.wh.')}".lstrip("/")
        for below in [there for there in files if there == gone or there.startswith(f"{gone}/")]:
            del files[below]


def _path(entry: Mapping[str, Any]) -> str:
    return f"blobs/{entry['digest'].replace(':', '/')}"


def _blob(tar: tarfile.TarFile, name: str) -> bytes:
    stored = tar.extractfile(name)
    assert stored is not None
    return stored.read()


def document(image: Image) -> str:
    """Return the SBOM of an image; raises ValueError if it is not valid CycloneDX."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.contact import OrganizationalEntity
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from packageurl import PackageURL

    top = Component(
        type=ComponentType.CONTAINER,
        name="nvmesh-csi",
        version=image.version,
        bom_ref="image",
        purl=PackageURL("oci", None, "nvmesh-csi", image.digest, {"arch": image.architecture}),
    )
    bom = Bom(serial_number=uuid5(NAMESPACE_OID, image.digest))
    bom.metadata.component = top
    bom.metadata.timestamp = datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", image.created))
    components = []
    for package in image.packages():
        purl = PackageURL(package.kind, package.namespace, package.name, package.version, dict(package.qualifiers))
        components.append(
            Component(
                type=ComponentType.LIBRARY,
                name=package.name,
                version=package.version,
                bom_ref=str(purl),
                purl=purl,
                supplier=OrganizationalEntity(name=package.supplier) if package.supplier else None,
                licenses=[LicenseFactory().make_from_string(package.license)] if package.license else [],
            )
        )
    bom.components.update(components)
    bom.register_dependency(top, components)
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the SBOM is not valid CycloneDX: {problem}")
    return text


def main(archive: Path, prefix: str) -> None:
    """Write one SBOM for each image; print architecture and digest of each."""
    for image in images(archive):
        path = Path(f"{prefix}-{image.architecture}.cdx.json")
        path.write_text(document(image) + "\n")
        kinds = [package.kind for package in image.packages()]
        print(
            f"{path}: {image.digest}: {kinds.count('deb')} Debian packages, {kinds.count('pypi')} Python packages",
            file=sys.stderr,
        )
        print(image.architecture, image.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
