"""A Hugging Face hub on localhost: as much of its interface as streaming data sets and loading tokenizers use."""

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
_REVISIONS = f"(?:{REVISION}|main)"


@contextmanager
def fake_hub(
    data_sets: dict[str, dict[str, bytes]],
    trouble: Callable[[str], int | float | None] = lambda path: None,
    models: dict[str, dict[str, bytes]] | None = None,
) -> Iterator[str]:
    """Serve data sets and models, by name (OWNER/NAME) their files by path; yields the endpoint's address.

    `trouble` is asked before each answer to a path: a status (an integer) is answered in its place, after so many
    seconds (a float) the connection is cut off without an answer, None means no trouble.
    """

    repositories = {f"datasets/{name}": files for name, files in data_sets.items()}
    repositories |= {f"models/{name}": files for name, files in (models or {}).items()}
    known = "|".join(map(re.escape, repositories))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # which makes each of hundreds of answers wait 40 ms

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            found = trouble(path)
            if isinstance(found, float):
                time.sleep(found)
                self.close_connection = True
            elif found is not None:
                self._answer(found, b"", {})
            elif match := re.fullmatch(rf"/api/({known})(/revision/{_REVISIONS})?", path):
                self._json(_repository(match[1].partition("/")[2], repositories[match[1]]))
            elif match := re.fullmatch(rf"/api/({known})/tree/{_REVISIONS}(/.*)?", path):
                recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
                self._json(_tree(repositories[match[1]], (match[2] or "").strip("/"), recursive))
            elif match := re.fullmatch(rf"({known})/resolve/{_REVISIONS}/(.+)", _with_kind(path)):
                self._file(repositories[match[1]], match[2])
            else:
                self._missing()

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if match := re.fullmatch(rf"/api/({known})/paths-info/{_REVISIONS}", self.path):
                files = repositories[match[1]]
                self._json([_entry(path, files[path]) for path in parse_qs(body)["paths"] if path in files])
            else:
                self._missing()

        def _file(self, files: dict[str, bytes], path: str) -> None:
            if path not in files:
                return self._missing()
            data, status, headers = (
                files[path],
                200,
                {"ETag": f'"{_blob_id(files[path])}"', "X-Repo-Commit": REVISION},
            )
            if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(requested[1]), int(requested[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
            self._answer(status, data, headers)

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _missing(self) -> None:
            is_known = re.match(rf"({known})/", _with_kind(self.path))
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if is_known else "RepoNotFound"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent: the tests' output is for failures."""

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent about clients that go away: some are killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _with_kind(path: str) -> str:
    """KIND/OWNER/NAME/... of a path: those of models' files begin with the owner."""
    path = path.removeprefix("/").removeprefix("api/")
    return path if path.startswith(("datasets/", "models/")) else f"models/{path}"


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    below = {path: data for path, data in files.items() if path.startswith(prefix)}
    parents = {str(parent) for path in below for parent in PurePosixPath(path.removeprefix(prefix)).parents} - {"."}
    entries = [{"type": "directory", "path": prefix + parent, "size": 0, "oid": REVISION} for parent in sorted(parents)]
    entries += [_entry(path, data) for path, data in below.items()]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"]).removeprefix(prefix)]


def _repository(name: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": path} for path in files]
    return {
        "_id": "1",
        "id": name,
        "sha": REVISION,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": siblings,
    }
