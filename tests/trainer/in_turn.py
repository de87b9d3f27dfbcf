"""One rank of several runs, one after another: a start takes seconds, most of which are imports.

    python -m tests.trainer.in_turn CONFIG RUNS CODE

RUNS is JSON: of each run the port where its ranks meet, and its overrides. Each has to return CODE: the first that does
not is the last.
"""

import gc
import json
import os
import sys

from launch.pretrain import main
from mmrec_train.monitoring import report

if __name__ == "__main__":
    config, runs, expected = sys.argv[1:]
    gc.freeze()  # DeepSpeed collects garbage often, and would look through all that has been imported
    report.PLOTS = ()  # two seconds a run; tests/monitoring draws them
    for port, overrides in json.loads(runs):
        print(f"---- {overrides}", flush=True)
        os.environ["MASTER_PORT"] = str(port)
        code = main(["--config", config, "--resume", "auto", "--set", *overrides])
        if code != int(expected):
            print(f"---- returned {code}, not {expected}", flush=True)
            sys.exit(1)
