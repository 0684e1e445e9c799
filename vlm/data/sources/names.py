"""A task that only its demonstrations tell: nouns as names of colors, others in each task.

Sample i of a split is a pure function of (seed, split, i). The words of validation occur in no training sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Annotated

from vlm.data.sources.shapes_scene import COLORS, SHAPES, Thing, draw
from vlm.ranges import Range, Samples, Seed
from vlm.schema import Content, Message, Sample, Source, Split

# Common nouns, each of which is one token of most LLMs.
WORDS = (
    "apple bird boat bone book bread bridge brush cake camp cat chain chair cloud coat coin corn cow cup desk dog door "
    "drum duck egg farm fish flag fork fox frog gate goat hand hat hill horse house key king knife lake lamp leaf lion "
    "map milk moon mouse nail nest nut oven owl park pear pen pig pipe plane plate pond queen rain ring road rock roof "
    "rope salt sand ship shoe snow soap sock soup spoon stone tent tiger tooth tower train tree truck wall watch wheel "
    "window wolf wood"
)
VAL_ONE_IN = 5  # one word in five is held out
INITIALS = dict(zip(COLORS, "ROYGBPK", strict=True))  # as in RGB and CMYK


class Names(Source):
    """Images of one shape each; the answer is the word that its color has in the task.

    A sample shows `num_shots` demonstrations, then asks. The `num_names` colors of the task are shown equally often, in
    random order, so with at least `num_names` demonstrations the answer is known. `Sample.meta["task"]` tells the task.

    Args:
        num_names: colors of a task.
        num_shots: demonstrations before the question.
        num_tasks: different tasks of the split, taken in turn; None gives each sample a task of its own.
        letters: the words are single letters, of both splits.
        as_text: the letter of its color (`INITIALS`) stands in the place of each image: the same task for an LLM alone.
    """

    def __init__(
        self,
        *,
        split: Split,
        seed: Seed = 0,
        image_size: Annotated[int, Range(8, 4_096)] = 224,
        num_names: Annotated[int, Range(1, len(COLORS))] = 2,
        num_shots: Annotated[int, Range(0, 256)] = 8,
        num_tasks: Samples | None = None,
        letters: bool = False,
        as_text: bool = False,
        num_train: Samples = 1_000_000,
        num_val: Samples = 256,
    ) -> None:
        if num_names > len(COLORS):
            raise ValueError(f"data.num_names={num_names} is more than the {len(COLORS)} colors; set it lower")
        self.split, self.seed, self.image_size = split, seed, image_size
        self.num_names, self.num_shots, self.num_tasks = num_names, num_shots, num_tasks
        self.as_text = as_text
        self.num_samples = num_train if split == "train" else num_val
        words = WORDS.split()
        held_out = set(random.Random("held-out words").sample(words, len(words) // VAL_ONE_IN))
        self.words = [word for word in words if (word in held_out) == (split == "val")]
        if letters:
            self.words = list(ascii_lowercase)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        name = f"names/{self.seed}/{self.split}/{index}"
        task = index if self.num_tasks is None else index % self.num_tasks
        rng = random.Random(f"names/{self.seed}/{self.split}/task {task}")
        named = rng.sample(list(COLORS), self.num_names)
        words = dict(zip(named, rng.sample(self.words, self.num_names), strict=True))
        rng = random.Random(name)
        colors = list(self._colors(named, rng))
        things = [Thing(rng.randrange(3), rng.randrange(3), rng.choice(SHAPES), color) for color in colors]
        messages: list[Message] = []
        for color in colors:
            shown: Content = {"type": "text", "text": INITIALS[color]} if self.as_text else {"type": "image"}
            messages.append({"role": "user", "content": [shown]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": words[color]}]})
        return Sample(
            id=name,
            images=[] if self.as_text else [draw([thing], rng=rng, size=self.image_size) for thing in things],
            messages=messages,
            meta={"task": str(task)},
        )

    def _colors(self, named: list[str], rng: random.Random) -> Iterator[str]:
        """The color of each demonstration, then of the question."""
        shown: list[str] = []
        while len(shown) < self.num_shots:
            shown += rng.sample(named, len(named))
        shown = shown[: self.num_shots]
        yield from rng.sample(shown, len(shown))
        yield rng.choice(named)
