import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmrec_train.data.manifest import read_manifest
from mmrec_train.data.mixture import FairShare, resolve_weights
from mmrec_train.errors import UserError
from tests.data.documents import write_documents


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"format": 2', '"format": 1', r"format: .*another version \(this one reads format 2\)"),
        ('"dtype"', '"dtypo"', "dtypo|dtype"),
        ('"shard_00000"', '"../shard_0"', r"sources\.main\.splits\.train\.shards\.0\.name"),
        ('"main"', '"../main"', r"sources"),
        ('"xxh3_128": "', '"xxh3_128": "../', r"xxh3_128"),
        ("{", "", "the file"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    write_documents(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"manifest\.json: .*({named}).*prepare it again"):
        read_manifest(tmp_path)


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["sources"]["main"]["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(dtype="uint16", vocab_size=100),
            r"shard_00000\.bin of 8 bytes, where 2 tokens of uint16 need 4",
        ),
        (lambda m: m.update(dtype="uint16", vocab_size=70_000), "a vocabulary of 70000 in uint16"),
        (lambda m: m.update(eos_id=1 << 16), "eos_id 65536 in a vocabulary of 65536"),
        (lambda m: m.update(bos_id=-1), "bos_id -1"),
        (lambda m: shard(m).update(documents=2), "an idx of 16 bytes, where 2 documents need 24"),
        (lambda m: shard(m).update(tokens=3), "2 tokens, but its shards hold 3"),
        (lambda m: shard(m)["idx"].update(size=24), "an idx of 24 bytes, where 1 documents need 16"),
        (lambda m: m["sources"]["main"]["splits"]["train"].update(documents=7), "7 documents, but its shards hold 1"),
        (lambda m: m["sources"]["main"]["splits"]["train"]["shards"].append(shard(m)), "two shards of one name"),
        (
            lambda m: m["sources"].update(b={**m["sources"]["main"], "weight": 0.5}),
            "a weight for b, but none for main",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write_documents(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"manifest\.json: .*contradicts itself: .*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_out": {"short": 3, "long": -1}}, r"left_out\.long: .* greater than or equal to 0"),
        ({"invalid_utf8_documents": -1}, r"invalid_utf8_documents: .* greater than or equal to 0"),
        ({"invalid_utf8_replaced": -1}, r"invalid_utf8_replaced: .* greater than or equal to 0"),
        ({"weight": 5e-324}, r"weight: .* greater than or equal to 0\.000000001"),
        ({"weight": 0}, r"weight: .* greater than or equal to 0\.000000001"),
        ({"weight": 1.1e9}, r"weight: .* less than or equal to 1000000000"),
    ],
)
def test_counts_and_weights_out_of_range(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_documents(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["main"].update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"manifest\.json: sources\.main\.{message}"):
        read_manifest(tmp_path)


def test_the_smallest_weight_beside_the_largest(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, {"a": [[1]], "b": [[2]]}, weights={"a": 1e9, "b": 1e-9})
    weights = {name: source.weight for name, source in dataset.sources.items()}
    assert resolve_weights({"a": 1, "b": 1}, weights, None, None) == {"a": 1.0, "b": 1e-18}
    shares = FairShare([1.0, 1e-18])
    shares.given = [10**15, 10**15]
    assert shares.next([0, 1]) == 0


def test_a_manifest_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        read_manifest(tmp_path)
