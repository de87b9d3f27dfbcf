"""Files below a URL, through fsspec: s3://, gs://, https://, hf:// and all else that it has a library for."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from mmrec_train.errors import UserError

RETRY_PAUSES = (1.0, 4.0, 16.0)  # seconds before a file is asked for again
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_T = TypeVar("_T")


class Remote:
    """The files below `url`. A request that fails is tried again after each of RETRY_PAUSES. For any thread.

    Raises UserError, as its methods do, where the address cannot be read: an unknown protocol, a library that is not
    installed, a request that failed every time.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, root = _retried(self.url, lambda: _open(self.url))
        except FileNotFoundError as error:  # an archive, say
            raise UserError(f"cannot read {url}: {error}. Check the address.") from error
        self._root = root.rstrip("/")

    def read(self, path: str) -> bytes:
        """The bytes of a small file; FileNotFoundError where there is none."""
        content: bytes = self._request(path, self._files.cat_file)
        return content

    def download(self, path: str, target: Path) -> None:
        """Copy a file over the existing `target`; FileNotFoundError where there is none.

        OSError with a number in DISK_FULL where the local disk has no room.
        """
        self._request(path, lambda full_path: self._files.get_file(full_path, str(target)))

    def _request(self, path: str, request: Callable[[str], _T]) -> _T:
        """What `request` gives for the file's path in the file system."""
        return _retried(f"{self.url}/{path}", lambda: request(f"{self._root}/{path}"))


def _open(url: str) -> tuple[Any, str]:
    """The file system, and the path in it; some libraries connect for that."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:  # its message names the package
        raise UserError(f"cannot read {url}, a package is missing: {error} (pip install NAME).") from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise UserError(f"cannot read {url}: {error}. Known are {known}.") from error
    return files, root


def _retried(url: str, request: Callable[[], _T]) -> _T:
    for pause in (*RETRY_PAUSES, None):
        try:
            return request()
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each library below fsspec has its own
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            if pause is None:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"reading {url} failed {len(RETRY_PAUSES) + 1} times, at last with: {reason}. "
                    "Check the address, the network and the permissions, then start again."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
