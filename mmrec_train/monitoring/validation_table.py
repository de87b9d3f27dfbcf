"""The validation sets of a run, one row each: what the last validation came to, by position in the document."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmrec_train.monitoring.metrics_file import Record, step_of

_LOSS = re.compile(r"validation/(?P<set>[^/]+)/loss(_(?P<positions>.+))?")


@dataclass(frozen=True)
class ValidationTable:
    """Headings and rows as text; a dash where a set has no tokens at these positions."""

    step: int
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def set_losses(record: Record) -> dict[str, float]:
    """The loss on each validation set that a record has, by name."""
    return {name: losses[""] for name, losses in _losses(record).items() if "" in losses}


def validation_table(records: Sequence[Record]) -> ValidationTable | None:
    """That of the last record of a validation; None where there is none."""
    for record in reversed(records):
        sets = _losses(record)
        if sets:
            break
    else:
        return None
    found = {key for losses in sets.values() for key in losses if key}
    positions = sorted(found, key=lambda key: int(key.removesuffix("K+").split("-")[0]))  # 0-1K … 100K+
    rows = []
    for name, losses in sets.items():
        perplexity = record.get(f"validation/{name}/perplexity")
        cells = [_number(losses.get("")), _number(perplexity), *(_number(losses.get(key)) for key in positions)]
        rows.append((name, *cells))
    return ValidationTable(step_of(record), ("set", "loss", "perplexity", *positions), tuple(rows))


def _losses(record: Record) -> dict[str, dict[str, float]]:
    """By set and positions; "" stands for all of them. In the record's order."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        match = _LOSS.fullmatch(key)
        if match and isinstance(value, int | float):
            found.setdefault(match["set"], {})[match["positions"] or ""] = value
    return found


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.4f}" if math.isfinite(value) else str(value)
