import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports the kernels: without a GPU they are tested in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from mmrec_train.ninja import prefer_own_ninja
from tests.trainer.runs import prepare_dataset, write_config

prefer_own_ninja()  # tests build DeepSpeed's operators, also without launch/pretrain.py

# before anything imports deepspeed: tests drive it on the CPU; those on GPUs start processes of their own
os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first, lest at the end one worker be busy with it and the others be idle."""
    items.sort(key=lambda item: item.path.name != "test_training.py")


def pytest_collection_finish():
    """Leaves what has been imported out of every garbage collection to come: DeepSpeed asks for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small real data set: a part of the standard library, 512 tokens of vocabulary."""
    return prepare_dataset(tmp_path_factory.mktemp("data") / "stdlib")


@pytest.fixture
def config_file(tmp_path, dataset):
    """The configuration file of `write_config`, with its run folder beside it."""
    return write_config(tmp_path, dataset)
