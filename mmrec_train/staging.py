"""A folder that appears only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrec_train.errors import UserError


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, or vanishes if the body fails.

    Raises UserError where `out` is anything but an empty folder, or the disk refuses.
    """
    out = Path(os.path.expanduser(out)).absolute()
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} exists and is not an empty folder; choose another, or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror or error}") from error
    try:
        yield folder
        folder.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: writing failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already after the rename
