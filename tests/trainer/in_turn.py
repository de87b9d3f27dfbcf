"""One rank of several runs, one after another: a start takes seconds, most of which are imports.

    python -m tests.trainer.in_turn CONFIG RUNS CODE

RUNS is JSON: of each run the port where its ranks meet, and its overrides. Each has to return CODE: the first that does
not is the last.
"""

import json
import os
import sys

from launch.pretrain import main

if __name__ == "__main__":
    config, runs, expected = sys.argv[1:]
    for port, overrides in json.loads(runs):
        print(f"---- {overrides}", flush=True)
        os.environ["MASTER_PORT"] = str(port)
        code = main(["--config", config, "--resume", "auto", "--set", *overrides])
        if code != int(expected):
            print(f"---- returned {code}, not {expected}", flush=True)
            sys.exit(1)
