"""Generated captions with references, as the code of the evaluation of COCO's captions takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence

WORDS = ["a", "the", "red", "blue", "cat", "dog", "sits", "runs", "on", "under", "table", "tree", "two", "of", "and"]


def cases(num: int = 250) -> list[tuple[str, list[str]]]:
    """Captions with 1 to 5 references each; some equal a reference, and some are short."""
    rng = random.Random(0)

    def sentence(least: int = 1) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 12)))

    found = []
    for number in range(num):
        references = [sentence() for _ in range(rng.randint(1, 5))]
        words = rng.choice(references).split()
        rng.shuffle(words)
        found.append(([sentence(), references[0], " ".join(words[:6])][number % 3], references))
    return found


def official(captions: Sequence[tuple[str, list[str]]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    references = {number: texts for number, (_, texts) in enumerate(captions)}
    return references, {number: [caption] for number, (caption, _) in enumerate(captions)}
