"""What a run shows and writes about itself, on rank 0."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from mmrec_train.config import RunConfig
from mmrec_train.model import MMRecConfig
from mmrec_train.model.accounting import flops_per_token, parameter_count
from mmrec_train.monitoring import (
    Console,
    MetricsLogger,
    loss_curve,
    mfu,
    peak_flops,
    read_metrics,
    summarize,
    write_report,
)
from mmrec_train.monitoring.formatting import format_count
from mmrec_train.trainer.distributed import World

SAMPLE_FILE = "sample.txt"


class Reporter:
    """Console, metrics and report of one run; used in a `with`, which shows progress.

    Args:
        first_step: Steps done already (a resumed run).
        wandb_run_id: What the checkpoint kept of the run in wandb.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: MMRecConfig,
        world: World,
        *,
        console: Console,
        first_step: int,
        wandb_run_id: str | None,
    ):
        self._config = config
        self._console = console
        self._run_dir = Path(config.run_dir)
        self._flops_per_token = flops_per_token(model_config)
        name = get_accelerator().device_name()
        device = torch.cuda.get_device_name() if name == "cuda" else "CPU"
        peak = peak_flops(device, config.train.precision)
        self._peak_flops = None if peak is None else peak * world.size
        self._metrics = MetricsLogger(
            self._run_dir,
            run_config=config.model_dump(by_alias=True),
            wandb_settings=config.logging.wandb,
            tensorboard=config.logging.tensorboard,
            wandb_run_id=wandb_run_id,
            resume_step=first_step,
            report=console.print,
        )
        train, data, tokens = config.train, config.data, config.tokens_per_step
        window = f"{data.window_chunks} × {data.chunk_len}" if data.window_chunks > 1 else f"{data.chunk_len}"
        shape, memory = model_config, f"{model_config.memory_slots} slots of {model_config.segment_len} tokens"
        steps = f"{train.steps}, {format_count(train.steps * tokens)} tokens"
        rows = [
            ("parameters", format_count(parameter_count(shape))),
            ("width × layers", f"{shape.hidden_dim} × {shape.num_layers}, gate {shape.gate}"),
            ("memory", f"{memory}, window {shape.short_window}, {shape.num_memories} banks"),
            ("devices", f"{world.size} × {device}, {train.precision}"),
            ("deepspeed", Path(config.deepspeed.config).stem),
            (
                "batch",
                f"{train.global_batch_size} lanes × {window} tokens = {format_count(tokens)} tokens a step",
            ),
            ("steps", steps + (f"; going on from step {first_step}" if first_step else "")),
            ("data", data.path),
            ("run", config.run_dir),
        ]
        self._console.model_card(f"MM-Rec {config.model.preset}", rows)
        self._progress = console.progress(train.steps, first_step)

    @property
    def wandb_run_id(self) -> str | None:
        return self._metrics.wandb_run_id

    def __enter__(self) -> "Reporter":
        self._progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._progress.__exit__(kind, error, trace)
        self._metrics.close(0 if kind is None else 1)

    def advance(self, step: int) -> None:
        self._console.advance(step)

    def say(self, text: str) -> None:
        self._console.print(text)

    def log(self, record: dict[str, Any]) -> None:
        """Logs a record of training or validation; adds MFU where there is a rate."""
        if "tokens_per_second" in record:
            record["mfu"] = mfu(record["tokens_per_second"], self._flops_per_token, self._peak_flops)
        self._metrics.log(record)
        self._console.log_record(record)

    def finish(self, sample: str) -> None:
        """The end of a run: summary, loss curve and sample on the console, report.html in the run folder."""
        if sample:
            (self._run_dir / SAMPLE_FILE).write_text(sample, encoding="utf-8")
        records = read_metrics(self._run_dir)
        self._console.summary(summarize(records), loss_curve(records), sample)
        self._console.print(f"report: {write_report(self._run_dir)}")
