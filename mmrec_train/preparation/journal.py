"""What an unfinished preparation has done so far, in an SQLite file: a commit of it is all or nothing."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmrec_train.data.manifest import ShardInfo, Split
from mmrec_train.errors import UserError
from mmrec_train.preparation.shards import OpenShard, SplitWriter
from mmrec_train.preparation.sources import Position, Stock
from mmrec_train.preparation.stored_list import StoredList

_CACHE_KIBIBYTES = 256 << 10  # of the table of hashes; what is beyond it is read from the disk
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE stock (source TEXT, number INTEGER, value TEXT NOT NULL, PRIMARY KEY (source, number)) WITHOUT ROWID;
CREATE TABLE shards (
    source TEXT, split TEXT, number INTEGER, value TEXT NOT NULL, PRIMARY KEY (source, split, number)
) WITHOUT ROWID;
CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass
class SourceState:
    """How far one source has come. `position` None: at its beginning."""

    position: Position | None = None
    finished: bool = False
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    invalid_documents: int = 0
    replaced: int = 0


class Journal:
    """Made by `open_journal`. Nothing is kept until `commit`, but for `set_fact` and `set_stock`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def fact(self, name: str) -> Any:
        """A JSON value stored by `set_fact`, None where there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, name: str, value: Any) -> None:
        self._set_fact(name, value)
        self._database.commit()

    def stock(self, source: str) -> Stock | None:
        """What `set_stock` stored, None where that was nothing. It stays on the disk."""
        rows = StoredList(self._database, "SELECT value FROM stock WHERE source = ? ORDER BY number", source)
        return rows if len(rows) else None

    def set_stock(self, source: str, stock: Stock) -> None:
        rows = ((source, number, json.dumps(row)) for number, row in enumerate(stock))
        self._database.executemany("INSERT INTO stock VALUES (?, ?, ?)", rows)
        self._database.commit()

    def is_new(self, text_hash: bytes) -> bool:
        """Whether a hash never occurred before; from now on it has."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (text_hash,)).rowcount == 1

    def state(self, source: str) -> SourceState:
        return SourceState(**(self.fact(f"source {source}") or {}))

    def shards(self, source: str, split: Split) -> tuple[list[ShardInfo], OpenShard | None]:
        """The finished shards of a source's split, and the unfinished one."""
        query = "SELECT value FROM shards WHERE source = ? AND split = ? ORDER BY number"
        finished = [ShardInfo.model_validate_json(row[0]) for row in self._database.execute(query, (source, split))]
        unfinished = self.fact(f"unfinished {source} {split}")
        return finished, OpenShard(*unfinished) if unfinished else None

    def commit(self, source: str, state: SourceState, writers: dict[Split, SplitWriter]) -> None:
        """Keep the source's state. Its documents are brought to the disk before."""
        for split, writer in writers.items():
            self._set_fact(f"unfinished {source} {split}", writer.sync())
            query = "SELECT count(*) FROM shards WHERE source = ? AND split = ?"
            (known,) = self._database.execute(query, (source, split)).fetchone()
            self._database.executemany(
                "INSERT INTO shards VALUES (?, ?, ?, ?)",
                (
                    (source, split, number, writer.shards[number].model_dump_json())
                    for number in range(known, len(writer.shards))
                ),
            )
        self._set_fact(f"source {source}", asdict(state))
        self._database.commit()

    def _set_fact(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal in the file `path`, a new one where there is none. Errors of the disk are raised as OSError.

    What was not committed is forgotten. UserError where the file is damaged.
    """
    try:
        database = sqlite3.connect(path)
        try:
            database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
            database.execute("PRAGMA synchronous = FULL")
            if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                # One transaction: a file killed in between has no tables.
                database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            yield Journal(database)
        finally:
            database.close()
    except sqlite3.OperationalError as error:  # a full disk, no permission
        raise OSError(None, str(error), str(path)) from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}). Remove its folder and start anew.") from error
