"""What a power cut must not take."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file's content, or the names of a folder's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
