"""One rank of several runs, one after another: a start takes seconds, most of which are imports.

    python -m tests.trainer.in_turn CONFIG RUNS

RUNS is JSON: of each run the port where its ranks meet, and its overrides.
"""

import json
import os
import sys

from launch.pretrain import main

if __name__ == "__main__":
    config, runs = sys.argv[1:]
    for port, overrides in json.loads(runs):
        print(f"---- {overrides}", flush=True)
        os.environ["MASTER_PORT"] = str(port)
        if code := main(["--config", config, "--set", *overrides]):
            sys.exit(code)
