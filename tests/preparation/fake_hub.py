"""A Hugging Face hub on localhost: as much of its interface as streaming uses."""

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
    data_sets: dict[str, dict[str, bytes]], trouble: Callable[[str], int | float | None] = lambda path: None
) -> Iterator[str]:
    """Serve data sets, by name (OWNER/NAME) their files by path; yields the endpoint's address.

    `trouble` is asked before each answer to a path: a status (an integer) is answered in its place, after so many
    seconds (a float) the connection is cut off without an answer, None means no trouble.
    """

    known = "|".join(map(re.escape, data_sets))

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
            elif match := re.fullmatch(rf"/api/datasets/({known})(/revision/{_REVISIONS})?", path):
                self._json(_repository(match[1], data_sets[match[1]]))
            elif match := re.fullmatch(rf"/api/datasets/({known})/tree/{_REVISIONS}(/.*)?", path):
                recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
                self._json(_tree(data_sets[match[1]], (match[2] or "").strip("/"), recursive))
            elif match := re.fullmatch(rf"/datasets/({known})/resolve/{_REVISIONS}/(.+)", path):
                self._file(data_sets[match[1]], match[2])
            else:
                self._missing()

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if match := re.fullmatch(rf"/api/datasets/({known})/paths-info/{_REVISIONS}", self.path):
                files = data_sets[match[1]]
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
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if re.search(known, self.path) else "RepoNotFound"})

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


def _repository(dataset: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": path} for path in files]
    return {
        "_id": "1",
        "id": dataset,
        "sha": REVISION,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": siblings,
    }
