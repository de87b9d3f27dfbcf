"""Stopping on request: a signal asks, all ranks agree at the end of a step, then a checkpoint is written."""

import signal
from types import FrameType
from typing import Any

import torch
from deepspeed import comm as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop signal came, instead of dying of it. A second SIGINT raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; a collective call, so that all ranks leave the loop at the same step."""
        asked = torch.tensor([float(self._asked)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
