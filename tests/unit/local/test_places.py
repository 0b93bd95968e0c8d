"""Where the files of a local run lie, and which directories cannot hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import InvalidField
from csi_driver.local.places import Places, Role

LONGEST = 107 - len("/controller.sock")


def directory_of(length: int) -> Path:
    return Path("/" + "d" * (length - 1))


def test_the_longest_directory_whose_sockets_fit_is_taken() -> None:
    places = Places.below(directory_of(LONGEST))
    assert len(str(places.controller_socket)) == 107


def test_a_directory_one_byte_too_long_is_refused_with_the_limit() -> None:
    with pytest.raises(InvalidField, match=rf"--directory: expected .* at most {LONGEST} bytes"):
        Places.below(directory_of(LONGEST + 1))


def test_the_limit_counts_bytes_not_characters() -> None:
    with pytest.raises(InvalidField):
        Places.below(Path("/" + "ü" * (LONGEST // 2 + 1)))


def test_a_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Places.below(Path("a/../b")).directory == tmp_path / "b"


@pytest.mark.parametrize("role", Role)
def test_every_role_has_a_pid_file_and_a_log_in_the_directory(role: Role) -> None:
    places = Places.below(Path("/x"))
    assert (places.pid_file(role), places.log(role)) == (Path(f"/x/{role}.pid"), Path(f"/x/{role}.log"))
