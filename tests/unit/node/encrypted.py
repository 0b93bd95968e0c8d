# SPDX-License-Identifier: Apache-2.0
"""A node with an encrypted volume, for the tests of encryption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from csi_driver.errors import SystemCallFailed
from csi_driver.model import AccessMode, BlockAccess, MountAccess
from csi_driver.publish_context import Encryption, History
from tests.fakes.disks import FakeDisk
from tests.fakes.luks import HEADER_BYTES, FakeLuks
from tests.fakes.node import BLOCK, EXT4, NAME, TARGET, UUID, FakeNode
from tests.fakes.node import publish_context as plain_context

SECRET = {"passphrase": "correct horse"}
WRONG = {"passphrase": "another horse"}
ROTATION = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
OPENED = f"/dev/mapper/{NAME}"


def context(by: Encryption = Encryption.LUKS, *, attachment: int = 1, read_only: bool = False) -> dict[str, str]:
    history = History.FIRST if attachment == 1 else History.ATTACHED
    return plain_context(encryption=by, attachment=attachment, history=history, read_only=read_only)


class Locked:
    """A node with one volume, and its calls with the arguments of an encrypted one."""

    def __init__(self, node: FakeNode, by: Encryption = Encryption.LUKS) -> None:
        self.node, self.by, self.attachment = node, by, 1
        self.secrets: Mapping[str, str] = SECRET
        self.parameters: Mapping[str, str] = {}
        self.access: MountAccess | BlockAccess = EXT4
        self.disk = node.host.attach(NAME, UUID)
        if by is Encryption.NATIVE:
            self.make_native()

    def make_native(self) -> FakeLuks:
        """Make the header as the storage does: with its own label and the passphrase."""
        luks = FakeLuks(self.node.host.inner_disk(self.disk, HEADER_BYTES), "", ["correct horse"], subsystem="")
        self.disk.luks = luks
        return luks

    @property
    def luks(self) -> FakeLuks:
        assert self.disk.luks is not None
        return self.disk.luks

    @property
    def mapper(self) -> FakeDisk | None:
        return self.node.host.mappers.get(NAME)

    def stage(self, *, read_only: bool = False) -> None:
        given = context(self.by, attachment=self.attachment, read_only=read_only)
        self.node.stage(
            access=self.access,
            context=given,
            volume_context=self.parameters,
            secrets=self.secrets,
        )

    def publish(self, *, read_only: bool = False) -> None:
        given = context(self.by, attachment=self.attachment)
        self.node.publish(access=self.access, context=given, read_only=read_only)

    def up(self) -> None:
        self.stage()
        self.publish()

    def down(self) -> None:
        self.node.unpublish()
        self.node.unstage()

    def reattach(self) -> None:
        """Detach the volume and attach it again."""
        self.disk = self.node.host.attach(NAME, UUID, like=self.node.host.detach(NAME))
        self.attachment += 1

    def source(self) -> str:
        """Return the source of the mount at the target."""
        entry = self.node.host.topmost(TARGET)
        assert entry is not None
        return entry.source if entry.node is None else str(entry.node.path)


def failing_at(node: FakeNode, point: str, failure: Exception) -> Callable[[str], None]:
    def step(passed: str) -> None:
        if passed == point:
            raise failure

    return step


def shared(locked: Locked, given: Mapping[str, str] | None = None) -> None:
    locked.node.stage(
        access=BLOCK,
        mode=AccessMode.MULTI_NODE_MULTI_WRITER,
        context=given or context(attachment=2),
        secrets=locked.secrets,
    )


class Died(SystemCallFailed):
    """The driver's process is gone at a point between two effects."""


@contextmanager
def dying_at(node: FakeNode, point: str) -> Iterator[None]:
    def step(reached: str) -> None:
        if reached == point:
            raise Died(point, 0)

    node.host.step = step
    try:
        yield
    finally:
        node.host.step = lambda reached: None
