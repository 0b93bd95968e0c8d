"""The one place where state is kept: SQLite in WAL mode with full synchronisation, and a decoded copy in memory.

Every change is a function of a `Change` and becomes durable as a whole or not at all. Changes that meet are committed
together, so that sixteen writers share one fsync. Readers never wait: they see what was committed last. Nothing else
may open the database while a manager runs (the pool's lock sees to it).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from csi_driver.embedded.model import TABLES, Table
from csi_driver.errors import HostFailure, StorageUnavailable

_log = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")

_Key = tuple[str, str, str]
"""Table, grouping ("" or a client's name), id."""
_Layer = dict[_Key, object]
"""Records by key; None stands for a deleted one."""
_Texts = dict[_Key, str | None]
"""What a layer's records are in the database."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    kind TEXT NOT NULL, grouping TEXT NOT NULL, id TEXT NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (kind, grouping, id)
)
"""
_UPSERT = """
INSERT INTO documents VALUES (?, ?, ?, ?) ON CONFLICT (kind, grouping, id) DO UPDATE SET record = excluded.record
"""
_RESERVE_BYTES = 1 << 20
_DELETE = "DELETE FROM documents WHERE kind = ? AND grouping = ? AND id = ?"


class DatabaseUnusable(HostFailure):
    """The manager's database cannot be opened or read."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(
            f"the database {path} cannot be read: {why}; correct that, or restore the file and its -wal from a backup "
            "(the volumes' data is in other files and is not touched)"
        )


class Change:
    """A view of the store inside one change: reads see what the change itself has put."""

    def __init__(self, layers: tuple[_Layer, ...], committed: dict[tuple[str, str], dict[str, object]]) -> None:
        self.puts: _Layer = {}
        self._layers = (self.puts, *layers)
        self._committed = committed

    def get(self, table: Table[R], key: str, grouping: str = "") -> R | None:
        """Return the record, or None."""
        place = (table.name, grouping, key)
        for layer in self._layers:
            if place in layer:
                return layer[place]  # type: ignore[return-value]
        return self._committed.get((table.name, grouping), {}).get(key)  # type: ignore[return-value]

    def put(self, table: Table[R], key: str, record: R, grouping: str = "") -> None:
        self.puts[table.name, grouping, key] = record

    def delete(self, table: Table[R], key: str, grouping: str = "") -> None:
        self.puts[table.name, grouping, key] = None


class _Batch:
    """Changes that become durable together, and what became of them."""

    def __init__(self) -> None:
        self.puts: _Layer = {}
        self.texts: _Texts = {}
        self.done = False
        self.problem: BaseException | None = None


class Store:
    """The manager's records. Threads may call everything."""

    def __init__(self, path: Path) -> None:
        """Open or make the database at `path` and read all of it. Raises DatabaseUnusable."""
        self._tables = {table.name: table for table in TABLES}
        self._change_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._staged = _Batch()
        self._committing = _Batch()
        self._committed: dict[tuple[str, str], dict[str, object]] = {}
        self._reserve = path.with_name(f"{path.name}.ballast")
        """Space for the changes that make room again when the disk is full."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as problem:
            raise DatabaseUnusable(path, problem) from problem
        with contextlib.ExitStack() as undo:
            undo.callback(self._connection.close)
            self._read(path)
            undo.pop_all()
        self._keep_reserve()

    def _read(self, path: Path) -> None:
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_SCHEMA)
            rows = self._connection.execute("SELECT kind, grouping, id, record FROM documents ORDER BY rowid")
            for kind, grouping, key, text in rows:
                if kind not in self._tables:
                    raise DatabaseUnusable(path, f"it has records of the kind {kind!r}, which only a newer version has")
                self._committed.setdefault((kind, grouping), {})[key] = self._tables[kind].record(text)
        except (sqlite3.Error, ValueError, TypeError, KeyError) as problem:
            raise DatabaseUnusable(path, problem) from problem

    def close(self) -> None:
        """Close the database; no call may follow."""
        with self._commit_lock:
            self._connection.close()

    def get(self, table: Table[R], key: str, grouping: str = "") -> R | None:
        """Return the committed record, or None."""
        return self._committed.get((table.name, grouping), {}).get(key)  # type: ignore[return-value]

    def all(self, table: Table[R], grouping: str = "") -> list[R]:
        """Return the committed records of one grouping."""
        return list(self._committed.get((table.name, grouping), {}).values())  # type: ignore[arg-type]

    def everywhere(self, table: Table[R]) -> list[R]:
        """Return the committed records of all groupings."""
        return [
            record
            for kind, grouping in list(self._committed)
            if kind == table.name
            for record in self.all(table, grouping)
        ]

    def write(self, change: Callable[[Change], T]) -> T:
        """Run `change` and return its result once what it put is on disk.

        It must be quick, touch nothing but its Change and may run beside no other. What it raises passes through,
        and nothing of it is kept. Raises StorageUnavailable if the disk refuses.
        """
        with self._change_lock:
            view = Change((self._staged.puts, self._committing.puts), self._committed)
            result = change(view)
            # Before it joins the others: a record that cannot be written down fails its own change alone.
            texts = {place: self._text(place, record) for place, record in view.puts.items()}
            batch = self._staged
            batch.puts.update(view.puts)
            batch.texts.update(texts)
        if view.puts:
            self._commit(batch)
        return result

    def _text(self, place: _Key, record: object) -> str | None:
        return None if record is None else self._tables[place[0]].text(record)

    def _commit(self, batch: _Batch) -> None:
        with self._commit_lock:
            if not batch.done:
                with self._change_lock:
                    self._committing, self._staged = self._staged, _Batch()
                self._write_out(self._committing)
        if batch.problem is not None:
            raise StorageUnavailable(f"the manager's database refused a change: {batch.problem}") from batch.problem

    def _write_out(self, batch: _Batch) -> None:
        """Make a batch durable and visible. On failure it is dropped, with what was staged upon it since."""
        puts = [(*place, text) for place, text in batch.texts.items() if text is not None]
        gone = [place for place, text in batch.texts.items() if text is None]
        try:
            self._transact(puts, gone)
        except BaseException as problem:
            # Whatever it was: what stayed staged would be the ground of later changes, and never on disk.
            with self._change_lock:
                for lost in (batch, self._staged):
                    lost.done, lost.problem = True, problem
                self._committing, self._staged = _Batch(), _Batch()
            if isinstance(problem, sqlite3.Error):
                return
            raise
        with self._change_lock:
            for (kind, grouping, key), record in batch.puts.items():
                records = self._committed.setdefault((kind, grouping), {})
                if record is None:
                    records.pop(key, None)
                else:
                    records[key] = record
            batch.done = True
            self._committing = _Batch()

    def _transact(self, puts: list[tuple[str, str, str, str]], gone: list[_Key]) -> None:
        """Write once; where the disk or a quota is full, once more without the reserve file.

        Raises sqlite3.Error if nothing was committed, and nothing else: what fails afterwards undoes no commit.
        """
        try:
            self._write_rows(puts, gone)
        except sqlite3.OperationalError as problem:
            if not _may_lack_space(problem) or not self._release_reserve():
                raise
            self._write_rows(puts, gone)
            return
        self._keep_reserve()

    def _write_rows(self, puts: list[tuple[str, str, str, str]], gone: list[_Key]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(_UPSERT, puts)
            self._connection.executemany(_DELETE, gone)
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _keep_reserve(self) -> None:
        """Make the reserve file if it is missing or was only begun and there is plenty of space.

        An error is logged and passed over, for the next change tries again.
        """
        try:
            if self._has_reserve():
                return
            space = os.statvfs(self._reserve.parent)
            if space.f_bavail * space.f_frsize < 2 * _RESERVE_BYTES:
                return
            descriptor = os.open(self._reserve, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
            except OSError:
                self._reserve.unlink()
                raise
            finally:
                os.close(descriptor)
        except OSError as problem:
            _log.warning(
                "the reserve file %s cannot be made: %s; tried again at the next change", self._reserve, problem
            )

    def _has_reserve(self) -> bool:
        try:
            return self._reserve.stat().st_blocks * 512 >= _RESERVE_BYTES
        except FileNotFoundError:
            return False

    def _release_reserve(self) -> bool:
        """Remove the reserve file and return True; False if there is none or it cannot be removed."""
        try:
            self._reserve.unlink()
        except FileNotFoundError:
            return False
        except OSError as problem:
            _log.warning("the disk is full, and the reserve file %s cannot be removed: %s", self._reserve, problem)
            return False
        _log.warning("the disk is full: %s is removed, so that volumes can be detached and deleted", self._reserve)
        return True


def _may_lack_space(problem: sqlite3.OperationalError) -> bool:
    """Tell whether more space may help. SQLite calls a quota that is used up (EDQUOT) an I/O error."""
    primary = problem.sqlite_errorcode & 0xFF
    return primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
