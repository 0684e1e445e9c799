"""Several sources as one, each with its ratio of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int

from vlm.ranges import Length, Number, Range, Samples
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed


class Mixture(Source):
    """The samples of all sources, concatenated; an epoch draws each source in proportion to its weight.

    The weight of a source is its entry in `weights`, or its size to the power of 1 / `temperature`: 1 draws by size, a
    higher temperature draws small sources more often. An epoch has `num_samples` (None: the sum of sizes). Each source
    is read in its own order, to its end before a sample repeats, over epochs too. Validation has the held-out samples
    of every source. `Sample.meta["source"]` is the source's name, for an inner mixture the name of its own source; the
    id starts with the name.

    Raises ValueError where `weights` do not name exactly the sources, are negative or all zero.
    """

    def __init__(
        self,
        *,
        split: Split,
        sources: Annotated[dict[str, Callable[..., Source]], Length(1)],
        weights: Annotated[dict[str, Annotated[Number, Range(0, 10**9)]], Length(1)] | None = None,
        temperature: Annotated[Number, Range(above=0, most=1_000)] = 1.0,
        num_samples: Samples | None = None,
    ) -> None:
        if not sources:
            raise ValueError("data.sources names 0 sources; add one under a name of your choice")
        if odd := next((name for name in sources if str(name).endswith("_loss")), None):
            raise ValueError(
                f"data.sources has the name {odd!r}, which would look like a loss of the objective; choose a name that "
                "does not end in _loss"
            )
        if weights is not None and weights.keys() != sources.keys():
            raise ValueError(
                f"data.weights names {', '.join(weights) or 'nothing'} and data.sources {', '.join(sources)}; give "
                "every source its weight"
            )
        if weights is not None and (min(weights.values()) < 0 or not any(weights.values())):
            raise ValueError(f"data.weights={weights} must be 0 or more, one of them above 0; set data.weights=")
        if temperature <= 0:
            raise ValueError(f"data.temperature={temperature} must be above 0; set data.temperature=1 to draw by size")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"data.num_samples={num_samples} must be at least 1; set it to null for the sum of sizes")
        self.sources = {name: _made(make, name, split) for name, make in sources.items()}
        self._sources = list(self.sources.values())
        names = (source.names or [name] for name, source in self.sources.items())
        self.names = list(dict.fromkeys(chain.from_iterable(names)))
        self.left_out = {
            f"{what} of {name}": num for name, source in self.sources.items() for what, num in source.left_out.items()
        }
        sizes = np.array([len(source) for source in self.sources.values()])
        self._ends = np.cumsum(sizes)
        self.num_samples = num_samples or int(self._ends[-1])
        drawn = sizes ** (1 / temperature) if weights is None else np.array([weights[n] for n in sources], dtype=float)
        self.ratios: Float[np.ndarray, " s"] = drawn / drawn.sum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints."""
        return hashed(*(f"{name} {source.fingerprint()}" for name, source in self.sources.items()))

    def __getitem__(self, index: int) -> Sample:
        return self._read(index, lambda source, inside: source[inside])

    def outline(self, index: int) -> Sample:
        """The sample without its images."""
        return self._read(index, lambda source, inside: source.outline(inside))

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The image files of these samples (None: of all), each once in a source."""
        start = 0
        for (name, source), end in zip(self.sources.items(), self._ends.tolist(), strict=True):
            inside = None if indices is None else [index - start for index in indices if start <= index < end]
            for image in source.stored_images(inside):
                yield image._replace(name=f"{name}/{image.name}")
            start = end

    def order(self, epoch: int, *, seed: int) -> list[int]:
        """The `num_samples` indices of an epoch."""
        past = sum((self._counts(e, seed) for e in range(epoch)), np.zeros(len(self._sources), dtype=np.int64))
        counts = self._counts(epoch, seed)
        turns = np.repeat(np.arange(len(self._sources)), counts)
        np.random.default_rng((seed, epoch, 1)).shuffle(turns)
        order = np.empty(len(turns), dtype=np.int64)
        for place, first in enumerate(self._ends - np.diff(self._ends, prepend=0)):
            order[turns == place] = first + self._drawn(place, int(past[place]), int(counts[place]), seed)
        return order.tolist()

    def _read(self, index: int, read: Callable[[Source, int], Sample]) -> Sample:
        index = range(len(self))[index]
        place = int(np.searchsorted(self._ends, index, side="right"))
        name, source = list(self.sources.items())[place]
        try:
            sample = read(source, index - int(self._ends[place]) + len(source))
        except BadSample as error:
            raise BadSample(f"source '{name}': {error}", error.kind) from error
        inner = {} if source.names else {"source": name}
        return replace(sample, id=f"{name}/{sample.id}", meta={**sample.meta, **inner})

    def _counts(self, epoch: int, seed: int) -> Int[np.ndarray, " s"]:
        """Samples of each source in an epoch: its ratio rounded down; the rest is drawn by the fractions cut off."""
        exact = self.num_samples * self.ratios
        counts = np.floor(exact + 1e-6).astype(np.int64)
        rest = np.clip(exact - counts, 0, None)
        if counts.sum() < self.num_samples:
            rng = np.random.default_rng((seed, epoch, 0))
            counts += rng.multinomial(self.num_samples - counts.sum(), rest / rest.sum())
        return counts

    def _drawn(self, place: int, start: int, count: int, seed: int) -> Int[np.ndarray, " n"]:
        """`count` samples of a source after the first `start`, in consecutive passes over it."""
        source = self._sources[place]
        number = 0
        if source.order(0, seed=seed) is None:  # else rounds may differ in length and are counted one by one
            number, start = divmod(start, len(source))
        drawn, missing = [np.empty(0, np.int64)], start + count
        while missing > 0:
            drawn.append(np.asarray(_round(source, number, seed, place)))
            number, missing = number + 1, missing - len(drawn[-1])
        return np.concatenate(drawn)[start:][:count]


def _made(make: Callable[..., Source], name: str, split: Split) -> Source:
    try:
        return make(split=split)
    except ValueError as error:
        raise ValueError(f"source '{name}': {error}") from error


def _round(source: Source, number: int, seed: int, place: int) -> Sequence[int] | Int[np.ndarray, " n"]:
    """The indices of one pass over a source, in its own order or shuffled."""
    order = source.order(number, seed=seed)
    return np.random.default_rng((seed, number, 2, place)).permutation(len(source)) if order is None else order
