import os
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from launch.build_ops import remove_stale_locks


def test_the_lock_of_a_killed_build_is_removed_that_of_a_running_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    builder = FileBaton(str(lock))
    assert builder.try_acquire() and builder.fd is not None
    remove_stale_locks(tmp_path)
    assert lock.exists()
    assert f"Waiting for another build to release {lock}" in capsys.readouterr().out
    os.close(builder.fd)  # what the end of a killed process does
    remove_stale_locks(tmp_path)
    assert not lock.exists()
    assert f"Removing {lock}" in capsys.readouterr().out
