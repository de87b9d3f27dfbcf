"""From the configuration to the stream and the validation sets, over data sets of token ids."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pytest

from mmrec_train.config import RunConfig, load_config
from mmrec_train.config.stream import cache_settings, stream_settings, training_data, validation_sets
from mmrec_train.data import LaneLoader
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents

Write = Callable[[str, str], Path]
DOCUMENTS: dict[str, Sequence[Sequence[int]]] = {
    "code": numbered_documents([30, 50, 20]),
    "prose": numbered_documents([60, 40]),
}


@pytest.fixture
def load(write: Write, minimal: str) -> Callable[..., RunConfig]:
    """The minimal configuration on the data set that is written below: 4 lanes, chunks of 10 tokens, 10 steps."""
    write_documents(Path("data/test").absolute(), DOCUMENTS)
    path = write("run.yaml", minimal)
    return lambda *overrides: load_config(path, ["data.chunk_len=10", *overrides])


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        training_data(config, verify=True)
    return str(caught.value)


def test_defaults_are_those_of_the_stream(load: Callable[..., RunConfig]) -> None:
    config = load()
    assert list(training_data(config, verify=True).sources) == ["code", "prose"]
    defaults = StreamSettings()
    settings = stream_settings(config)
    assert (settings.weights or None, settings.epochs or None) == (defaults.weights, defaults.epochs)
    for key in ("seed", "order", "shuffle_shards", "window_chunks", "sequence_len"):
        assert getattr(settings, key) == getattr(defaults, key)


def test_every_key_arrives(load: Callable[..., RunConfig]) -> None:
    config = load(
        "data.seed=5",
        "data.order=by_length",
        "data.shuffle_shards=2",
        "data.window_chunks=3",
        "data.sources={prose: {weight: 2.5}, code: {weight: 1, epochs: 2}}",
        "data.sequence_len=[{step: 0, tokens: 20}, {step: 7, tokens: null}]",
    )
    settings = stream_settings(config)
    assert settings == StreamSettings(
        seed=5,
        order="by_length",
        weights={"prose": 2.5, "code": 1.0},
        epochs={"code": 2},
        shuffle_shards=2,
        window_chunks=3,
        sequence_len=((0, 20), (7, None)),
    )
    loader = LaneLoader(training_data(config, verify=True), settings, num_lanes=4, chunk_len=10, micro_batch_size=2)
    assert [chunk.input_ids.shape for chunk in loader.next_step()] == [(2, 30), (2, 30)]
    assert stream_settings(load("data.sequence_len=20")).sequence_len == ((0, 20),)


def test_sources_are_those_that_are_named(load: Callable[..., RunConfig]) -> None:
    dataset = training_data(load("data.sources={prose: {}}"), verify=True)
    assert (list(dataset.sources), dataset.num_documents, dataset.num_tokens) == (["prose"], 2, 100)
    assert refusal(load("data.sources={code: {}, pros: {}}")) == (
        "--set data.sources={code: {}, pros: {}}: data.sources: data/test has no source 'pros' to train on; "
        "did you mean 'prose'?"
    )


@pytest.mark.parametrize(
    ("sources", "steps", "possible"),
    [
        ("{code: {epochs: 4}}", 10, None),
        ("{code: {epochs: 4}}", 11, "400 in all its epochs, which is enough for 10 steps of 40;"),
        ("{code: {epochs: 3}, prose: {epochs: 2}}", 13, "500 in all its epochs, which is enough for 12 steps of 40;"),
        ("{code: {epochs: 1}, prose: {}}", 99, None),
        ("{prose: {}}", 99, None),
    ],
)
def test_finite_sources_must_have_the_steps(
    load: Callable[..., RunConfig], sources: str, steps: int, possible: str | None
) -> None:
    config = load(f"data.sources={sources}", f"train.steps={steps}")
    if possible is None:
        training_data(config, verify=True)
    else:
        message = refusal(config)
        assert message.startswith(f"--set train.steps={steps}: train.steps {steps} takes {40 * steps} tokens")
        assert possible in message


def test_a_remote_data_set_must_fit_the_cache_or_be_shuffled_in_parts(
    load: Callable[..., RunConfig], tmp_path: Path
) -> None:
    local = Path("data/test")
    remote = fsspec.filesystem("memory")
    for path in local.rglob("*.*"):
        remote.pipe_file(f"/stream/{path.relative_to(local)}", path.read_bytes())
    config = load("data.path=memory://stream", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gb=1e-7")
    assert cache_settings(config).folder == tmp_path / "cache" and cache_settings(config).max_bytes == 100
    assert "set data.shuffle_shards" in refusal(config)
    assert training_data(load(*_overrides(config, "data.shuffle_shards=1")), verify=True).num_tokens == 200
    assert training_data(load(*_overrides(config, "data.cache_gb=1")), verify=True).num_tokens == 200
    remote.rm("/stream", recursive=True)


def _overrides(config: RunConfig, *more: str) -> Sequence[str]:
    data = config.data
    return [f"data.path={data.path}", f"data.cache_dir={data.cache_dir}", f"data.cache_gb={data.cache_gb}", *more]


# ---- validation sets


def test_validation_needs_documents(load: Callable[..., RunConfig]) -> None:
    config = load()
    with pytest.raises(UserError, match="has no validation documents"):
        validation_sets(config, training_data(config, verify=True), verify=True)


def test_sets_end_at_the_limit_or_before(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    write_documents(tmp_path / "held", {"code": [[1] * 9, [2] * 9, [3] * 9], "prose": [[4] * 5]}, split="validation")
    write_documents(tmp_path / "only", [[5] * 30, [6] * 30])
    both = f"data.validation={{held: {tmp_path}/held, only: {tmp_path}/only}}"
    config = load(both, "train.validation_tokens=20")
    sets = validation_sets(config, training_data(config, verify=True), verify=True)
    assert {name: dataset.num_tokens for name, dataset in sets.items()} == {
        "held.code": 20,
        "held.prose": 5,
        "only": 20,
    }


def test_two_sets_of_one_name_are_refused(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    write_documents(tmp_path / "a", {"en.web": [[1] * 9], "txt": [[4] * 5]}, split="validation")
    write_documents(tmp_path / "b", [[5] * 30], split="validation")
    config = load(f"data.validation={{held: {tmp_path}/a, held.txt: {tmp_path}/b}}")
    with pytest.raises(UserError, match=r"data\.validation\.held\.txt: another set is called held\.txt, too; rename"):
        validation_sets(config, training_data(config, verify=True), verify=True)


def test_sources_without_validation_documents(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    write_documents(tmp_path / "both", {"code": [[1, 2, 3]], "prose": [[4, 5]]})
    manifest = tmp_path / "both/manifest.json"
    train = manifest.read_text()
    write_documents(tmp_path / "both", {"code": [[6, 7]]}, split="validation")
    merged = _merge(train, manifest.read_text())
    manifest.write_text(merged)
    config = load(f"data.path={tmp_path}/both")
    sets = validation_sets(config, training_data(config, verify=True), verify=True)
    assert list(sets) == ["validation"] and list(sets["validation"].sources) == ["code"]
    config = load(f"data.path={tmp_path}/both", "data.sources={prose: {}}")
    with pytest.raises(UserError, match=r"data\.sources: none of them has validation documents"):
        validation_sets(config, training_data(config, verify=True), verify=True)


def _merge(train: str, validation: str) -> str:
    """One manifest of two splits."""
    merged, added = json.loads(train), json.loads(validation)
    for name, source in added["sources"].items():
        merged["sources"][name]["splits"] |= source["splits"]
    return json.dumps(merged)
