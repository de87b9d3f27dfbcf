"""Checksums: xxh3_128, as 32 hexadecimal digits."""

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash


def file_checksum(path: Path) -> str:
    """Checksum of a file's bytes, read in blocks: memory stays small however long the file is."""
    with path.open("rb") as file:
        # hashlib.file_digest only asks for the hash protocol (update, hexdigest), which xxhash follows.
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def json_checksum(value: Any) -> str:
    """Checksum of a JSON value in canonical form (sorted keys, no spaces): a file's layout does not count."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode("utf-8", "surrogatepass"))
