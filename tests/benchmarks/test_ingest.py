"""benchmarks/ingest.py on next to nothing: that it measures what it says."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_a_table_of_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("ingest")
    texts = benchmark.standard_texts()
    assert sum(map(len, texts)) > 5_000_000
    monkeypatch.setattr(benchmark, "standard_texts", lambda: texts[:20])
    benchmark.main(["--megabytes", "1", "--vocab-size", "300", "--processes", "1", "--repeat", "1"])
    head, alone, _, *table = capsys.readouterr().out.splitlines()
    assert "1 MB of JSON lines" in head and "vocabulary 300" in head
    rate = float(alone.split()[-3])
    processes, tokens, megabytes, _, by_cpu = (cell.strip(" %") for cell in table[2].strip("|").split("|"))
    assert processes == "1" and 0 < float(tokens) < 3 * rate and float(megabytes) > 0 and 0 < int(by_cpu) < 300
