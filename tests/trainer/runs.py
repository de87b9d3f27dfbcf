"""A small data set and a small run for tests."""

import json
import os
import shutil
from pathlib import Path

import yaml

from mmrec_train.data.checksums import file_checksum
from tests.trainer.texts import write_texts

SMALL_MODEL = dict(
    preset="tiny",
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_memories=2,
    memory_slots=8,
    segment_len=4,
    short_window=8,
    ffn_dim=48,
)


def prepare_dataset(out):
    """The first files of the standard library, 600 kB of them: one source, a fifth of the files for validation."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    size, chosen = 0, []
    for text in texts:
        chosen.append(text)
        size += len(text)
        if size > 600_000:
            break
    held_out = chosen[::5]
    train = [text for i, text in enumerate(chosen) if i % 5]
    return write_texts(
        out, {"train": {"main": train}, "validation": {"main": held_out}}, vocab=512, shard_tokens=1_000_000
    )


def copy_with_other_documents(dataset, out):
    """A whole data set that differs from the other in two tokens."""
    shutil.copytree(dataset, out)
    shard = out / "train/main/shard_00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2], raw[4] = raw[4] ^ 1, raw[2]
    shard.write_bytes(raw)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["sources"]["main"]["splits"]["train"]["shards"][0]["bin"]["xxh3_128"] = file_checksum(shard)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def write_config(folder, dataset):
    """A run of 20 steps with accumulation on two ranks: 4 lanes of 48 tokens, 1 at a time."""
    config = dict(
        run_dir=str(folder / "run"),
        model=SMALL_MODEL,
        data=dict(path=str(dataset), chunk_len=48),
        optimizer=dict(learning_rate=1e-2, clip={"global": 0.5, "memory": 0.005, "decay": 0.003, "gate": 0.002}),
        schedule=dict(name="cosine", warmup_steps=3),
        train=dict(
            steps=20,
            global_batch_size=4,
            micro_batch_size=1,
            precision="fp32",
            device="cpu",
            validate_every=10,
            validation_tokens=384,
            activation_checkpointing=2,
        ),
        deepspeed=dict(config="ds_configs/zero0.json"),
        checkpoint=dict(every=100),
        logging=dict(every=1, sample_tokens=4, tensorboard=False, wandb=dict(mode="disabled")),
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
