"""The SQLite file that holds labels, notes and lists: how it is opened, made, read and written.

The tables are described in `saes.notes`. Every question and every change has a connection of its
own, in one transaction: nothing is shared between threads or carried over a fork.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from probe.errors import Failure

SCHEMA = 1
APPLICATION = 0x4C4F5247
"""SQLite's `application_id` of these files ("LORG"): another program's file is refused."""
BUSY_S = 10.0
"""How long a writer waits for another one, in seconds."""
TABLES = (
    "CREATE TABLE versions (sae TEXT NOT NULL, feature INTEGER NOT NULL, version INTEGER NOT NULL, "
    "label TEXT NOT NULL, note TEXT NOT NULL, changed TEXT NOT NULL, "
    "PRIMARY KEY (sae, feature, version)) WITHOUT ROWID",
    "CREATE TABLE members (place INTEGER PRIMARY KEY, list TEXT NOT NULL, sae TEXT NOT NULL, "
    "feature INTEGER NOT NULL, note TEXT NOT NULL, UNIQUE (list, sae, feature))",
    "CREATE INDEX members_by_feature ON members (sae, feature)",
    "CREATE TABLE revision (number INTEGER NOT NULL)",
    "INSERT INTO revision VALUES (0)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)


class NoteStore:
    """The file; may be shared by threads and by processes.

    `reading` and `writing` raise `Failure`, in a sentence, where the file is damaged, cannot be
    opened or written, or is held by another process for longer than `BUSY_S`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The file at one point in time, or an empty one where there is none yet."""
        with self._explaining(), contextlib.ExitStack() as held:
            file = held.enter_context(contextlib.closing(self._open_to_read()))
            file.execute("BEGIN")
            if not self._is_ours(file):
                file = held.enter_context(contextlib.closing(_connect(":memory:")))
                _make_tables(file)
            yield file

    def _open_to_read(self) -> sqlite3.Connection:
        if not self.path.exists():
            return _connect(":memory:")
        waiting = self.path.with_name(f"{self.path.name}-wal")
        # In a folder that cannot be written, SQLite can make no `-shm` file beside a finished one.
        sealed = not os.access(self.path.parent, os.W_OK) and not waiting.exists()
        return _connect(f"{self.path.absolute().as_uri()}?{'immutable=1' if sealed else 'mode=rw'}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The file for one change, made where there is none; undone where anything is raised."""
        with self._explaining():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            address = f"{self.path.absolute().as_uri()}?mode=rwc"
            with contextlib.closing(_connect(address)) as file:
                file.execute("BEGIN")
                self._is_ours(file)  # another program's file is left as it is
                file.execute("ROLLBACK")
                _write_ahead(file)
                file.execute("BEGIN IMMEDIATE")
                try:
                    if not self._is_ours(file):
                        _make_tables(file)
                    before = file.total_changes
                    yield file
                    if file.total_changes > before:
                        file.execute("UPDATE revision SET number = number + 1")
                    file.execute("COMMIT")
                except BaseException:
                    if file.in_transaction:
                        file.execute("ROLLBACK")
                    raise

    def _is_ours(self, file: sqlite3.Connection) -> bool:
        """Whether the tables are there; False in a new file. Raises `Failure` for another's."""
        application, schema = (
            file.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        if (application, schema) == (APPLICATION, SCHEMA):
            return True
        if application == APPLICATION:
            raise Failure(
                f"the notes in {self.path} have schema {schema} where this version reads {SCHEMA}; "
                "use the version that wrote them, or move the file away to begin anew."
            )
        if file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise Failure(
                f"{self.path} is another program's SQLite file; move it away, and notes begin anew."
            )
        return False

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """What SQLite or the disk says, as a sentence."""
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CANTOPEN) & 0xFF
            raise Failure(_TROUBLE.get(code, _DAMAGED).format(path=self.path, why=error)) from error


_DAMAGED = (
    "the notes in {path} are damaged ({why}); move the file away, with the -wal file beside it, "
    "and load your last export."
)
_CLOSED = "the notes in {path} cannot be opened or written ({why}); make the folder writable."
_BUSY = "another process has been writing {path} for too long ({why}); try again."
_FULL = "the disk that holds {path} is full ({why}); free some space and save again."
_TROUBLE = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _CLOSED,
    sqlite3.SQLITE_CANTOPEN: _CLOSED,
    sqlite3.SQLITE_PERM: _CLOSED,
    sqlite3.SQLITE_IOERR: _CLOSED,
}


def _connect(address: str) -> sqlite3.Connection:
    """A connection of its own for each question: cheap, and no thread ever waits for another's."""
    return sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None)


def _write_ahead(file: sqlite3.Connection) -> None:
    """Switch to write-ahead mode, which the file then keeps; the next writer does it if not now."""
    try:
        file.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise


def _make_tables(file: sqlite3.Connection) -> None:
    for statement in TABLES:
        file.execute(statement)
