"""Which source comes next, so that the tokens read keep to the weights at every moment."""

from collections.abc import Iterable, Mapping, Sequence

from mmrec_train.errors import UserError


class FairShare:
    """Stride scheduling of parties that are served in pieces of any size, several at a time.

    A party's progress is what it was given, and what it is about to be given, over its weight; the one with the least
    progress is next. With n parties and q pieces of at most p at a time, what a party was given is never further than
    (n − 1 + q) p from its weight's part of what all were given.

    Attributes: `given` and `due` (about to be given) of each party; the caller keeps them.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = tuple(weights)
        self.given = [0] * len(weights)
        self.due = [0] * len(weights)

    def next(self, candidates: Iterable[int]) -> int:
        """The candidate that is furthest behind; of equals the first."""
        return min(candidates, key=lambda party: (self.given[party] + self.due[party]) / self._weights[party])


def resolve_weights(
    tokens: Mapping[str, int],
    stored: Mapping[str, float | None],
    chosen: Mapping[str, float] | None,
    epochs: Mapping[str, int] | None,
) -> dict[str, float]:
    """Each source's part of the tokens trained on, summing to 1, in the order of `tokens`.

    Args:
        tokens: Number of tokens of each source.
        stored: The data set's weights.
        chosen: Weights that replace those; None for none.
        epochs: Passes over a source, 1 where it is not named. Where no source has a weight, each counts with its tokens
            times its epochs, so that all are through at the same time.

    Raises UserError where some sources have weights and others have none.
    """
    weights = {name: (chosen or {}).get(name, stored[name]) for name in tokens}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    if given and len(given) < len(weights):
        raise UserError(
            f"the source {', '.join(weights.keys() - given)} has no weight, but {', '.join(given)} has one; "
            "give each of them one (data.sources.NAME.weight), or none"
        )
    parts = given or {name: count * (epochs or {}).get(name, 1) for name, count in tokens.items()}
    return {name: part / sum(parts.values()) for name, part in parts.items()}
