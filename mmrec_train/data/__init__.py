"""From text to token shards (`ingest`), and from shards to lanes of training chunks (`lanes`): docs/data.md."""

from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.lanes import Chunk, LaneLoader
from mmrec_train.data.manifest import Manifest
from mmrec_train.data.tokenizer import Encoder, load_tokenizer, special_ids

__all__ = [
    "Chunk",
    "Encoder",
    "LaneLoader",
    "Manifest",
    "TokenDataset",
    "load_tokenizer",
    "open_dataset",
    "special_ids",
]
