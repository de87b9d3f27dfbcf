"""Where a run's records go: `metrics.jsonl` always, wandb and TensorBoard if wanted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mmrec_train.monitoring.metrics_file import MetricsFile, Record, step_of
from mmrec_train.monitoring.wandb_run import WandbRun, WandbSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"


class MetricsLogger:
    """Logs records to every place that keeps them. Make one on rank 0 only; close it, or use it in a `with`.

    run_config: the resolved configuration as plain values; shown beside the curves in wandb and TensorBoard.
    wandb_run_id: what the checkpoint kept of an earlier part of this run, else None.
    resume_step: the step from which training goes on; 0 for a new run. What an earlier part of the run logged
        after that step is dropped, so that no curve has a step twice.
    report: receives one-line messages for the user (`Console.print`).

    Attribute `wandb_run_id` (str or None): to keep in the checkpoint.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        run_config: Mapping[str, Any],
        wandb_settings: WandbSettings,
        tensorboard: bool,
        wandb_run_id: str | None,
        resume_step: int,
        report: Callable[[str], None],
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(run_dir, resume_step)
        self._wandb = WandbRun(
            wandb_settings, run_dir=run_dir, run_config=run_config, run_id=wandb_run_id, report=report
        )
        self._tensorboard = _open_tensorboard(run_dir, run_config, resume_step) if tensorboard else None

    @property
    def wandb_run_id(self) -> str | None:
        return self._wandb.run_id

    def log(self, record: Record) -> None:
        """Log one flat record. It must have `step`; None stands for a value that could not be measured.

        Values are plain Python scalars. A tensor is a TypeError: reading it would wait for the device.
        """
        self._file.append(record)
        self._wandb.log(record)
        if self._tensorboard is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, step_of(record))
            self._tensorboard.flush()

    def close(self, exit_code: int = 0) -> None:
        self._file.close()
        self._wandb.close(exit_code)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if error is None else 1)


def _open_tensorboard(run_dir: Path, run_config: Mapping[str, Any], resume_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # Event files cannot be shortened: TensorBoard hides what an earlier file has from `purge_step` on.
    first_step = resume_step + 1 if resume_step > 0 else 0
    writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=first_step)
    # Four spaces: Markdown for text as it is.
    config = "\n".join("    " + line for line in json.dumps(run_config, indent=2, default=str).splitlines())
    writer.add_text("config", config, first_step)
    return writer
