"""Data sets of the Hugging Face hub, streamed: nothing but the rows that are read is downloaded."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import datasets
import httpx
import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from mmrec_train.preparation.records import MOST_DOCUMENTS, Rows
from mmrec_train.preparation.sources import Piece, Position, SourceUnavailable, Stock
from mmrec_train.preparation.tables import needed_columns, slices

_ROWS = 16  # read at once, whatever their size
_RETRIES = 4
_FIRST_WAIT = 0.5  # seconds before the first retry; each further one waits twice as long
_BUSY = (408, 429, 500, 502, 503, 504)  # answers of a server that may have another one later

Result = TypeVar("Result")


class HubSource:
    """A data set's split. Its commit is chosen when reading begins and then kept, so that what is read is the same."""

    size: int | None = None
    has_fields = True

    def __init__(self, dataset: str, name: str | None, split: str, fields: Sequence[str]) -> None:
        self._dataset, self._name, self._split, self._fields = dataset, name, split, fields
        self._revision: str | None = None

    def take_stock(self, recorded: Stock | None) -> Stock:
        if recorded is not None:
            ((_, self._revision),) = recorded
        else:
            self._revision = self._patiently(lambda: HfApi().dataset_info(self._dataset).sha)
        return [["revision", self._revision]]

    def provenance(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "dataset": self._dataset,
            "name": self._name,
            "split": self._split,
            "revision": self._revision,
        }

    def read(self, position: Position | None, batch_bytes: int) -> Iterator[Piece]:
        failures = 0
        while True:
            try:
                for piece in self._stream(position, batch_bytes):
                    position, failures = piece.position, 0
                    yield piece
                return
            except _ERRORS as error:
                failures += 1
                self._wait_or_raise(error, failures)

    def _stream(self, position: Position | None, batch_bytes: int) -> Iterator[Piece]:
        stream = datasets.load_dataset(
            self._dataset, self._name, split=self._split, revision=self._revision, streaming=True
        ).with_format("arrow")
        splits = stream.info.splits or {}
        rows_expected = splits[self._split].num_examples if self._split in splits else None
        where = f"{self._dataset} (split {self._split})"
        state, done, skipped = stream.state_dict(), 0, 0
        if position is not None:
            state, done, skipped = position["state"], position["rows"], position["rows_since_state"]
            stream.load_state_dict(state)
        tables = (t.select(needed_columns(where, self._fields, t.column_names)) for t in stream.iter(batch_size=_ROWS))
        for table in _gathered(tables, batch_bytes):
            end = skipped
            for part in slices(table.slice(skipped), batch_bytes):
                end += len(part)
                done += len(part)
                after = {"state": state, "rows": done, "rows_since_state": end}
                yield Piece(Rows.of(where, part), after, min(1.0, done / rows_expected) if rows_expected else None)
            state, skipped = stream.state_dict(), 0

    def _patiently(self, call: Callable[[], Result]) -> Result:
        failures = 0
        while True:
            try:
                return call()
            except _ERRORS as error:
                failures += 1
                self._wait_or_raise(error, failures)

    def _wait_or_raise(self, error: Exception, failures: int) -> None:
        """After the first, second, ... failure in a row: wait where another try may succeed, else raise UserError."""
        if failures > _RETRIES or not _may_pass(error):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SourceUnavailable(
                f"reading --source {self._dataset} from the Hugging Face hub failed (no local file or folder has that "
                f"name): {reason} Check the name, --name, --split and the network; private data sets need "
                "`hf auth login`."
            ) from error
        time.sleep(_FIRST_WAIT * 2 ** (failures - 1))


def _gathered(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Consecutive tables put together until they have `size` bytes. When one is yielded, no more has been read."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(t.nbytes for t in waiting) >= size or sum(map(len, waiting)) >= MOST_DOCUMENTS:
            yield pa.concat_tables(waiting, promote_options="default")
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting, promote_options="default")


# The network, an unknown name or split, rows that do not parse.
_ERRORS = (OSError, ValueError, httpx.HTTPError, pa.ArrowException, datasets.exceptions.DatasetsError)


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is the network's or that of a busy server."""
    while error is not None:
        if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError):
            return error.response.status_code in _BUSY
        if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False
