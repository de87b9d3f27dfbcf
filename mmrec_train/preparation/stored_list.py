"""Lists on the disk: reading one takes the same memory, however long it is."""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any


class StoredList:
    """The JSON values that a query of an SQLite database gives, in its order. Can be read many times."""

    def __init__(self, database: sqlite3.Connection, query: str, *arguments: str) -> None:
        self._database, self._query, self._arguments = database, query, arguments

    def __iter__(self) -> Iterator[Any]:
        for (value,) in self._database.execute(self._query, self._arguments):
            yield json.loads(value)

    def __len__(self) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM ({self._query})", self._arguments).fetchone()
        return int(count)
