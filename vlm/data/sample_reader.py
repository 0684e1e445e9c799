"""Reads, checks and encodes samples; shared by the loader, the preflight, the validation prompts and vlm-doctor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from vlm.data.collate import Row, make_row
from vlm.data.reading import Reading, applied
from vlm.data.split import digest
from vlm.quote import one_line
from vlm.schema import BadSample, Content, Form, Message, Sample, Source, VisualSpec
from vlm.text.encode import TextEncoder
from vlm.text.row import Encoded
from vlm.text.turns import check_placeholders

MAX_PLAIN_WORDS = 50  # as LAVIS, with the characters that it removes


@dataclass(frozen=True)
class SampleReader:
    """Turns samples of a source into rows. Every defect of a sample raises a BadSample with the sample's id.

    A text that the chat template refuses is a defect too; the preflight reports a template that refuses all samples.
    `max_answers` is the number of answers that the LLM can learn per row (None: any number). With `plain_answers`,
    answers are written as BLIP trains on captions, and with `split_answers` they begin in the question.
    """

    text: TextEncoder
    spec: VisualSpec
    reading: Reading = field(default_factory=Reading)
    max_answers: int | None = None
    form: Form = "conversation"
    plain_answers: bool = False
    split_answers: bool = False

    def sample(self, source: Source, index: int) -> Sample:
        """Sample `index` of the source, read and checked."""
        sample = read(source, index, reading=self.reading)
        self.check(sample)
        return self._written(sample)

    def outline(self, source: Source, index: int) -> Sample:
        """Sample `index` without its images; its text is checked."""
        sample = read(source, index, reading=self.reading, outline=True)
        self._check_text(sample)
        return self._written(sample)

    def _written(self, sample: Sample) -> Sample:
        if self.plain_answers:
            messages: list[Message] = [
                {**message, "content": [plain(item) for item in message["content"]]}
                if message["role"] == "assistant"
                else message
                for message in sample.messages
            ]
            sample = replace(sample, messages=messages)
        return split_answer(sample) if self.split_answers else sample

    def check(self, sample: Sample) -> None:
        """Raise BadSample for images that are not 8-bit RGB, for more or fewer images than placeholders, and for text
        beyond the limits of data.reading.
        """
        for number, image in enumerate(sample.images, start=1):
            if not isinstance(image, Image) or image.mode != "RGB":
                found = f"mode {image.mode}" if isinstance(image, Image) else f"type {type(image).__name__}"
                raise BadSample(
                    f"sample '{sample.id}' has an image (number {number}) of {found} where RGB with 8 bits per channel "
                    "is needed; convert it in the source, for example by vlm.data.images.to_rgb",
                    "unreadable_image",
                )
        check_placeholders(sample.id, len(sample.images), sample.num_images)
        self._check_text(sample)

    def _check_text(self, sample: Sample) -> None:
        characters = sum(len(item.get("text", "")) for message in sample.messages for item in message["content"])
        for option, num, what in (
            ("max_turns", len(sample.messages), "turns"),
            ("max_characters", characters, "characters"),
        ):
            if num > (limit := getattr(self.reading, option)):
                raise BadSample(
                    f"sample '{sample.id}' has {num:,} {what}, more than the limit of {limit:,}; shorten or remove it, "
                    f"or set data.reading.{option}={num}",
                    "too_long",
                )

    def encoded(self, sample: Sample) -> Encoded:
        """The tokens of a checked sample or outline, in the form that the objective needs. Raises BadSample."""
        if self.form == "prompt":
            return self.text.encode_prompt(sample)
        if self.form == "pair":
            return self.text.encode_pair(sample)
        encoded = self.text.encode(sample)
        answers = len(self.text.supervised(encoded)) if self.max_answers is not None else 0
        if self.max_answers is not None and answers > self.max_answers:
            raise BadSample(
                f"sample '{sample.id}' has {answers} answers, but an encoder-decoder llm learns {self.max_answers} per "
                "row; set data.train_on=last_assistant, or choose data with one answer per sample (for shapes, "
                "data.num_questions=1)"
            )
        return encoded

    def row(self, sample: Sample, encoded: Encoded) -> Row:
        """The row of a sample, with its images transformed. Raises BadSample where a transform fails."""
        with applied(self.reading):
            try:
                return make_row(sample, encoded, self.spec)
            except ValueError as error:
                raise BadSample(f"sample '{sample.id}': {error}", "unreadable_image") from error


def plain(item: Content) -> Content:
    """A text as BLIP trains on it: lower case, no punctuation but commas, hyphens and apostrophes, 50 words at most."""
    words = re.sub(r"[.!\"()*#:;~]", " ", item.get("text", "").lower()).split()
    return item if item["type"] == "image" else {**item, "text": " ".join(words[:MAX_PLAIN_WORDS])}


def split_answer(sample: Sample) -> Sample:
    """The sample with the first words of its last answer at the end of the question: from none to all but one of them.

    Their number follows from the sample's id, as if drawn evenly (prefix language modeling, arXiv 1910.10683).
    """
    *before, question, answer = sample.messages
    words = "".join(item["text"] for item in answer["content"] if item["type"] == "text").split()
    num = digest(sample.id) % max(1, len(words))
    if num == 0:
        return sample
    asks = any(item["type"] == "text" for item in question["content"])
    given: Content = {"type": "text", "text": " " * asks + " ".join(words[:num])}
    learned: Content = {"type": "text", "text": " ".join(words[num:])}
    question, answer = {**question, "content": [*question["content"], given]}, {**answer, "content": [learned]}
    return replace(sample, messages=[*before, question, answer])


def read(source: Source, index: int, *, reading: Reading, outline: bool = False) -> Sample:
    """The sample, or its outline. Line breaks are removed from its id, and from the message of a BadSample."""
    with applied(reading):
        try:
            sample = source.outline(index) if outline else source[index]
        except BadSample as error:
            if str(error) == one_line(str(error)):
                raise
            raise BadSample(one_line(str(error)), error.kind) from error
    return replace(sample, id=one_line(sample.id))
