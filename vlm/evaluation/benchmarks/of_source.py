"""A benchmark from a split of a dataset source: its last questions with their answers, asked as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from vlm.evaluation.benchmarks.base import Benchmark, Question
from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import BadSample, Message, Source


class OfSource(Benchmark):
    """The samples of a source; a sample's last answer is the reference, and the turns before it are the prompt.

    Samples that cannot be read are left out, and counted in `num_left_out`.
    """

    def __init__(self, *, source: Source, scorer: Scorer, max_new_tokens: int) -> None:
        self._source, self.scorer, self.max_new_tokens = source, scorer, max_new_tokens
        self.prompt = "{question}"
        self._messages: dict[str, Sequence[Message]] = {}
        self._indices: dict[str, int] = {}
        self.questions = list(self._read())
        self.num_left_out = len(source) - len(self.questions)

    def _read(self) -> Iterator[Question]:
        for index in range(len(self._source)):
            try:
                sample = self._source.outline(index)
            except BadSample:
                continue
            *asked, _ = sample.messages
            self._messages[sample.id], self._indices[sample.id] = asked, index
            yield Question(
                id=sample.id,
                text="".join(piece.get("text", "") for piece in asked[-1]["content"]),
                references=tuple(references(sample)),
                images=tuple(f"{sample.id}#{number}" for number in range(sample.num_images)),
                type=sample.meta.get("type"),
                meta={key: value for key, value in sample.meta.items() if key == "task"},
            )

    def image(self, name: str) -> Image.Image:
        sample_id, _, number = name.rpartition("#")
        return self._source[self._indices[sample_id]].images[int(number)]

    def messages(self, question: Question) -> list[Message]:
        """The turns before the answer, as the source has them; a `prompt` of one's own replaces the last."""
        asked = list(self._messages[question.id])
        return asked if self.prompt == "{question}" else [*asked[:-1], *super().messages(question)]
