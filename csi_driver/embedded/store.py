# SPDX-License-Identifier: Apache-2.0
"""The manager's database: SQLite in WAL mode with full synchronisation, and a decoded copy in memory.

A change is a function of a `Change`; it becomes durable as a whole or not at all. Concurrent changes are committed
together, so that sixteen writers share one fsync. Readers never wait: they see the last commit, and the changes of
`write_later`, which join the next commit. The pool's lock keeps other processes from the database.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from csi_driver.embedded.model import TABLES, Table
from csi_driver.errors import HostFailure, StorageUnavailable

_log = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")

_Key = tuple[str, str, str]
"""Table, grouping ("" or a client's name), id."""
_Layer = dict[_Key, tuple[object, str | None]]
"""Changed records and their texts by key; (None, None) is a deleted one."""

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
_FORMER_TABLE = "groups"
"""Records of earlier versions: each volume has its layout, and VPGs are built in."""
_DELETE = "DELETE FROM documents WHERE kind = ? AND grouping = ? AND id = ?"


class DatabaseUnusable(HostFailure):
    def __init__(self, path: Path, why: object) -> None:
        super().__init__(
            f"the database {path} cannot be read: {why}; correct that, or restore the file and its -wal from a backup "
            "(the volumes' data is in other files and is not touched)"
        )


class Change:
    """The records as one change sees them: its own puts first."""

    def __init__(self, layers: tuple[_Layer, ...], committed: dict[tuple[str, str], dict[str, object]]) -> None:
        self.puts: dict[_Key, object] = {}
        self.builds_on_uncommitted = False
        """It read a record that a commit may still refuse."""
        self._layers = layers
        self._committed = committed

    def get(self, table: Table[R], key: str, grouping: str = "") -> R | None:
        place = (table.name, grouping, key)
        if place in self.puts:
            return self.puts[place]  # type: ignore[return-value]
        for layer in self._layers:
            if place in layer:
                self.builds_on_uncommitted = True
                return layer[place][0]  # type: ignore[return-value]
        return self._committed.get((table.name, grouping), {}).get(key)  # type: ignore[return-value]

    def put(self, table: Table[R], key: str, record: R, grouping: str = "") -> None:
        self.puts[table.name, grouping, key] = record

    def delete(self, table: Table[R], key: str, grouping: str = "") -> None:
        self.puts[table.name, grouping, key] = None


@dataclass(eq=False, slots=True)
class _Batch:
    """Changes that are committed together, and the result."""

    puts: _Layer = field(default_factory=dict)
    done: bool = False
    problem: BaseException | None = None


class Store:
    """The manager's records. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create the database and read it. Raises DatabaseUnusable."""
        self._tables = {table.name: table for table in TABLES}
        self._change_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._staged = _Batch()
        self._committing = _Batch()
        self._committed: dict[tuple[str, str], dict[str, object]] = {}
        self._unsaved: dict[_Key, str | None] = {}
        """Texts of `write_later`, which the next commit takes along."""
        self._ordered: dict[tuple[str, str], dict[str, list[str]]] = {}
        """Sorted ids of the groupings that were listed, by the values of their table's index; "" has all."""
        self._reserve = path.with_name(f"{path.name}.ballast")
        """Space for the changes that free space when the disk is full."""
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
                if kind == _FORMER_TABLE:
                    continue
                if kind not in self._tables:
                    raise DatabaseUnusable(path, f"it has records of the kind {kind!r}, which only a newer version has")
                self._committed.setdefault((kind, grouping), {})[key] = self._tables[kind].record(text)
        except (sqlite3.Error, ValueError, TypeError, KeyError) as problem:
            raise DatabaseUnusable(path, problem) from problem

    def close(self) -> None:
        """Close the database; no call may follow."""
        try:
            self.flush()
        except StorageUnavailable as problem:
            _log.warning("%s; the next start makes it again", problem)
        with self._commit_lock:
            self._connection.close()

    def get(self, table: Table[R], key: str, grouping: str = "") -> R | None:
        return self._committed.get((table.name, grouping), {}).get(key)  # type: ignore[return-value]

    def all(self, table: Table[R], grouping: str = "") -> list[R]:
        """Return the committed records of one grouping."""
        return list(self._committed.get((table.name, grouping), {}).values())  # type: ignore[arg-type]

    def page(self, table: Table[R], above: str, skip: int, count: int, index: str = "", grouping: str = "") -> list[R]:
        """Return `count` committed records (0 = all) of a grouping, in the order of their ids, of one moment.

        `index`: only the records with this value of the table's index. A page costs its records alone.
        """
        with self._change_lock:
            ids = self._ids(table, grouping).get(index, [])
            first = bisect_right(ids, above) + skip
            records: dict[str, R] = self._committed.get((table.name, grouping), {})  # type: ignore[assignment]
            return [records[key] for key in ids[first : first + count if count else None]]

    def span(self, table: Table[R], prefix: str, index: str = "") -> tuple[int, int]:
        """Return how many ids of records without a grouping are below a prefix, and how many begin with it."""
        with self._change_lock:
            ids = self._ids(table, "").get(index, [])
            first = bisect_left(ids, prefix)
            return first, bisect_left(ids, f"{prefix}\U0010ffff", first) - first

    def count(self, table: Table[R], grouping: str = "") -> int:
        return len(self._committed.get((table.name, grouping), ()))

    def _ids(self, table: Table[R], grouping: str) -> dict[str, list[str]]:
        lists = self._ordered.get((table.name, grouping))
        if lists is None:
            records = self._committed.get((table.name, grouping), {})
            lists = self._ordered[table.name, grouping] = {"": sorted(records)}
            for key in lists[""] if table.index else ():
                for value in _places(records[key], table.index)[1:]:
                    lists.setdefault(value, []).append(key)
        return lists

    def everywhere(self, table: Table[R]) -> list[R]:
        """Return the committed records of all groupings."""
        return [
            record
            for kind, grouping in list(self._committed)
            if kind == table.name
            for record in self.all(table, grouping)
        ]

    def write(self, change: Callable[[Change], T]) -> T:
        """Run `change`, commit its puts, and return its result.

        Changes run one at a time; they must be quick and use only their Change. An exception of `change` is passed on
        and discards its puts. Raises StorageUnavailable if the disk refuses the commit.
        """
        with self._change_lock:
            view, result = self._run(change)
            # Encoded before it joins the batch: an invalid record fails only its own change.
            encoded = {place: (record, self._text(place, record)) for place, record in view.puts.items()}
            batch = self._staged
            batch.puts.update(encoded)
        if view.puts:
            self._commit(batch)
        return result

    def write_later(self, change: Callable[[Change], T]) -> T:
        """Run `change` and show its puts at once; they are durable with the next commit.

        For records that the next start makes again from those on disk: they are lost if the process dies before.
        """
        with self._change_lock:
            view, result = self._run(change)
            if not view.builds_on_uncommitted and not any(
                place in layer for layer in (self._staged.puts, self._committing.puts) for place in view.puts
            ):
                self._unsaved |= {place: self._text(place, record) for place, record in view.puts.items()}
                self._show(view.puts)
                return result
        return self.write(change)

    def flush(self) -> None:
        """Commit what `write_later` left. Raises StorageUnavailable."""
        with self._change_lock:
            batch = self._staged if self._unsaved else None
        if batch is not None:
            self._commit(batch)

    def _run(self, change: Callable[[Change], T]) -> tuple[Change, T]:
        view = Change((self._staged.puts, self._committing.puts), self._committed)
        return view, change(view)

    def _text(self, place: _Key, record: object) -> str | None:
        return None if record is None else self._tables[place[0]].text(record)

    def _show(self, puts: Mapping[_Key, object]) -> None:
        for (kind, grouping, key), record in puts.items():
            records = self._committed.setdefault((kind, grouping), {})
            before = records.get(key)
            if record is None:
                records.pop(key, None)
            else:
                records[key] = record
            if (kind, grouping) in self._ordered:
                self._list(self._ordered[kind, grouping], self._tables[kind].index, key, before, record)

    def _list(self, lists: dict[str, list[str]], index: str, key: str, before: object, record: object) -> None:
        """Move an id to the lists of its new record."""
        old, new = (() if each is None else _places(each, index) for each in (before, record))
        for value in set(old) - set(new):
            ids = lists[value]
            del ids[bisect_left(ids, key)]
            if value and not ids:
                del lists[value]
        for value in set(new) - set(old):
            insort(lists.setdefault(value, []), key)

    def _commit(self, batch: _Batch) -> None:
        with self._commit_lock:
            if not batch.done:
                self._write_out(batch)
        if batch.problem is not None:
            raise StorageUnavailable(f"the manager's database refused a change: {batch.problem}") from batch.problem

    def _write_out(self, batch: _Batch) -> None:
        """Commit a batch and make it visible. A failure discards it and the changes staged since, which build on it."""
        with self._change_lock:
            self._committing, self._staged = batch, _Batch()
            unsaved, self._unsaved = self._unsaved, {}
        texts = unsaved | {place: text for place, (_, text) in batch.puts.items()}
        puts = [(*place, text) for place, text in texts.items() if text is not None]
        deleted = [place for place, text in texts.items() if text is None]
        try:
            self._transact(puts, deleted)
        except BaseException as problem:
            with self._change_lock:
                for lost in (batch, self._staged):
                    lost.done, lost.problem = True, problem
                self._committing, self._staged = _Batch(), _Batch()
                self._unsaved = unsaved | self._unsaved
            if isinstance(problem, sqlite3.Error):
                return
            raise
        with self._change_lock:
            self._show({place: record for place, (record, _) in batch.puts.items()})
            batch.done = True
            self._committing = _Batch()

    def _transact(self, puts: list[tuple[str, str, str, str]], deleted: list[_Key]) -> None:
        """Commit; if the disk or a quota is full, remove the reserve file and retry once.

        Raises sqlite3.Error if nothing was committed; a failure after the commit is only logged.
        """
        try:
            self._write_rows(puts, deleted)
        except sqlite3.OperationalError as problem:
            if not _may_lack_space(problem) or not self._release_reserve():
                raise
            self._write_rows(puts, deleted)
            return
        self._keep_reserve()

    def _write_rows(self, puts: list[tuple[str, str, str, str]], deleted: list[_Key]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(_UPSERT, puts)
            self._connection.executemany(_DELETE, deleted)
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _keep_reserve(self) -> None:
        """Create or complete the reserve file if there is enough space; an error is logged and retried later."""
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
            _log.warning("the reserve file %s cannot be made: %s; retried at the next change", self._reserve, problem)

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


def _places(record: object, index: str) -> tuple[str, ...]:
    """Return the values by which a record is listed; "" is that of all records."""
    values = getattr(record, index) if index else ()
    return ("", *((values,) if isinstance(values, str) else values))


def _may_lack_space(problem: sqlite3.OperationalError) -> bool:
    """Return True for errors of a full disk or quota; SQLite reports EDQUOT as an I/O error."""
    primary = problem.sqlite_errorcode & 0xFF
    return primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
