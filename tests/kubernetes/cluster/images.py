# SPDX-License-Identifier: Apache-2.0
"""Write container images as an OCI archive for `ctr images import`, with no container tool and no registry.

    images.py cluster BIN OUT [NAME...]    pause, busybox, and for each NAME the image that the official suite uses
    images.py programs OUT NAME=FILE...    images that hold one static program and nothing else, as the sidecars' do

The storage tests use these parts of the suite's images: of nginx the shell, so it is busybox; of glibc-dns-testing
GNU programs (dd with direct I/O), so it contains those of this machine; agnhost has the program and GNU programs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
GNU_PROGRAMS = (
    "bash", "nsenter", "findmnt", "mount", "umount", "lsblk", "blockdev", "stat", "dd", "sha256sum", "timeout",
    "truncate", "cp", "ls", "cat",
)  # fmt: skip
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
SEARCH_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLATFORM = {"architecture": "amd64", "os": "linux"}
# The second name is the one in deploy/examples: no example is changed for this cluster, which reaches no registry.
BUSYBOX_NAMES = ("localhost/busybox:1", "docker.io/library/busybox:1.37")
# nonroot is the user that images of one program are run as by most charts.
PASSWD = b"""\
root:x:0:0:root:/root:/bin/sh
nonroot:x:65532:65532:nonroot:/:/bin/false
nobody:x:65534:65534:nobody:/:/bin/false
"""
GROUP = b"root:x:0:\nnonroot:x:65532:\nnogroup:x:65534:\n"


class Tree:
    """The files of an image: one layer, the same bytes every time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115  # closed by close
        self._seen: set[PurePosixPath] = {PurePosixPath("/")}

    def _add(
        self, path: PurePosixPath, kind: bytes, mode: int, *, content: IO[bytes] | None = None, link: str = ""
    ) -> None:
        if path in self._seen:
            return
        self.directory(str(path.parent))
        self._seen.add(path)
        info = tarfile.TarInfo(str(path.relative_to("/")))
        info.type, info.mode, info.linkname = kind, mode, link
        if content is not None:
            info.size = content.seek(0, os.SEEK_END)
            content.seek(0)
        self._tar.addfile(info, content)

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(PurePosixPath(path), tarfile.DIRTYPE, mode)

    def file(self, path: str, content: bytes) -> None:
        self._add(PurePosixPath(path), tarfile.REGTYPE, 0o644, content=io.BytesIO(content))

    def link(self, path: str, target: str) -> None:
        self._add(PurePosixPath(path), tarfile.SYMTYPE, 0o777, link=target)

    def copy(self, path: str, source: Path) -> None:
        with source.open("rb") as content:
            self._add(PurePosixPath(path), tarfile.REGTYPE, 0o755, content=content)

    def program_of_this_machine(self, path: str, source: Path) -> None:
        """Copy a program with the libraries that it is linked with, which keep their places."""
        self.copy(path, source)
        for word in subprocess.run(["ldd", source], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                self.copy(word, Path(word).resolve())

    def close(self) -> None:
        self._tar.close()


@dataclass(frozen=True)
class Image:
    """An image to write: content, command, and name."""

    fill: Callable[[Tree], None]
    start: dict[str, list[str]]
    names: list[str]


def users(tree: Tree) -> None:
    tree.directory("/tmp", 0o1777)
    tree.file("/etc/passwd", PASSWD)
    tree.file("/etc/group", GROUP)


def applets(tree: Tree) -> None:
    tree.copy("/bin/busybox", BUSYBOX)
    names = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout
    for name in names.split():
        tree.link(f"/bin/{name}", "busybox")


def busybox(tree: Tree) -> None:
    users(tree)
    for path in ("/dev", "/proc", "/sys", "/mnt", "/run", "/home", "/var/run"):
        tree.directory(path)
    tree.directory("/root", 0o700)
    applets(tree)


def gnu(tree: Tree) -> None:
    for name in GNU_PROGRAMS:
        found = shutil.which(name)
        if found is None:
            raise SystemExit(f"images.py: {name} is not on this machine; the image of GNU programs needs it")
        tree.program_of_this_machine(f"/bin/{name}", Path(found).resolve())
    # The shell of Debian's busybox runs its own dd regardless of PATH.
    tree.link("/bin/sh", "bash")
    busybox(tree)


def single(program: Path, path: str) -> Callable[[Tree], None]:
    def fill(tree: Tree) -> None:
        tree.copy(path, program)
        users(tree)
        tree.directory("/etc/ssl/certs")

    return fill


def agnhost(program: Path) -> Callable[[Tree], None]:
    def fill(tree: Tree) -> None:
        tree.copy("/agnhost", program)
        tree.directory("/uploads")
        gnu(tree)

    return fill


def images_of_the_cluster(bin_directory: Path, names: Iterable[str]) -> list[Image]:
    images = {
        "pause": Image(single(bin_directory / "pause", "/pause"), {"Entrypoint": ["/pause"]}, ["localhost/pause:1"]),
        "busybox": Image(busybox, {"Cmd": ["sh"]}, [*BUSYBOX_NAMES]),
        "glibc-dns-testing": Image(gnu, {"Cmd": ["sh"]}, ["localhost/gnu:1"]),
        "agnhost": Image(agnhost(bin_directory / "agnhost"), {"Entrypoint": ["/agnhost"], "Cmd": ["pause"]}, []),
    }
    images["nginx"] = images["busybox"]
    for name in names:
        short = name.rsplit("/", 1)[-1].split(":")[0]
        if short in images and name not in images[short].names:
            images[short].names.append(name)
    return [image for key, image in images.items() if key != "nginx" and image.names]


def images_of_programs(specifications: Iterable[str]) -> list[Image]:
    images = []
    for specification in specifications:
        name, _, file = specification.partition("=")
        path = f"/{Path(file).name}"
        images.append(Image(single(Path(file), path), {"Entrypoint": [path]}, [name]))
    return images


class Archive:
    """An OCI image layout, written as one tar file that takes its name when it is complete."""

    def __init__(self, out: Path) -> None:
        self._out, self._part = out, out.with_name(out.name + ".part")
        self._tar = tarfile.open(self._part, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115  # closed by close
        self._index: list[dict[str, object]] = []
        self._blobs: set[str] = set()

    def _put(self, name: str, content: IO[bytes]) -> int:
        info = tarfile.TarInfo(name)
        info.mode, info.size = 0o644, content.seek(0, os.SEEK_END)
        content.seek(0)
        self._tar.addfile(info, content)
        return info.size

    def _blob(self, content: IO[bytes], media: str) -> dict[str, object]:
        digest = hashlib.sha256()
        content.seek(0)
        while chunk := content.read(1 << 20):
            digest.update(chunk)
        name = digest.hexdigest()
        if name not in self._blobs:
            self._blobs.add(name)
            self._put(f"blobs/sha256/{name}", content)
        return {"mediaType": media, "digest": f"sha256:{name}", "size": content.tell()}

    def _document(self, document: dict[str, object], media: str) -> dict[str, object]:
        return self._blob(io.BytesIO(json.dumps(document, sort_keys=True).encode()), media)

    def add(self, image: Image) -> None:
        with tempfile.TemporaryFile(dir=self._out.parent) as file:
            tree = Tree(file)
            image.fill(tree)
            tree.close()
            layer = self._blob(file, LAYER)
        config = self._document(
            {
                **PLATFORM,
                "created": "2000-01-01T00:00:00Z",
                "config": {"Env": [SEARCH_PATH], **image.start},
                "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
                "history": [{"created_by": "images.py"}],
            },
            CONFIG,
        )
        manifest = self._document(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}, MANIFEST
        )
        for name in image.names:
            self._index.append({**manifest, "platform": PLATFORM, "annotations": {"io.containerd.image.name": name}})
            print(f"   image {name}")

    def close(self) -> None:
        self._put("oci-layout", io.BytesIO(b'{"imageLayoutVersion":"1.0.0"}'))
        index = {"schemaVersion": 2, "manifests": self._index}
        self._put("index.json", io.BytesIO(json.dumps(index).encode()))
        self._tar.close()
        self._part.replace(self._out)


def write(out: Path, images: Iterable[Image]) -> None:
    archive = Archive(out)
    for image in images:
        archive.add(image)
    archive.close()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    cluster = kinds.add_parser("cluster")
    cluster.add_argument("bin", type=Path)
    cluster.add_argument("out", type=Path)
    cluster.add_argument("names", nargs="*")
    programs = kinds.add_parser("programs")
    programs.add_argument("out", type=Path)
    programs.add_argument("specifications", nargs="+", metavar="NAME=FILE")
    chosen = parser.parse_args(arguments)
    if chosen.kind == "cluster":
        write(chosen.out, images_of_the_cluster(chosen.bin, chosen.names))
    else:
        write(chosen.out, images_of_programs(chosen.specifications))


if __name__ == "__main__":
    main(sys.argv[1:])
