"""Calls `launch/pretrain.py` within the test's process, as its only rank: a start takes no seconds."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.pretrain import main
from mmrec_train.monitoring import report
from tests.trainer.ranks import free_port


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    errors: str

    @property
    def refusal(self) -> str:
        """The one message that a run refused because of bad input leaves."""
        messages = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert self.code == 2, self
        assert len(messages) == 1 and "Traceback" not in self.out + self.errors, self
        return messages[0]


def be_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher of one rank would put into the environment."""
    rank = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))


class Command:
    """The command with a configuration file; to be called with `--set` overrides and other options."""

    def __init__(self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._config, self._capsys, self._monkeypatch = config, capsys, monkeypatch
        be_the_only_rank(monkeypatch)
        monkeypatch.setattr(report, "PLOTS", ())  # two seconds a run; tests/monitoring draws them

    def __call__(self, *overrides: str, options: tuple[str, ...] = (), port: int | None = None) -> Result:
        self._monkeypatch.setenv("MASTER_PORT", str(port or free_port()))
        self._capsys.readouterr()
        arguments = ["--config", str(self._config), *options, *(["--set", *overrides] if overrides else [])]
        code = main(arguments)
        return Result(code, *self._capsys.readouterr())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but the log, which each start goes on writing."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
