"""Which ninja compiles."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from mmrec_train.ninja import prefer_own_ninja


def test_the_ninja_beside_python_is_found_before_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("venv", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    prefer_own_ninja()
    assert shutil.which("ninja") == str(tmp_path / "venv/ninja")
    first = os.environ["PATH"]
    prefer_own_ninja()
    assert os.environ["PATH"] == first
