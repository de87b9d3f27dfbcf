"""The Weights & Biases run of a training run, ours from `init` to `finish`: a resumed run goes on in it.

wandb is a mirror of `metrics.jsonl`. When it fails, that is said once and training goes on without it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmrec_train.monitoring.metrics_file import Record, step_of

if TYPE_CHECKING:
    import wandb


class WandbSettings(Protocol):
    """The section `logging.wandb` of the run's configuration."""

    @property
    def mode(self) -> str:
        """`offline` (written to RUN/wandb, uploaded later by `wandb sync`), `online` or `disabled`."""

    @property
    def project(self) -> str: ...

    @property
    def name(self) -> str | None:
        """None: the run folder's name."""

    @property
    def entity(self) -> str | None: ...


def _failures() -> tuple[type[Exception], ...]:
    """What wandb raises when it fails, and a mistake of ours does not.

    Its own errors: not logged in, no network, refused settings. OSError: its background process is gone, or
    the disk is full. And, deriving from neither, the answers of a connection that was closed while waiting.
    """
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError)


class WandbRun:
    """One wandb run. Its files go to `run_dir/wandb`; in mode `disabled` nothing is written or imported.

    `run_id` None starts a new run; otherwise the run of that id is continued. The attribute `run_id` is what
    the checkpoint must keep: it stays as given when wandb is disabled or fails, so that a later part of the
    run can still continue it. `report` receives one line that says where the run is, and one if wandb fails.
    """

    def __init__(
        self,
        settings: WandbSettings,
        *,
        run_dir: Path,
        run_config: Mapping[str, Any],
        run_id: str | None,
        report: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self._report = report
        self._run: wandb.Run | None = None
        if settings.mode == "disabled":
            return
        self._failures = _failures()
        try:
            self._run = self._start(settings, run_dir, run_config)
        except self._failures as error:
            self._fail("could not start", error)
            return
        self.run_id = self._run.id
        if settings.mode == "online":
            report(f"wandb: {self._run.url}")
        else:
            files = run_dir / "wandb" / f"*-{self.run_id}*"
            report(f"wandb: offline run {self.run_id}; to upload it: wandb sync {files}")

    def _start(self, settings: WandbSettings, run_dir: Path, run_config: Mapping[str, Any]) -> "wandb.Run":
        import wandb  # here, because it takes half a second that a disabled run need not spend

        return wandb.init(
            mode=settings.mode,  # type: ignore[arg-type]
            project=settings.project,
            name=settings.name or run_dir.resolve().name,
            entity=settings.entity,
            dir=run_dir,
            id=self.run_id,
            resume="allow",
            config=dict(run_config),
            allow_val_change=True,  # a resumed run may have another configuration, e.g. more steps
            reinit="create_new",  # never somebody else's run of this process
            # The console is ours and goes to log.txt; silent, because we say ourselves what there is to say.
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, record: Record) -> None:
        """wandb ignores steps older than its newest: those that a resumed run repeats are there already."""
        if self._run is None:
            return
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        try:
            self._run.log(values, step=step_of(record))
        except self._failures as error:
            self._fail("failed", error)

    def close(self, exit_code: int) -> None:
        """Finish the run: wait until everything is written, online until it is uploaded. Not 0: it failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code)
        except self._failures as error:
            self._fail("could not finish", error)
        self._run = None

    def _fail(self, what: str, error: Exception) -> None:
        self._run = None
        self._report(
            f"warning: wandb {what} ({type(error).__name__}: {error}). Training goes on without it; "
            "metrics.jsonl has every record."
        )
