"""The folder of an unfinished data set, beside the place where it appears when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrec_train.disk import sync
from mmrec_train.errors import UserError


class Refusal(UserError):
    """The folder cannot be used for this, and was left as it was."""


class Partial:
    """`.NAME.partial` beside NAME: `data` becomes NAME by one rename, `journal` says how far it has come."""

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.expanduser(out)).resolve()  # the data set takes the place of what a link leads to
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.data = self.folder / "data"
        self.journal = self.folder / "journal.sqlite"

    @property
    def holds_documents(self) -> bool:
        return any(self.data.glob("*/*/*.bin"))

    def publish(self) -> None:
        """Let the data set appear."""
        self.data.rename(self.out)
        sync(self.out.parent)

    def discard(self) -> None:
        """Remove the folder, the journal last: as long as it is there, what it says can be finished."""
        shutil.rmtree(self.data, ignore_errors=True)  # gone already where it was published
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.journal:
                path.unlink()
        self.journal.unlink(missing_ok=True)
        self.folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep others from it; UserError where one is at work there, or `out` holds something."""
        try:
            if holds_something(self.out) and not self.journal.exists():
                if self.folder.exists():  # of a process that was killed when all was done
                    shutil.rmtree(self.folder)
                raise occupied(self.out)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise Refusal(f"--out {self.out}: cannot write there: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(f"--out {self.out}: another process is preparing it") from None
            if not _is_same_file(lock.fileno(), self.folder / "lock"):
                raise Refusal(f"--out {self.out}: another process has just ended preparing it; try again")
            if holds_something(self.out) and self.data.exists():
                raise occupied(self.out)
            yield


def holds_something(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def occupied(out: Path) -> Refusal:
    return Refusal(f"--out {out} exists and is not an empty folder; choose another, or remove it first")


def _is_same_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
