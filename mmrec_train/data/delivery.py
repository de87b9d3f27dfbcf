"""Steps of the stream, made ahead by a thread and on the device before they are asked for."""

import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import torch

from mmrec_train.data.lanes import Chunk, LaneLoader

DEPTH = 2  # steps made ahead


@dataclass(frozen=True)
class _Step:
    windows: list[Chunk]  # on the device, as soon as `copied` has happened there
    copied: torch.cuda.Event | None  # None on the CPU
    state: dict[str, Any]  # the stream's position after the step
    consumed: dict[str, int]


class Delivery:
    """The steps of a `LaneLoader`, on `device`, in a thread that is DEPTH steps ahead of who takes them.

    For a GPU the thread copies into pinned memory and from there to the device, on a stream of its own, so that the
    copies of the next steps run while the present one trains. Use it in a `with`, or close it: the thread ends with it.
    """

    def __init__(self, loader: LaneLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._state, self._consumed = loader.state_dict(), dict(loader.consumed)
        self._waits: list[float] = []
        self._steps: SimpleQueue[_Step | BaseException] = SimpleQueue()
        self._failure: BaseException | None = None
        self._room = threading.Semaphore(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make_steps, name="data", daemon=True)
        self._thread.start()

    def next_step(self) -> list[Chunk]:
        """This rank's windows of the next step, one per accumulation micro-batch, on the device.

        Raises StopIteration at the stream's end, and whatever the thread met while it made this step.
        """
        assert not self._closed.is_set()
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        step = self._steps.get()
        self._waits.append(time.perf_counter() - start)
        if isinstance(step, BaseException):
            self._failure = step
            raise step
        self._room.release()
        if step.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(step.copied)
            for window in step.windows:
                for tensor in window:
                    tensor.record_stream(current)  # allocated on the copying stream, used on this one
        self._state, self._consumed = step.state, step.consumed
        return step.windows

    def state_dict(self) -> dict[str, Any]:
        """The stream's position after the last step that was taken: for `LaneLoader.load_state_dict`."""
        return self._state

    @property
    def consumed(self) -> dict[str, int]:
        """Tokens by source, in the steps taken so far."""
        return self._consumed

    def waits(self) -> list[float]:
        """For how many seconds `next_step` waited for each step taken since this was last asked."""
        waits, self._waits = self._waits, []
        return waits

    def close(self) -> None:
        """Ends the thread, after the step that it is making."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_steps(self) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                while True:
                    self._room.acquire()
                    if self._closed.is_set():
                        return
                    self._steps.put(self._make_step())
        except BaseException as error:  # whatever it is, who waits for the step must hear of it
            self._steps.put(error)

    def _make_step(self) -> _Step:
        windows = self._loader.next_step()
        state, consumed = self._loader.state_dict(), dict(self._loader.consumed)
        if self._stream is None:
            return _Step(windows, None, state, consumed)
        copies = [
            Chunk(*(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in window)) for window in windows
        ]
        return _Step(copies, self._stream.record_event(), state, consumed)
