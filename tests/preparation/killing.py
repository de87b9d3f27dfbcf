"""Prepares data sets in children that are killed. A program of its own, so that it can fork: it has no threads.

    python -c PROGRAM random FOLDER SEED KILLS SECONDS
    python -c PROGRAM steps FOLDER

random: at random moments, until the data set is whole, and another one until KILLS are done; children that encode by
themselves within the first SECONDS, and those that do it in two processes, which take longer to start than all the
rest, soon after one of the first commits.
steps: before each step that brings something to the disk, and then once more undisturbed.
FOLDER holds request.json: {"recipe": ..., "tokenizer": ..., "settings": ...}. Whole data sets are FOLDER/whole_N. How
many kills hit a child at work is printed, and then how many of these one of two processes.
"""

import importlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mmrec_train.preparation import ingest, shards
from mmrec_train.preparation.ingest import Settings, prepare
from mmrec_train.preparation.journal import Journal
from mmrec_train.preparation.partial import Partial
from mmrec_train.preparation.recipe import Recipe
from mmrec_train.preparation.shards import SplitWriter

# A program that is given like this is not imported again by each worker of each child.
PROGRAM = "import sys; from tests.preparation.killing import main; main(*sys.argv[1:])"
PROCESSES = (1, 2, 2, 1, 1, 1)  # of one child after another: each number goes on with the work of itself and the other
STEPS: list[tuple[Any, str]] = [
    (Journal, "commit"),
    (Journal, "set_fact"),
    (Journal, "set_stock"),
    (Partial, "discard"),
    (SplitWriter, "sync"),
    (SplitWriter, "finish"),
    (ingest, "write_manifest"),
    (shards, "file_checksum"),
    (os, "rename"),
    (os, "unlink"),
]


def start(folder: Path, out: Path, before: Callable[[], None] = lambda: None, processes: int = 1) -> int:
    """A child that prepares the request into `out`; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        before()
        request = json.loads((folder / "request.json").read_text())
        prepare(
            Recipe.model_validate(request["recipe"]),
            out,
            tokenizer=request["tokenizer"],
            settings=Settings(**request["settings"], processes=processes),
        )
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def was_killed(child: int) -> bool:
    """Wait for a child; False where it came to its end."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child failed with {code}"
    return code != 0


def is_whole(out: Path) -> bool:
    """The data set is there and its journal is gone: what is left of a killed child's work is an empty folder at most.

    Asked for it once more, `prepare` refuses as for any data set that exists.
    """
    return out.exists() and not Partial(out).journal.exists()


def at_random(folder: Path, seed: int, least: int, seconds: float) -> tuple[int, int]:
    moments, numbers = random.Random(seed), itertools.cycle(PROCESSES)
    kills = kills_of_two = number = 0
    while kills < least:
        begun = time.monotonic()
        longest = seconds
        out = folder / f"whole_{number}"
        while not is_whole(out):
            if next(numbers) == 2:
                die = partial(_die_after_commit, moments.randint(1, 20), moments.uniform(0, 0.02))
                killed = was_killed(start(folder, out, die, processes=2))
                kills_of_two += killed
            else:
                child = start(folder, out)
                time.sleep(moments.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
                killed = was_killed(child)
                longest *= 1.05  # so that it comes to an end on a slow machine, too
            kills += killed
        print(f"whole_{number}: {kills} kills, {time.monotonic() - begun:.1f} s", file=sys.stderr)
        number += 1
    return kills, kills_of_two


def at_steps(folder: Path) -> int:
    kills = 0
    while was_killed(start(folder, out := folder / f"whole_{kills}", partial(_die_before_step, kills))):
        kills += 1
        if not is_whole(out):
            assert not was_killed(start(folder, out))
    return kills


def _die_after_commit(number: int, seconds: float) -> None:
    commit, numbers = Journal.commit, itertools.count(1)

    def counted(*arguments: Any) -> None:
        commit(*arguments)
        if next(numbers) == number:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    mock.patch.object(Journal, "commit", counted).start()  # until the child is killed


def _die_before_step(number: int) -> None:
    steps = itertools.count()

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return run

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))


def main(how: str, folder: str, *rest: str) -> None:
    importlib.import_module("mmrec_train.preparation.hub")  # else every child would, for seconds
    if how == "steps":
        print(at_steps(Path(folder)))
    else:
        seed, least, seconds = rest
        print(*at_random(Path(folder), int(seed), int(least), float(seconds)))
