"""Small configurations on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

# Line numbers in the tests count from the first line here: run_dir is line 1.
MINIMAL = """\
run_dir: runs/test
model:
  preset: tiny
data:
  path: data/test
optimizer:
  learning_rate: 1e-3
train:
  steps: 10
  global_batch_size: 4
  micro_batch_size: 2
  precision: fp32
deepspeed:
  config: ds_configs/zero3.json
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def minimal() -> str:
    return MINIMAL


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file of the test's folder, which is the current one, and gives its path relative to it."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file
