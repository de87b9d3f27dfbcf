"""From the configuration to what is read: the training stream and the validation sets.

`mmrec_train.config` does not import this module: it takes PyTorch, which a misspelt key should not wait for.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmrec_train.config.marked_yaml import Problem, raise_problems
from mmrec_train.config.schema import RunConfig
from mmrec_train.config.suggest import did_you_mean
from mmrec_train.data import TokenDataset, open_dataset
from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.data.manifest import Split
from mmrec_train.data.storage import data_folder, is_url
from mmrec_train.data.views import head, select_sources


def training_data(config: RunConfig, *, verify: bool) -> TokenDataset:
    """The training split of `data.path`, with the sources that are trained on and no others.

    Raises UserError for what `open_dataset` refuses, unknown sources, more steps than there are tokens, and a remote
    data set that does not fit the cache.
    """
    data = config.data
    whole = _open(config, data.path, "train", verify=verify)
    chosen = whole.sources if data.sources is None else data.sources
    raise_problems(
        [
            Problem(
                config.mark("data.sources"),
                f"data.sources: {data.path} has no source '{name}' to train on; {did_you_mean(name, whole.sources)}",
            )
            for name in chosen
            if name not in whole.sources
        ]
    )
    dataset = select_sources(whole, chosen)
    raise_problems([*_length_problems(config, dataset), *_cache_problems(config, dataset)])
    return dataset


def stream_settings(config: RunConfig) -> StreamSettings:
    """How `LaneLoader` is to read `training_data`."""
    data = config.data
    sources = data.sources or {}
    return StreamSettings(
        seed=data.seed,
        order=data.order,
        weights={name: source.weight for name, source in sources.items() if source.weight is not None},
        epochs={name: source.epochs for name, source in sources.items() if source.epochs is not None},
        shuffle_shards=data.shuffle_shards,
        window_chunks=data.window_chunks,
        sequence_len=_stages(data.sequence_len),
    )


def validation_sets(config: RunConfig, train: TokenDataset, *, verify: bool) -> dict[str, TokenDataset]:
    """The first `train.validation_tokens` tokens of each validation set, by the set's name: see `head`.

    Sets are those of `data.validation`, or the validation split of `data.path`. Where one of them has several sources,
    each is a set of its own. Raises UserError for what `open_dataset` refuses, another tokenizer than that of the
    training data, and documents that are trained on.
    """
    data, tokens = config.data, config.train.validation_tokens
    if not data.validation:
        held_out = select_sources(_open(config, data.path, "validation", verify=verify), train.sources)
        if not held_out.sources:
            raise_problems(
                [
                    Problem(
                        config.mark("data.sources"),
                        f"data.sources: none of them has validation documents in {data.path}; "
                        "name other sets by data.validation, or set train.validate_every to 0",
                    )
                ]
            )
        names = list(held_out.sources)
        return {name if len(names) > 1 else "validation": head(held_out, name, tokens) for name in names}
    sets: dict[str, TokenDataset] = {}
    for set_name, path in data.validation.items():
        dataset = _validation_data(config, set_name, path, train, verify=verify)
        for name in dataset.sources:
            key = f"{set_name}.{name}" if len(dataset.sources) > 1 else set_name
            if key in sets:
                message = f"data.validation.{set_name}: another set is called {key}, too; rename one of them"
                raise_problems([Problem(config.mark("data.validation"), message)])
            sets[key] = head(dataset, name, tokens)
    return sets


def _validation_data(config: RunConfig, set_name: str, path: str, train: TokenDataset, *, verify: bool) -> TokenDataset:
    """The validation documents of `path`; all of its documents where none were held out."""
    sources = data_folder(path, cache_settings(config)).manifest().sources.values()
    held_out = any("validation" in source.splits for source in sources)
    dataset = _open(config, path, "validation" if held_out else "train", verify=verify)
    trained_on = {source.fingerprint for source in train.sources.values()}
    problem = None
    if dataset.manifest.tokenizer_fingerprint != train.manifest.tokenizer_fingerprint:
        problem = f"was made with another tokenizer than {config.data.path}; prepare it with that data set's tokenizer"
    elif any(source.fingerprint in trained_on for source in dataset.sources.values()):
        problem = "has no validation split, and its other documents are trained on; give another data set"
    if problem:
        raise_problems([Problem(config.mark("data.validation"), f"data.validation.{set_name}: {path} {problem}")])
    return dataset


def cache_settings(config: RunConfig) -> CacheSettings:
    """Where the shards of remote data sets are kept."""
    data = config.data
    folder = CacheSettings().folder if data.cache_dir is None else Path(data.cache_dir)
    return CacheSettings(folder, max_bytes=int(data.cache_gb * 1e9))


def _open(config: RunConfig, path: str, split: Split, *, verify: bool) -> TokenDataset:
    return open_dataset(path, split, verify=verify, cache=cache_settings(config))


def _length_problems(config: RunConfig, dataset: TokenDataset) -> Iterator[Problem]:
    """Finite sources must have the tokens of all steps."""
    chosen = config.data.sources or {}
    epochs = {name: chosen[name].epochs for name in dataset.sources if name in chosen}
    tokens = sum((epochs.get(name) or 0) * source.num_tokens for name, source in dataset.sources.items())
    steps = tokens // config.tokens_per_step
    if all(epochs.get(name) for name in dataset.sources) and steps < config.train.steps:
        yield Problem(
            config.mark("train.steps"),
            f"train.steps {config.train.steps} takes {config.train.steps * config.tokens_per_step:,} tokens, but "
            f"data.sources has {tokens:,} in all its epochs, which is enough for {steps:,} steps of "
            f"{config.tokens_per_step:,}; lower train.steps, or raise data.sources.NAME.epochs",
        )


def _cache_problems(config: RunConfig, dataset: TokenDataset) -> Iterator[Problem]:
    """Where documents of all shards are shuffled together, all shards are needed at once."""
    shards = [shard for source in dataset.sources.values() for shard in source.shards]
    gigabytes = sum(shard.bin.size + shard.idx.size for shard in shards) / 1e9
    if is_url(config.data.path) and config.data.shuffle_shards is None and gigabytes > config.data.cache_gb:
        yield Problem(
            config.mark("data.path"),
            f"data.path {config.data.path} has {gigabytes:.1f} GB, more than data.cache_gb {config.data.cache_gb:g}, "
            "and all of it is shuffled together; set data.shuffle_shards (8, say), or raise data.cache_gb",
        )


def _stages(sequence_len: int | Sequence[dict[str, int | None]] | None) -> tuple[tuple[int, int | None], ...]:
    if sequence_len is None or isinstance(sequence_len, int):
        return ((0, sequence_len),)
    return tuple((stage["step"] or 0, stage["tokens"]) for stage in sequence_len)
