"""Parts of a split that can be read like a split of their own: some of its sources, or the beginning of one."""

import copy
from collections.abc import Collection

import numpy as np

from mmrec_train.data.dataset import Places, SourceDocuments, TokenDataset


def select_sources(dataset: TokenDataset, names: Collection[str]) -> TokenDataset:
    """The same split with these of its sources only."""
    return _with_sources(dataset, {name: source for name, source in dataset.sources.items() if name in names})


def head(dataset: TokenDataset, source: str, tokens: int | None) -> TokenDataset:
    """The first `tokens` tokens of one source, in stored order, or all of it where it has no more (or for None).

    Whole documents, and of the one in which the limit falls the beginning: see `SourceHead`.
    """
    return _with_sources(dataset, {source: SourceHead(dataset.sources[source], tokens)})


class SourceHead(SourceDocuments):
    """The first tokens of a source: its first documents, of which the last one may be cut."""

    def __init__(self, whole: SourceDocuments, tokens: int | None) -> None:
        vars(self).update(vars(whole))  # what is mapped or cached stays shared
        self._whole = whole
        self._cut: tuple[int, int] | None = None  # shard and place of the token that the cut took away first
        if tokens is None or tokens >= whole.num_tokens:
            return
        assert tokens >= 1
        before = np.cumsum([0] + [shard.tokens for shard in whole.shards])
        last = int(np.searchsorted(before, tokens)) - 1  # the shard in which the limit falls
        starts, limit = whole.starts(last), tokens - int(before[last])
        documents = int(np.searchsorted(starts, limit))  # of that shard
        if starts[documents] > limit:
            self._cut = last, limit
        shard = whole.shards[last].model_copy(update={"documents": documents, "tokens": limit})
        self.shards = (*whole.shards[:last], shard)
        self.first_document = np.append(whole.first_document[: last + 1], whole.first_document[last] + documents)
        self.num_documents, self.num_tokens = int(self.first_document[-1]), tokens

    def locate(self, documents: np.ndarray) -> Places:
        places = self._whole.locate(documents)
        if self._cut is None:
            return places
        last = documents == self.num_documents - 1
        return places._replace(length=np.where(last, self._cut[1] - places.begin, places.length))

    def label_at_end(self, document: int) -> int | None:
        """The token that follows a document's last one here; None where that is the document's end."""
        if self._cut is None or document != self.num_documents - 1:
            return None
        shard, place = self._cut
        return int(self.tokens(shard)[place])


def _with_sources(dataset: TokenDataset, sources: dict[str, SourceDocuments]) -> TokenDataset:
    view = copy.copy(dataset)
    view.sources = sources
    view.num_documents = sum(source.num_documents for source in sources.values())
    view.num_tokens = sum(source.num_tokens for source in sources.values())
    return view
