"""A small data set and a small run for tests."""

import subprocess
import sys

import yaml

from tests.trainer.ranks import REPOSITORY

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
    command = [sys.executable, str(REPOSITORY / "launch/prepare_data.py"), "--source", "stdlib", "--out", str(out)]
    command += ["--train-tokenizer", "512", "--max-tokens", "200000", "--validation-fraction", "0.2"]
    subprocess.run(command, check=True, capture_output=True)
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
