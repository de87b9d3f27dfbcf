"""Pretrains MM-Rec: `deepspeed launch/pretrain.py --config launch/configs/NAME.yaml`.

Exit codes: 0 done; 2 bad configuration or input (one plain message); 75 stopped on request with a checkpoint written,
run again to go on; 1 anything else.
"""

import argparse
import os
import sys

from mmrec_train.config import RunConfig, check_machine, deepspeed_config, load_config, runs_on_gpu
from mmrec_train.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from mmrec_train.ninja import prefer_own_ninja


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain MM-Rec under DeepSpeed.")
    parser.add_argument("--config", required=True, help="a YAML file, see launch/configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b.c=VALUE",
        help="values that override the file's",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|never",
        help="auto: from the newest complete checkpoint of the run folder, if there is one (default)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration, its size and the memory it needs; then stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(arguments)


def dry_run(config: RunConfig) -> None:
    """Prints what a run would be. Starts nothing, writes nothing."""
    from mmrec_train.config.preflight import describe
    from mmrec_train.config.stream import training_data, validation_sets

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_machine(config)
    train_data = training_data(config, verify=False)
    if config.train.validate_every:
        validation_sets(config, train_data, verify=False)
    model_config = config.model.to_model_config(train_data.manifest.vocab_size)
    deepspeed_config(config, world_size, model_config)
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe(config, model_config, world_size))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        config = load_config(options.config, options.overrides)
        # DeepSpeed picks its accelerator when it is first imported
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if runs_on_gpu(config) else "cpu")
        prefer_own_ninja()
        if options.dry_run:
            dry_run(config)
            return EXIT_OK
        from mmrec_train.trainer import Trainer

        outcome = Trainer(config, resume=options.resume).fit()
        return EXIT_STOPPED if outcome.stopped else EXIT_OK
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on each machine: what is wrong there, others may not know
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
