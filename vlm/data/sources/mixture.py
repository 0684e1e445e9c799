"""Several sources as one, each with a fixed ratio of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm.ranges import Length, Number, Range, Samples
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed


class Mixture(Source):
    """The samples of all sources, concatenated. An epoch draws each source in proportion to its weight.

    The weight of a source is its entry in `weights`, or without `weights` its size to the power of 1 / `temperature`:
    1 draws by size, and a higher temperature draws small sources more often. An epoch has `num_samples` samples (None:
    the sum of the sizes). Each source is read in its own order. No sample of it repeats before all its samples were
    read, even over several epochs. Validation has the validation samples of all sources.

    `Sample.meta["source"]` is the name of the source, and within a nested mixture the name of the inner source. The id
    of a sample starts with the name.

    Raises ValueError where the keys of `weights` differ from the sources, or where weights are negative or all zero.
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
        if reserved := next((name for name in sources if str(name).endswith("_loss")), None):
            raise ValueError(
                f"data.sources has the name {reserved!r}, but names that end in _loss are those of losses; choose "
                "another name"
            )
        if weights is not None and weights.keys() != sources.keys():
            raise ValueError(
                f"data.weights has the keys {', '.join(weights) or '(none)'} and data.sources {', '.join(sources)}; "
                "give every source a weight"
            )
        if weights is not None and (min(weights.values()) < 0 or not any(weights.values())):
            raise ValueError(f"data.weights={weights} must be at least 0, and one of them above 0; set data.weights=")
        if temperature <= 0:
            raise ValueError(f"data.temperature={temperature} must be above 0; set data.temperature=1 to draw by size")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"data.num_samples={num_samples} must be at least 1; set it to null for the sum of sizes")
        self.sources = {name: _build(make, name, split) for name, make in sources.items()}
        self._sources = list(self.sources.values())
        names = (source.names or [name] for name, source in self.sources.items())
        self.names = list(dict.fromkeys(chain.from_iterable(names)))
        self.left_out = {
            f"{what} of {name}": num for name, source in self.sources.items() for what, num in source.left_out.items()
        }
        sizes = np.array([len(source) for source in self.sources.values()])
        self._ends = np.cumsum(sizes)
        self.num_samples = num_samples or int(self._ends[-1])
        used = sizes ** (1 / temperature) if weights is None else np.array([weights[n] for n in sources], dtype=float)
        self.ratios: Float[np.ndarray, " s"] = used / used.sum()

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

    def has_images(self) -> Bool[np.ndarray, " n"]:
        """Whether each sample has images."""
        return np.concatenate([source.has_images() for source in self._sources])

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The image files of these samples (None: of all), each once per source."""
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
        drawn = np.repeat(np.arange(len(self._sources)), counts)  # the source of each sample
        np.random.default_rng((seed, epoch, 1)).shuffle(drawn)
        order = np.empty(len(drawn), dtype=np.int64)
        for number, first in enumerate(self._ends - np.diff(self._ends, prepend=0)):
            order[drawn == number] = first + self._draw(number, int(past[number]), int(counts[number]), seed)
        return order.tolist()

    def _read(self, index: int, read: Callable[[Source, int], Sample]) -> Sample:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        name, source = list(self.sources.items())[number]
        try:
            sample = read(source, index - int(self._ends[number]) + len(source))
        except BadSample as error:
            raise BadSample(f"source '{name}': {error}", error.kind) from error
        inner = {} if source.names else {"source": name}
        return replace(sample, id=f"{name}/{sample.id}", meta={**sample.meta, **inner})

    def _counts(self, epoch: int, seed: int) -> Int[np.ndarray, " s"]:
        """The number of samples of each source in an epoch.

        It is the source's ratio rounded down. The remaining samples are drawn in proportion to the fractions cut off.
        """
        exact = self.num_samples * self.ratios
        counts = np.floor(exact + 1e-6).astype(np.int64)
        rest = np.clip(exact - counts, 0, None)
        if counts.sum() < self.num_samples:
            rng = np.random.default_rng((seed, epoch, 0))
            counts += rng.multinomial(self.num_samples - counts.sum(), rest / rest.sum())
        return counts

    def _draw(self, number: int, start: int, count: int, seed: int) -> Int[np.ndarray, " n"]:
        """`count` samples of a source after the first `start`, in consecutive passes over the source."""
        source = self._sources[number]
        pass_number = 0
        if source.order(0, seed=seed) is None:  # all passes have the same length, so whole passes can be skipped
            pass_number, start = divmod(start, len(source))
        drawn, missing = [np.empty(0, np.int64)], start + count
        while missing > 0:
            drawn.append(np.asarray(_one_pass(source, pass_number, seed, number)))
            pass_number, missing = pass_number + 1, missing - len(drawn[-1])
        return np.concatenate(drawn)[start:][:count]


def _build(make: Callable[..., Source], name: str, split: Split) -> Source:
    try:
        return make(split=split)
    except ValueError as error:
        raise ValueError(f"source '{name}': {error}") from error


def _one_pass(source: Source, pass_number: int, seed: int, number: int) -> Sequence[int] | Int[np.ndarray, " n"]:
    """The indices of one pass over source `number`, in its own order or shuffled."""
    order = source.order(pass_number, seed=seed)
    return np.random.default_rng((seed, pass_number, 2, number)).permutation(len(source)) if order is None else order
