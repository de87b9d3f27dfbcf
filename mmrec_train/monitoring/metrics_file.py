"""`RUN/metrics.jsonl`: one record a line, as a JSON object. Plots and reports are made from it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mmrec_train.errors import UserError

Scalar = bool | int | float | str | None
Record = Mapping[str, Scalar]
"""A flat record: `step` and what was measured there. docs/monitoring.md lists the keys and their units."""

FILE_NAME = "metrics.jsonl"

# JSON has no NaN. A number that is not finite is written as null, and named here with its value ("nan",
# "inf", "-inf"): so any JSON reader can read the line, and `read_metrics` can still give back what was
# logged.
NONFINITE_KEY = "nonfinite"


def step_of(record: Record) -> int:
    step = record["step"]
    assert isinstance(step, int), record
    return step


def encode(record: Record) -> str:
    """The line of `record`, without its newline. Raises TypeError for a value that is no plain scalar."""
    assert NONFINITE_KEY not in record, record
    nonfinite = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    line = {k: None if k in nonfinite else v for k, v in record.items()}
    return json.dumps(line | ({NONFINITE_KEY: nonfinite} if nonfinite else {}), allow_nan=False)


def decode(line: str | bytes) -> Record:
    """The record that `encode` wrote as `line`. Raises ValueError where there is none."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("not an object with an integer `step`")
    return record | {k: float(v) for k, v in record.pop(NONFINITE_KEY, {}).items()}


def read_metrics(run_dir: str | Path) -> list[Record]:
    """All records of a run, in the order in which they were logged, as they were logged (NaN is NaN again).

    A last line without its newline was cut by a kill, or is being written: it does not count. A missing file,
    and any other line that is no record, raise UserError.
    """
    path = Path(run_dir) / FILE_NAME
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {run_dir} is not the folder of a run that has logged.") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(decode(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no metrics record ({error}). Remove that line.") from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: who reads it, even after a power cut, finds all of the old or of the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class MetricsFile:
    """Appends records to `RUN/metrics.jsonl`.

    `resume_step` is the step from which training goes on. Records of later steps are dropped first, because
    those steps are about to be trained again; at 0 the run starts anew and nothing is kept.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        path = run_dir / FILE_NAME
        previous = read_metrics(run_dir) if resume_step > 0 and path.exists() else []
        kept = [record for record in previous if step_of(record) <= resume_step]
        write_atomically(path, "".join(encode(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, record: Record) -> None:
        self._file.write(encode(record) + "\n")
        self._file.flush()  # a killed run keeps its lines, and `tail -f` follows them

    def close(self) -> None:
        self._file.close()
